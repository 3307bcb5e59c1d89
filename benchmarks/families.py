"""Gradients of every family in bf16 over several ranks, beside those of the unmodified model in bf16 on one.

    torchrun --nproc_per_node 2 benchmarks/families.py --output FILE.json
    torchrun --nproc_per_node 2 benchmarks/families.py --models small-llava,quickstart --head-sizes 64

A small model of each family, with the head sizes of trained ones, so that its layers run the kernels of a training run.
The error is the norm of what all gradients differ by from those of the unmodified model in float32, over their norm; a
figure is that of the ranks over that of the unmodified model in bf16, and at most 1.2. Every strategy divides the same
batch; ``whole`` is the batch computed whole by every rank, as small batches are, with its time over that of
``lv_xattn gather`` beside it: of a step whose pixels are made, as a loader makes them ahead, and of one that makes its
own. ``generated`` is how far the tokens that are generated over ``lv_xattn``, greedily, fall
short of the likeliest ones of the unmodified model in bf16, which reads them in one pass: the largest difference in
logits, in standard deviations of the logits. The token that stands for an image is never generated: a model with random
weights may find it the likeliest, and read again it would ask for an image.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_lvxattn.batches.generation import generate
from ds_lvxattn.batches.prepare import Batches, Loaded
from ds_lvxattn.batches.sequence_parallel import SequenceParallel
from ds_lvxattn.config import SequenceParallelConfig
from ds_lvxattn.data.sample import IGNORE, FrameSize, Sample
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.family import ANY_SIZE
from ds_lvxattn.groups import SequenceParallelGroups, start_distributed
from ds_lvxattn.needle.small_models import HEADS, SIZE, SMALL_MODELS, Scale, random
from ds_lvxattn.needle.task import IMAGE, VOCABULARY
from ds_lvxattn.plan.modes import eligible_modes
from ds_lvxattn.training.dataset import rows_of_frames

IMAGE_ID = VOCABULARY.index(IMAGE)
LIMIT = 1.2
NEW_TOKENS = 12
TIMED_STEPS = 5
GATHER = "lv_xattn gather"


@dataclass
class Figure:
    """One model: errors over that of the unmodified one in bf16, by strategy; see the command's description."""

    model: str
    head_size: int
    bf16_error: float
    over_bf16: dict[str, float]
    refused: dict[str, str]
    whole_over_divided_step: float
    whole_over_divided_time: float
    generated: float | None


def samples(batches: Batches) -> list[Sample]:
    """Two rows with images at uneven places; neither text nor frames divide evenly.

    Both begin with an image: in transformers, text ahead of the first one sees the blank frames that pad a batch.
    """
    size, patterns = FrameSize(SIZE, SIZE), ("ItIIttt" + "ta" * 40 + "IaIIIta" + "ta" * 30, "It" + "ta" * 25)
    frame = _frame(batches, size)
    return [_sample(pattern, frame, size, seed) for seed, pattern in enumerate(patterns)]


def _frame(batches: Batches, size: FrameSize) -> list[int]:
    """The tokens that stand for a picture: what the model's processor writes of it, as far as the tokenizer has it."""
    family, processor = batches.collator.family, batches.collator.processor
    if hasattr(processor, "tokenizer"):
        text = family.write(IMAGE, [size], processor, ANY_SIZE)
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [IMAGE_ID] * len(rows_of_frames(family, processor, ANY_SIZE)(size))


def _sample(pattern: str, frame: list[int], size: FrameSize, seed: int) -> Sample:
    draw = np.random.default_rng(seed)
    ids: list[int] = []
    labels: list[int] = []
    for c in pattern:
        tokens = frame if c == "I" else [int(draw.integers(3, IMAGE_ID))]
        ids += tokens
        labels += tokens if c == "a" else [IGNORE] * len(tokens)
    frames = draw.integers(0, 256, (pattern.count("I"), size.height, size.width, 3), dtype=np.uint8)
    take = functools.partial(_take, frames)
    return Sample(ids, labels, len(frames), take, f"sample {seed}", [size] * len(frames))


def _take(frames: np.ndarray, wanted: Sequence[int]) -> list[np.ndarray]:
    return [frames[index] for index in wanted]


def build(name: str, head_size: int, device: torch.device, seed: int = 1) -> nn.Module:
    """The small model ``name``, float32, with gates, norms and embeddings at random too."""
    width = HEADS * head_size
    scale = Scale(width=width, layers=4, vision_width=width, spread=width**-0.5, positions=1024)

    def made() -> nn.Module:
        model: nn.Module = SMALL_MODELS[name][0](scale)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * scale.spread * torch.randn_like(parameter))
                if parameter.numel() == 1:
                    parameter.fill_(0.7)  # a gate that lets frames through
        return model

    return random(made, seed).to(device).eval()


def batches_of(model: nn.Module, name: str, device: torch.device, parallel: SequenceParallel | None) -> Batches:
    dtype = next(model.parameters()).dtype
    image_id: Any = getattr(model.config, "image_token_id", IMAGE_ID)
    return Batches(model, SMALL_MODELS[name][1](), 0, image_id, device, dtype, parallel)


def loaded(batches: Batches, layout: Any = None) -> Loaded:
    rows = samples(batches)
    return batches.load(rows, layout or batches.collator.layout(rows))


def gradients(model: nn.Module, batches: Batches, layout: Any = None) -> Tensor:
    """Those of all parameters in float32, of this rank's part of the loss."""
    return gradients_of(model, batches, loaded(batches, layout))


