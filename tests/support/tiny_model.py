"""A tiny Llama 3.2 Vision model with open gates, samples for it, and its training on one rank without this package.

A sample is written as a pattern: ``I`` a frame, ``t`` a text token, ``a`` an answer token, on which loss is taken::

    tiny_sample("tIIttaItta")   # two groups of images, each with an answer behind it
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import MllamaConfig, MllamaForConditionalGeneration

from ds_lvxattn.batches.prepare import Batches
from ds_lvxattn.batches.sequence_parallel import SequenceParallel
from ds_lvxattn.config import SequenceParallelConfig
from ds_lvxattn.data.sample import IGNORE, Sample
from ds_lvxattn.families import family as encoding
from ds_lvxattn.families import family_of
from ds_lvxattn.families.aria import Aria
from ds_lvxattn.families.blip2 import Blip2
from ds_lvxattn.families.cohere_compass import CohereCompass
from ds_lvxattn.families.flamingo.open_flamingo import OpenFlamingo
from ds_lvxattn.families.gemma3 import Gemma3
from ds_lvxattn.families.idefics import Idefics
from ds_lvxattn.families.idefics2 import Idefics2
from ds_lvxattn.families.idefics3 import Idefics3, SmolVLM
from ds_lvxattn.families.instructblip import InstructBlip, InstructBlipVideo
from ds_lvxattn.families.llava import Llava
from ds_lvxattn.families.mllama import Mllama
from ds_lvxattn.families.owl.mplug_owl3 import MPlugOwl3
from ds_lvxattn.families.paligemma import PaliGemma
from ds_lvxattn.families.qwen1.family import Qwen1VL
from ds_lvxattn.families.qwen2_5_omni import Qwen25Omni
from ds_lvxattn.families.qwen2_5_vl import Qwen25VL
from ds_lvxattn.families.qwen2_vl import Qwen2VL
from ds_lvxattn.families.qwen3_omni import Qwen3Omni
from ds_lvxattn.families.qwen3_vl import Cosmos3Omni, Qwen3VL, Qwen3VLMoe, Qwen35, Qwen35Moe
from ds_lvxattn.groups import SequenceParallelGroups
from ds_lvxattn.needle.small_models import SIZE, SMALL_MODELS, Scale, mllama_config, random
from ds_lvxattn.needle.task import IMAGE, VOCABULARY, build_tokenizer
from ds_lvxattn.plan.modes import eligible_modes
from ds_lvxattn.training.loading import LoadedModel

CPU = torch.device("cpu")
IMAGE_TOKEN = VOCABULARY.index(IMAGE)
TINY = Scale(width=32, layers=3, vision_width=16, vision_heads=2, spread=0.2, positions=128)
FOUR_LAYERS = replace(TINY, layers=4)  # where only some layers see frames

# Text and frames that neither two nor four ranks divide, several images at uneven places, fewer frames than ranks.
PATTERNS = {
    "several images": "tItIItttaaItaIIIta",
    "video": "IIIIIIIttataa",
    "short clip": "tItta",
    "text only": "ttatta",
}
# How attention crosses the ranks: strategy, schedule, placement. Those that route by a mask come behind the others.
# Modes of two levels, which need nodes, are in ``tests/test_two_levels.py``.
_FLAT = sorted((mode for mode in eligible_modes() if not mode.two_levels), key=lambda mode: mode.routes_by_mask)
_PLACEMENTS = itertools.cycle(("contiguous", "striped", "striped"))
MODES = (
    *((*mode.key, placement) for mode, placement in zip(_FLAT, _PLACEMENTS, strict=False)),
    ("auto", "auto", "contiguous"),
)

ADAMW = {"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": 0.01}
CLIPPING = 1.0


def tiny_config(tiles: int = 1, heads: int = 4, **text: Any) -> MllamaConfig:
    """A configuration of about 60,000 parameters for the vocabulary of the needle task."""
    config = mllama_config(FOUR_LAYERS, tiles)
    config.vision_config.intermediate_size = 2 * FOUR_LAYERS.vision_width
    changes = {
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 2, 1),
        "max_position_embeddings": 64,
        **text,
    }
    for key, value in changes.items():
        setattr(config.text_config, key, value)
    return config


def tiny_model(config: MllamaConfig | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same random weights at every call, with gates that let frames through."""
    model = random(lambda: MllamaForConditionalGeneration(config or tiny_config()), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.7)
    return model.to(dtype)


