"""``generate``: transformers' own generation, over visual keys and values that stay divided over the ranks.

The prefill is one forward of the prompts as in training: text and frames divided over the ranks, every attention layer
by its strategy. The keys and values of the video stay on the rank that has them: those of cross-attention on the rank
of the frame, and where the text holds the visual tokens, those of self-attention on the rank of the row. Elsewhere the
text is short, and its keys and values are gathered to every rank. From the last token of the prompt on, ``generate``
of transformers runs alike on all ranks, one token at a time (``DecodingStep``).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from ds_lvxattn.batches.agreement import agree
from ds_lvxattn.batches.collate import Collator
from ds_lvxattn.batches.layout import BatchLayout
from ds_lvxattn.batches.prepare import Batches, Loaded
from ds_lvxattn.data.sample import IGNORE, Sample, without_labels
from ds_lvxattn.exchange.comm import Communicator
from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.exchange.shards import SequenceShards, ShardLayout
from ds_lvxattn.families import VisualFamily, unwrapped
from ds_lvxattn.plan.layer_plan import LayerPlan
from ds_lvxattn.runtime.decoding import DecodingStep, KeyCache, MixerStates, NewTokens
from ds_lvxattn.runtime.zero3 import is_partitioned

Plans = Mapping[nn.Module, LayerPlan]

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
    "guidance_scale": 1,  # another one runs a second prompt beside the first
    "max_time": None,  # by the clock of each rank
}
# What a caller may not set, and a model's own generation config may: the cache is another one here.
CACHES = ("cache_implementation", "past_key_values")


@torch.no_grad()
def generate(model: Any, batches: Batches, samples: Sequence[Sample], *, seed: int = 0, **settings: Any) -> Tensor:
    """Continue the prompts of ``samples``; every rank of the group calls it with the same arguments.

    Args:
        model: the model that ``batches`` are for; under ZeRO-3 that of the engine (``engine.module``).
        batches: with sequence parallelism, or without it for the unmodified model on this rank alone.
        samples: the prompts; their labels do not matter.
        seed: of the draws, where ``do_sample`` is set. The random state of the caller stays as it is.
        settings: of transformers' ``generate``: ``max_new_tokens``, ``do_sample``, ``temperature``, ...

    Returns:
        int64 ``[B, new]``, the same on every rank: the new tokens, padded behind the end of an answer.

    Raises:
        SampleError: on every rank of the group, when the frames of a sample cannot be decoded on one of them.
        ConfigError: on all ranks, where only some have images under ZeRO-3 (see ``Batches.prepare``).
        ValueError: no samples, an empty prompt, a prompt whose last image only what follows it would see, a model that
            cannot generate, or a setting that cannot work (``LIMITS``).
    """
    model = unwrapped(model)  # ``generate`` of a PeftModel would pass by its hooks
    collator = batches.collator
    lengths = [len(sample.input_ids) for sample in samples]
    if not min(lengths, default=0):
        raise ValueError(f"the prompts have {lengths} tokens; give at least one prompt, each with at least one token")
    # Nothing of a prompt is an answer, whatever it is labelled.
    samples = [collator.check(without_labels(s)) for s in samples]
    if not collator.family.generates(model):
        raise ValueError(
            f"{collator.family.name} cannot generate: {type(model).__name__} is not a model that transformers "
            "generates with (GenerationMixin)"
        )
    for sample in samples:
        _check_end(sample, collator)
    settings.setdefault("pad_token_id", collator.pad_token)
    devices = [collator.device] if collator.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return (_on_one_rank if batches.parallel is None else _on_all_ranks)(model, batches, samples, settings)
    finally:
        model.train(was_training)


def _check_end(sample: Sample, collator: Collator) -> None:
    """That new tokens see the frames that the last token of the prompt sees, which is how they are decoded.

    Raises:
        ValueError: they would see more.
    """
    family, ids = collator.family, sample.input_ids
    if isinstance(family, VisualFamily) and not family.keys_in_text and ids[-1] == collator.image_id:
        here, behind = family.frame_ranges([*ids, collator.pad_token], collator.image_id)[-2:]
        if here != behind:
            raise ValueError(
                f"{sample.name} ends in an image, which {family.name} shows to the tokens behind it alone: let text "
                "follow it"
            )


def _on_one_rank(model: Any, batches: Batches, samples: Sequence[Sample], settings: dict[str, Any]) -> Tensor:
    """The unmodified model. transformers wants padding ahead of the text."""
    collator = batches.collator
    lengths = collator.layout(samples).lengths
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    padded = [
        replace(s, input_ids=[*[collator.pad_token] * n, *s.input_ids], labels=[*[IGNORE] * n, *s.labels])
        for s, n in zip(samples, padding, strict=True)
    ]
    loaded = batches.load(padded)
    together = _waits_for_others(model, ranks=1)
    if together:
        loaded = _with_other_groups(loaded, collator.device)
    inputs = batches.prepare(loaded).inputs
    inputs = {key: value for key, value in inputs.items() if key not in TRAINING}
    if isinstance(collator.family, VisualFamily):
        arguments = collator.family.prompt_arguments(loaded.layout.positions(collator.family))
        inputs |= {key: x.to(collator.device) for key, x in arguments.items()}
    inputs["attention_mask"] = _attention_mask(padding, longest, collator.device)
    return model.generate(**inputs, **{"synced_gpus": together, **settings})[:, longest:]


def _waits_for_others(model: nn.Module, ranks: int) -> bool:
    """Whether groups of ``ranks`` wait for one another in every forward: ZeRO-3 partitions the model over several."""
    return is_partitioned(model) and dist.get_world_size() > ranks


def _with_other_groups(loaded: Loaded, device: torch.device) -> Loaded:
    """``loaded``, whose forward all groups run together; all ranks call it."""
    has_images = any(loaded.layout.frames)
    found = torch.tensor((loaded.portions, has_images, not has_images), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    portions, some, others = found.tolist()
    return replace(loaded, portions=portions, mixed=bool(some and others))


def _on_all_ranks(model: Any, batches: Batches, samples: Sequence[Sample], settings: dict[str, Any]) -> Tensor:
    collator, parallel = batches.collator, batches.parallel
    assert parallel is not None
    decoder = parallel.family.decoder(model)
    given = settings.get("generation_config")
    for name in CACHES:
        if settings.get(name, getattr(given, name, None)) is not None:
            raise ValueError(f"{name} was given; the cache of divided keys is made here: leave it out")
    for name, only in LIMITS.items():
        value = settings.get(name, getattr(given or decoder.generation_config, name, None))
        if value not in (None, only):
            raise ValueError(
                f"{name} is {value!r}; generation over divided keys takes {only!r} alone: leave it out, or generate "
                "on one rank"
            )
    layout = collator.layout(samples)
    together = _waits_for_others(model, parallel.comm.ranks)
    loaded = agree(
        lambda: batches.load(samples, layout),
        lambda _: ", ".join(f"{s.name}: {len(s.input_ids)} tokens, {s.num_frames} frames" for s in samples),
        parallel.comm.group,
    )
    cache, divided, states = _prefill(model, batches, loaded, together)
    plans = batches.plans(layout)
    padding = [layout.text.total - length for length in layout.lengths]
    if layout.keys_in_text:
        _keep_new_tokens(cache, divided, layout.text.total)
        _go_on_from(cache, states)
    else:
        _gather_text(cache, parallel.comm, plans, layout.text, padding)
    step = _step(collator, layout, plans, divided)

    # Padding moves from behind the text to ahead of it, where transformers wants it.
    input_ids = np.full_like(layout.input_ids, collator.pad_token)
    for row, length in enumerate(layout.lengths):
        input_ids[row, padding[row] :] = layout.input_ids[row, :length]
    processors = settings.pop("logits_processor", None) or ()
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None  # of the prompts before, of which there may have been another number
    # transformers takes no keyword that it does not know: the step joins the arguments of each forward.
    hook = decoder.register_forward_pre_hook(
        functools.partial(_with_step, step, layout.text.total), prepend=True, with_kwargs=True
    )
    try:
        tokens = decoder.generate(
            input_ids=torch.from_numpy(input_ids).to(collator.device),
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
    model: Any, batches: Batches, loaded: Loaded, together: bool
) -> tuple[Cache, KeyCache, MixerStates | None]:
    """One forward over the prompts. Returns the model's cache of this rank's rows, the keys that stay divided, and the
    states ahead of the last token of each prompt, which is the first step's, of modules that mix tokens otherwise."""
    if together:
        loaded = _with_other_groups(loaded, batches.collator.device)
    inputs = batches.prepare(loaded).inputs
    kept: KeyCache = {}
    role = "self" if loaded.layout.keys_in_text else "cross"
    batch = replace(inputs["sequence_parallel"], kept=kept, kept_role=role)
    states: MixerStates | None = None
    if batches.parallel is not None and batches.parallel.mixers:
        states = {}
        ends = tuple((span.row, span.start, span.stop - 1) for span in loaded.layout.spans)
        batch = replace(batch, documents=ends, states=states)
    taken = {key: value for key, value in inputs.items() if key not in TRAINING}
    taken |= {"position_ids": inputs["position_ids"], "sequence_parallel": batch}
    # A cache that knows nothing of sliding windows: what lies out of sight of a rank's rows is seen by others'.
    cache = DynamicCache()
    last: int | Tensor = 1
    if getattr(batches.collator.family.text_config, "num_kv_shared_layers", 0):
        # By its number: asked for one row of logits, Gemma 4 leaves the others out of its last layers too.
        rows = inputs["position_ids"].shape[-1]
        last = torch.arange(max(rows - 1, 0), rows, device=inputs["position_ids"].device)
    model(**taken, past_key_values=cache, use_cache=True, logits_to_keep=last)
    return cache, kept, states