def gradients_of(model: nn.Module, batches: Batches, batch: Loaded) -> Tensor:
    model.zero_grad()
    model(**batches.prepare(batch).inputs).loss.backward()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in model.parameters()]
    )


def summed(part: Tensor) -> Tensor:
    """Over the ranks: their losses are parts of one sum."""
    dist.all_reduce(part)
    return part


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Median of a few steps, of the slowest rank."""
    times = []
    for _ in range(TIMED_STEPS + 1):
        dist.barrier()
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    slowest = torch.tensor(statistics.median(times[1:]), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


@torch.no_grad()
def shortfall(model: nn.Module, batches: Batches, prompt: Sample, tokens: list[int]) -> float:
    """How far ``tokens`` after ``prompt`` fall short of the likeliest ones, in standard deviations of the logits."""
    ids, labels = [*prompt.input_ids, *tokens], [*prompt.labels, *tokens]
    row = replace(prompt, input_ids=ids, labels=labels)
    inputs = batches.prepare(batches.load([row], batches.collator.layout([row]))).inputs
    logits = model(**inputs).logits[0, -len(tokens) - 1 : -1].float()
    logits[:, batches.collator.image_id] = -torch.inf
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    return ((logits.max(1).values - chosen).max() / logits[logits.isfinite()].std()).item()


def measure(name: str, head_size: int, device: torch.device, groups: SequenceParallelGroups, seed: int = 1) -> Figure:
    model = build(name, head_size, device, seed)
    exact = gradients(model, batches_of(model, name, device, None))
    small = model.to(torch.bfloat16)
    unmodified = batches_of(small, name, device, None)

    def error(got: Tensor) -> float:
        return ((got - exact).norm() / exact.norm()).item()

    figure = Figure(name, head_size, error(gradients(small, unmodified)), {}, {}, float("nan"), float("nan"), None)
    prompts = samples(unmodified)[:1]
    small.zero_grad()
    for mode in eligible_modes():
        strategy = f"{mode.strategy} {mode.schedule}"
        attached = copy.deepcopy(small)
        try:
            config = SequenceParallelConfig(strategy=mode.strategy, schedule=mode.schedule, size=dist.get_world_size())
            batches = batches_of(attached, name, device, SequenceParallel(attached, config, groups))
            figure.over_bf16[strategy] = error(summed(gradients(attached, batches))) / figure.bf16_error
        except (ConfigError, ValueError) as refused:
            figure.refused[strategy] = str(refused)
            continue
        if strategy == GATHER:
            undivided = batches.collator.undivided_layout(samples(batches))
            whole = functools.partial(gradients, attached, batches, undivided)
            figure.over_bf16["whole"] = error(summed(whole())) / figure.bf16_error
            divided = seconds(functools.partial(gradients, attached, batches), device)
            figure.whole_over_divided_time = seconds(whole, device) / divided
            steps = (functools.partial(gradients_of, attached, batches, loaded(batches, x)) for x in (undivided, None))
            whole_step, divided_step = (seconds(step, device) for step in steps)
            figure.whole_over_divided_step = whole_step / divided_step
            try:
                image = batches.collator.image_id
                tokens = generate(attached, batches, prompts, max_new_tokens=NEW_TOKENS, suppress_tokens=[image])
            except (ConfigError, ValueError) as refused:
                figure.refused["generate"] = str(refused)
            else:
                figure.generated = shortfall(small, unmodified, prompts[0], tokens[0].tolist())
    return figure


def report(figure: Figure) -> bool:
    """Print one; whether it holds."""
    worst = max(figure.over_bf16.values(), default=float("inf"))
    generated = "" if figure.generated is None else f", generated {figure.generated:.3f} off"
    print(
        f"{figure.model:20} D {figure.head_size:3}  bf16 error {figure.bf16_error:.2e}, of that at most {worst:.3f}"
        f"{'' if worst <= LIMIT else ' TOO LARGE'}, whole in {figure.whole_over_divided_step:.2f} of the time"
        f" ({figure.whole_over_divided_time:.2f} with the making of pixels)"
        f"{generated}\n    " + ", ".join(f"{mode} {ratio:.3f}" for mode, ratio in figure.over_bf16.items()),
        flush=True,
    )
    for what, why in figure.refused.items():
        print(f"    {what}: {why}")
    return worst <= LIMIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(SMALL_MODELS), help="small models (default: all)")
    parser.add_argument("--head-sizes", default="64,80,128", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the weights (%(default)s)")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    start_distributed()
    groups = SequenceParallelGroups(dist.get_world_size())
    about = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "ranks": dist.get_world_size(),
        "torch": torch.__version__,
        "seed": args.seed,
    }
    here = dist.get_rank() == 0
    if here:
        print(", ".join(f"{key} {value}" for key, value in about.items()))
    figures: list[Figure] = []
    holds = True
    for name in args.models.split(","):
        for head_size in map(int, args.head_sizes.split(",")):
            try:
                figures.append(measure(name, head_size, device, groups, args.seed))
            except ConfigError as missing:  # on every rank alike: a package that the model needs
                if here:
                    print(f"{name} is left out: {missing}")
                break
            if here:
                holds &= report(figures[-1])
                if args.output is not None:  # what is measured is kept, should a later model end the command
                    found = {**about, "figures": [asdict(f) for f in figures]}
                    args.output.write_text(json.dumps(found, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
