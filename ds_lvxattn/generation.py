"""``generate``: transformers' own generation, over visual keys and values that stay divided over the ranks.

The prefill is one forward of the prompts as in training: text and frames divided over the ranks, every attention layer
by its strategy. What it leaves of the video, the keys and values of the cross-attention layers, stays on the rank of
its frame. The text's keys and values are short, and are gathered to every rank. From the last token of the prompt on,
``generate`` of transformers runs alike on all ranks, one token at a time (``DecodingStep``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Cache, LogitsProcessor, LogitsProcessorList

from ds_lvxattn.comm import Communicator
from ds_lvxattn.data.agreement import agree
from ds_lvxattn.data.collate import Collator, Images
from ds_lvxattn.data.layout import BatchLayout
from ds_lvxattn.data.sample import Sample
from ds_lvxattn.decoding import DecodingStep, VisualCache
from ds_lvxattn.integration import SequenceParallel
from ds_lvxattn.interval import KVInterval
from ds_lvxattn.shards import SequenceShards, ShardLayout

# Arguments of training in what the collator makes.
TRAINING = ("labels", "shift_labels", "num_items_in_batch", "use_cache", "position_ids")
# Settings of transformers' generation that the decoding steps do not do, and the only value that is taken.
LIMITS = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "return_dict_in_generate": False,
    "prompt_lookup_num_tokens": None,
    "assistant_model": None,
}


@torch.no_grad()
def generate(model: Any, collator: Collator, samples: Sequence[Sample], *, seed: int = 0, **settings: Any) -> Tensor:
    """Continue the prompts of ``samples``; every rank of the group calls it with the same arguments.

    Args:
        model: the model that ``collator`` makes batches for; under ZeRO-3 that of the engine (``engine.module``).
        collator: with sequence parallelism, or without it for the unmodified model on this rank alone.
        samples: the prompts; their labels do not matter.
        seed: of the draws, where ``do_sample`` is set. The random state of the caller stays as it is.
        settings: of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ``temperature``, ...

    Returns:
        int64 ``[B, new]``, the same on every rank: the new tokens, padded behind the end of an answer.

    Raises:
        SampleError: on every rank of the group, when the frames of a sample cannot be decoded on one of them.
        ValueError: no samples, an empty prompt, or a setting that cannot work (``LIMITS``).
    """
    lengths = [len(sample.input_ids) for sample in samples]
    if not min(lengths, default=0):
        raise ValueError(f"the prompts have {lengths} tokens; give at least one prompt, each with at least one token")
    samples = [collator.check(sample) for sample in samples]
    settings.setdefault("pad_token_id", collator.pad_token)
    devices = [collator.device] if collator.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return (_on_one_rank if collator.parallel is None else _on_all_ranks)(model, collator, samples, settings)
    finally:
        model.train(was_training)


def _on_one_rank(model: Any, collator: Collator, samples: Sequence[Sample], settings: dict[str, Any]) -> Tensor:
    """The unmodified model. transformers wants padding ahead of the text."""
    longest = max(len(sample.input_ids) for sample in samples)
    padding = [longest - len(sample.input_ids) for sample in samples]
    padded = [
        replace(s, input_ids=[*[collator.pad_token] * n, *s.input_ids], labels=[*[0] * n, *s.labels])
        for s, n in zip(samples, padding, strict=True)
    ]
    layout = collator.layout(padded)
    inputs = collator.collate(layout, collator.load(padded, layout)).inputs
    inputs = {key: value for key, value in inputs.items() if key not in TRAINING}
    inputs["attention_mask"] = _attention_mask(padding, longest, collator.device)
    return model.generate(**inputs, **settings)[:, longest:]


def _on_all_ranks(model: Any, collator: Collator, samples: Sequence[Sample], settings: dict[str, Any]) -> Tensor:
    parallel = collator.parallel
    assert parallel is not None
    decoder = parallel.family.decoder(model)
    for name, only in LIMITS.items():
        value = settings.get(name, getattr(decoder.generation_config, name, None))
        if value not in (None, only):
            raise ValueError(
                f"{name} is {value!r}; generation over divided keys takes {only!r} alone: leave it out, or generate "
                "on one rank"
            )
    layout = collator.layout(samples)
    if not parallel.plan:
        parallel.make_plan(collator.shapes(layout), collator.device, collator.dtype)
    # Where ZeRO-3 partitions the model over several groups, they wait for one another in every forward.
    together = any(hasattr(p, "ds_id") for p in model.parameters()) and dist.get_world_size() > parallel.comm.ranks
    images = agree(
        lambda: collator.load(samples, layout),
        lambda _: ", ".join(f"{s.name}: {len(s.input_ids)} tokens, {s.num_frames} frames" for s in samples),
        parallel.comm.group,
    )
    cache, visual = _prefill(model, collator, layout, images, together)
    lengths = [len(sample.input_ids) for sample in samples]
    padding = [layout.text.total - length for length in lengths]
    _gather_text(cache, parallel, layout.text, padding)
    step = _step(collator, layout, visual, lengths)

    input_ids = torch.full((len(samples), layout.text.total), collator.pad_token)
    for row, sample in enumerate(samples):
        input_ids[row, padding[row] :] = torch.as_tensor(sample.input_ids)
    processors = settings.pop("logits_processor", None) or ()
    # transformers takes no keyword that it does not know: the step joins the arguments of each forward.
    hook = decoder.register_forward_pre_hook(functools.partial(_with_step, step), prepend=True, with_kwargs=True)
    try:
        tokens = decoder.generate(
            input_ids=input_ids.to(collator.device),
            attention_mask=_attention_mask(padding, layout.text.total, collator.device),
            past_key_values=cache,
            logits_processor=LogitsProcessorList([*processors, SameScores(parallel.comm)]),
            synced_gpus=together,
            **settings,
        )
    finally:
        hook.remove()
    return tokens[:, layout.text.total :]


def _prefill(
    model: Any, collator: Collator, layout: BatchLayout, images: Images, together: bool
) -> tuple[Cache, VisualCache]:
    """One forward over the prompts. Returns the model's cache of this rank's tokens, and its visual keys and values."""
    most_frames = layout.most_frames
    if together:
        most = torch.tensor(most_frames, device=collator.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        most_frames = int(most)
    inputs = collator.collate(layout, images, most_frames).inputs
    visual: VisualCache = {}
    batch = replace(inputs["sequence_parallel"], visual=visual)
    taken = {key: value for key, value in inputs.items() if key not in TRAINING}
    taken |= {"position_ids": inputs["position_ids"], "sequence_parallel": batch}
    output = model(**taken, use_cache=True, logits_to_keep=1)
    return output.past_key_values, visual


def _gather_text(cache: Cache, parallel: SequenceParallel, text: SequenceShards, padding: Sequence[int]) -> None:
    """The text's keys and values of all ranks on every rank, but for the last token, which is the first step's.

    The padding of each sample moves from behind its text to ahead of it, where transformers wants it; rotary positions
    are in the keys already.
    """
    comm = parallel.comm
    position = np.maximum(np.arange(text.total - 1) - np.array(padding)[:, None], 0)
    order = text.order_from_padded()
    place = position if order is None else np.array(order)[position]
    index: Tensor | None = None
    for module, plan in parallel.plans.items():
        if plan.role != "self":
            continue
        layer: Any = cache.layers[int(module.layer_idx)]  # type: ignore[arg-type]
        own = torch.stack((layer.keys, layer.values))  # [2, B, H_kv, s, D]
        own = nn.functional.pad(own, (0, 0, 0, text.longest - own.shape[3]))
        whole = comm.all_gather(own, "text cache").movedim(0, 3).flatten(3, 4)
        if index is None:
            index = torch.from_numpy(place).to(whole.device)
        rows = index[None, :, None, :, None].expand(2, -1, whole.shape[2], -1, whole.shape[4])
        layer.keys, layer.values = whole.gather(3, rows).unbind()


def _step(collator: Collator, layout: BatchLayout, visual: VisualCache, lengths: Sequence[int]) -> DecodingStep:
    """What all new tokens have in common: they see what the last token of their prompt sees."""
    parallel, device = collator.parallel, collator.device
    assert parallel is not None
    last = np.arange(len(lengths)), np.array(lengths) - 1
    start, stop = layout.start[last], layout.stop[last]
    interval = None
    if start.any() or (stop != layout.keys.total).any():
        first_and_last = torch.from_numpy(np.stack((start, stop))[:, None, :, None]).to(device)
        interval = KVInterval(*first_and_last.unbind())
    text_start = None
    if min(lengths) < layout.text.total:
        text_start = torch.tensor([[layout.text.total - n] for n in lengths], dtype=torch.int32, device=device)
    sees_frame = torch.from_numpy(layout.sees_frame[last]).to(device, collator.dtype)
    one_row = SequenceShards((1,) * parallel.comm.ranks)
    return DecodingStep(
        parallel.comm, parallel.plans, parallel.config.kernel, visual,
        ShardLayout(one_row, layout.keys), interval, text_start, sees_frame[:, None, None, None],
    )  # fmt: skip


def _with_step(step: DecodingStep, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a forward of ``generate``: the step, and positions where transformers gives none.

    A model without them would count the padding, which the keys of the prefill did not.
    """
    if kwargs.get("position_ids") is None and step.text_start is not None:
        kwargs = {**kwargs, "position_ids": kwargs["past_key_values"].get_seq_length() - step.text_start.long()}
    return args, {**kwargs, "sequence_parallel": step}


def _attention_mask(padding: Sequence[int], length: int, device: torch.device) -> Tensor:
    """int64 ``[B, length]``, 0 for the padding ahead of each sample."""
    return (torch.arange(length) >= torch.tensor(padding)[:, None]).long().to(device)


class SameScores(LogitsProcessor):
    """The first rank's scores on every rank, so that all draw the same token, and stop together.

    They are equal but for rounding, which can differ between devices, and which an argmax or a draw could follow.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores [B, V]`` float32."""
        return self.comm.broadcast(scores.contiguous(), "scores")