@contextlib.contextmanager
def frames_in_portions(frames: int, config: MllamaConfig) -> Iterator[None]:
    """The vision encoder takes at most ``frames`` frames at once."""
    usual = encoding.TOKENS_AT_ONCE
    encoding.TOKENS_AT_ONCE = Mllama(config).encoder_tokens() * frames
    try:
        yield
    finally:
        encoding.TOKENS_AT_ONCE = usual


def tiny_processor() -> Any:
    return SMALL_MODELS["quickstart"][1]()


def tiny_loaded(config: MllamaConfig | None = None, model: nn.Module | None = None) -> LoadedModel:
    return LoadedModel(model or tiny_model(config), build_tokenizer(), tiny_processor(), IMAGE)


def tiny_sample(pattern: str, seed: int = 0, name: str = "") -> Sample:
    """Random tokens and frames after ``pattern``."""
    rng = np.random.default_rng([seed, len(pattern)])
    ids = [IMAGE_TOKEN if c == "I" else int(rng.integers(3, IMAGE_TOKEN)) for c in pattern]
    labels = [token if c == "a" else IGNORE for token, c in zip(ids, pattern, strict=True)]
    frames = rng.integers(0, 256, (pattern.count("I"), SIZE, SIZE, 3), dtype=np.uint8)
    load = functools.partial(_take, frames)
    return Sample(ids, labels, len(frames), load, name or pattern)


def _take(frames: np.ndarray, wanted: Sequence[int]) -> list[np.ndarray]:
    return [frames[index] for index in wanted]


@dataclass
class ListSource:
    """Samples in a list as a dataset that is read in order."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return "samples in a list"

    def __len__(self) -> int:
        return len(self.samples)

    def order(self, epoch: int) -> range:
        return range(len(self))

    def sample(self, index: int) -> Sample:
        return self.samples[index]


PROCESSORS: dict[type, str] = {
    Mllama: "quickstart",
    Idefics: "small-idefics",
    OpenFlamingo: "small-openflamingo",
    MPlugOwl3: "small-mplug-owl3",
    Llava: "small-llava",
    Blip2: "small-blip2",
    InstructBlip: "small-instructblip",
    InstructBlipVideo: "small-instructblip-video",
    Idefics2: "small-idefics2",
    Idefics3: "small-idefics3",
    SmolVLM: "small-smolvlm",
    Aria: "small-aria",
    Qwen1VL: "small-qwen-vl",
    Qwen2VL: "small-qwen2-vl",
    Gemma3: "small-gemma3",
    PaliGemma: "small-paligemma",
    Qwen25VL: "small-qwen2.5-vl",
    Qwen3VL: "small-qwen3-vl",
    Qwen3VLMoe: "small-qwen3-vl-moe",
    Cosmos3Omni: "small-cosmos3",
    CohereCompass: "small-cohere-compass",
    Qwen25Omni: "small-qwen2.5-omni",
    Qwen3Omni: "small-qwen3-omni",
    Qwen35: "small-qwen3.5",
    Qwen35Moe: "small-qwen3.5-moe",
}


def tiny_batches(model: nn.Module, parallel: SequenceParallel | None = None, packing: int | None = None) -> Batches:
    name = PROCESSORS.get(type(family_of(model)))
    # A model that no small one is of brings its own.
    processor = SMALL_MODELS[name][1]() if name else getattr(model, "own_processor", None)
    dtype, config = next(model.parameters()).dtype, model.config
    image_id: Any = getattr(config, "image_token_id", IMAGE_TOKEN)  # another one with another vocabulary
    return Batches(model, processor, 0, image_id, CPU, dtype, parallel, packing=packing)


def start_deepspeed() -> None:
    """DeepSpeed's front end over the process group of the harness."""
    deepspeed.init_distributed(dist.get_backend(), verbose=False)