def _keep_new_tokens(cache: Cache, divided: KeyCache, rows: int) -> None:
    """The keys and values of the text stay where they are; the model's cache goes on with the new tokens.

    They are those that its layers attend to, not those in the cache, which may hold what keys are made of (latent
    attention), or each key once that several heads repeat, or nothing of a layer that attends to the keys of another.
    The last token of a prompt is the first step's, so what the prefill left of it is never seen.
    """
    for module in divided:
        index = int(module.layer_idx)  # type: ignore[arg-type]
        if index < len(cache.layers):
            cache.layers[index] = NewTokens(rows - 1)


def _go_on_from(cache: Cache, states: MixerStates | None) -> None:
    """The states of modules that mix tokens outside attention in the model's cache, from where they go on."""
    for module, (channels, state) in (states or {}).items():
        index = int(module.layer_idx)  # type: ignore[arg-type]
        cache.layers += [DynamicLayer() for _ in range(len(cache.layers), index + 1)]
        layer = LinearAttentionLayer()
        layer.update_conv_state(channels)
        if state is not None:
            layer.update_recurrent_state(state)
        cache.layers[index] = layer


def _gather_text(cache: Cache, comm: Communicator, plans: Plans, text: SequenceShards, padding: Sequence[int]) -> None:
    """The text's keys and values of all ranks on every rank, but for the last token, which is the first step's.

    The padding of each sample moves from behind its text to ahead of it, where transformers wants it; rotary positions
    are in the keys already.
    """
    position = np.maximum(np.arange(text.total - 1) - np.array(padding)[:, None], 0)
    order = text.order_from_padded()
    place = position if order is None else order[position]
    index: Tensor | None = None
    for module, plan in plans.items():
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