@functools.cache
def groups_of(size: int) -> SequenceParallelGroups:
    """Made once in a process: new groups cost time."""
    start_deepspeed()
    return SequenceParallelGroups(size)


def attach(
    model: nn.Module,
    size: int,
    mode: tuple[str, str, str],
    samples: Sequence[Sample],
    packing: int | None = None,
    **block: Any,
) -> Batches:
    """Make ``model`` sequence-parallel, planned for ``samples`` divided over ``size`` ranks."""
    strategy, schedule, placement = mode
    config = SequenceParallelConfig(strategy=strategy, schedule=schedule, placement=placement, size=size, **block)
    batches = tiny_batches(model, SequenceParallel(model, config, groups_of(size)), packing)
    batches.plans(batches.collator.layout(samples, packing))
    return batches


def loss_of(
    model: nn.Module, samples: Sequence[Sample], batches: Batches | None = None, layout: Any = None
) -> torch.Tensor:
    """The rank's part of the loss of a micro-batch; without ``batches``, the unmodified model's whole loss.

    In the model's dtype: the loss that transformers computes is float32 whatever the model. ``layout`` is by default
    the divided one.
    """
    batches = batches or tiny_batches(model)
    inputs = batches.prepare(batches.load(samples, layout or batches.collator.layout(samples))).inputs
    labels, items = inputs.pop("shift_labels"), inputs.pop("num_items_in_batch")
    del inputs["labels"]
    logits = model(**inputs).logits
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum") / items


def supervised(samples: Sequence[Sample]) -> int:
    """Tokens of ``samples`` that loss is taken on."""
    return sum(label != IGNORE for sample in samples for label in sample.labels[1:])


def loss_of_each_alone(model: nn.Module, samples: Sequence[Sample]) -> torch.Tensor:
    """Loss of a micro-batch whose samples the unmodified model sees one at a time.

    In a batch, transformers lets text ahead of the first image attend to the blank frames that pad its sample, so
    what a sample gives depends on the others. Here it does not.
    """
    counts = torch.tensor([sum(label != IGNORE for label in sample.labels[1:]) for sample in samples])
    losses = torch.stack([loss_of(model, [sample]) for sample in samples])
    return (losses * counts).sum() / counts.sum().clamp(min=1)


def ds_config(stage: int, batch: int, micro_batch: int, size: int = 2, **block: Any) -> dict[str, Any]:
    """A DeepSpeed config for ``tiny_model``; ``block`` is the ``sequence_parallel`` block.

    Buckets hold a fraction of the gradients and ZeRO-3 keeps no parameter whole, so that a rank whose hooks fire
    in another order than those of the others would be found.
    """
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": CLIPPING,
        "steps_per_print": 1_000_000,
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}},
        "zero_optimization": {
            "stage": stage, "reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000,
            "stage3_prefetch_bucket_size": 5_000, "stage3_param_persistence_threshold": 0,
        },
        "sequence_parallel_size": size,
        "sequence_parallel": block,
    }  # fmt: skip


def losses_on_one_rank(samples: Sequence[Sample], steps: int, batch: int, micro_batch: int) -> list[float]:
    """Losses of ``steps_on_one_rank``."""
    return [loss for loss, _ in steps_on_one_rank(samples, steps, batch, micro_batch)]


def steps_on_one_rank(samples: Sequence[Sample], steps: int, batch: int, micro_batch: int) -> list[tuple[float, float]]:
    """Training the unmodified model with plain torch AdamW, ``batch`` samples a step: losses, and norms of gradients.

    Norms are those before clipping. As in the loop, vectors and scalars do not decay.
    A step's loss is the sum over its supervised tokens, divided by their number. Parameters that a batch does not
    reach have gradient zero, as in ZeRO's flat partitions.
    """
    model = tiny_model().train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], **ADAMW)
    found = []
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        total = 0.0
        tokens = supervised([samples[row % len(samples)] for row in range(step * batch, (step + 1) * batch)])
        for first in range(step * batch, (step + 1) * batch, micro_batch):
            rows = [samples[row % len(samples)] for row in range(first, first + micro_batch)]
            loss = loss_of_each_alone(model, rows) * (supervised(rows) / max(tokens, 1))
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        found.append((total, norm.item()))
    return found