def _step(collator: Collator, layout: BatchLayout, plans: Plans, divided: KeyCache) -> DecodingStep:
    """What all new tokens have in common: in cross-attention they see what the last token of their prompt sees."""
    division, device = collator.division, collator.device
    assert division is not None
    lengths = np.array(layout.lengths)
    last = np.arange(len(lengths)), lengths - 1
    if layout.keys_in_text:
        keys, start, stop = layout.text, np.zeros_like(lengths), lengths - 1
    else:
        keys, start, stop = layout.keys, layout.start[last], layout.stop[last]
    interval = None
    if start.any() or (stop != keys.total).any():
        # In cross-attention the new tokens of all samples are one sequence of rows, as the keys are one of keys.
        shape = (2, 1, len(lengths), 1) if layout.keys_in_text else (2, 1, 1, len(lengths))
        bounds = torch.from_numpy(np.stack((start, stop)).astype(np.int32).reshape(shape)).to(device)
        interval = KVInterval(*bounds.unbind())
    text_start = None
    if not layout.keys_in_text and lengths.min() < layout.text.total:
        text_start = torch.from_numpy((layout.text.total - lengths).astype(np.int32)[:, None]).to(device)
    position = layout.positions(collator.family)[(..., *last)][..., None]
    sees_frame = torch.from_numpy(layout.sees_frame[last]).to(device, collator.dtype)
    first_start = None
    if layout.keys_in_text and not layout.blocks_in_window:
        ends = zip(layout.blocks, lengths, strict=True)
        firsts = [next((a for a, b in blocks if b == length), length) for blocks, length in ends]
        first_start = torch.tensor(firsts, dtype=torch.int32, device=device)[None, :, None]
    rows = SequenceShards((1 if layout.keys_in_text else len(lengths),) * division.comm.ranks)
    return DecodingStep(
        division.comm, plans, division.kernel, divided, ShardLayout(rows, keys), interval,
        text_start, sees_frame[:, None, None, None], torch.from_numpy(position).to(device),
        first_start,
    )  # fmt: skip


def _with_step(step: DecodingStep, rows: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a forward of ``generate``: the step, and positions that go on from those of the prompts' ``rows``.

    Those of transformers would count the padding, or not know of the frames.
    """
    positions = step.position + (kwargs["past_key_values"].get_seq_length() - (rows - 1))
    step = replace(step, position_ids=positions)
    return args, {**kwargs, "sequence_parallel": step, "position_ids": positions}


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
