"""What recomputing K and V buys and costs: Llama-3.2-11B-Vision's sizes, random weights, one GPU.

    python benchmarks/recompute.py --text 384,2048 --output docs/recompute

For each text length: the largest number of frames that trains with ``recompute`` ``none`` and ``kv`` (cross-attention
layers and projector train, bf16, AdamW), and the time of a step at the same number of frames. While it looks for the
largest number, random numbers stand for the outputs of the vision encoder, which works in portions and is not where
memory runs out; ``--verify`` runs a step at the largest number of ``kv`` with the encoder. Times are with the encoder.
Writes OUTPUT.json and OUTPUT.png.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Freed memory can be used for tensors of any size: what fits should not hang on fragments.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from full_size import IMAGE_SIZE, model_config, video_sample
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from ds_lvxattn.batches.prepare import Batches, Loaded
from ds_lvxattn.batches.sequence_parallel import SequenceParallel
from ds_lvxattn.config import SequenceParallelConfig
from ds_lvxattn.groups import SequenceParallelGroups, start_distributed
from ds_lvxattn.training.loading import select_trainable

POLICIES = ("none", "kv")
BLANK = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
STEP = 8  # frames are tried in multiples of this; the largest number is found to within 2%


class RandomPixels:
    """In place of the image processor: random pixels, the same for every frame, at no cost."""

    max_image_tiles = 4

    def __call__(self, images: list[list[Any]], **unused: Any) -> dict[str, Tensor]:
        frames = len(images[0])
        frame = torch.rand(1, 1, 1, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bfloat16)
        ones = torch.ones(1, frames, 1, dtype=torch.long)
        return {
            "pixel_values": frame.expand(-1, frames, *frame.shape[2:]),
            "aspect_ratio_ids": ones[..., 0],
            "aspect_ratio_mask": ones,
        }


class Setup:
    """The model on the GPU, attached with one rank, and its optimizer."""

    def __init__(self, layers: int) -> None:
        self.sizes = model_config(layers)
        self.device = torch.device(get_accelerator().current_device_name())
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with self.device:
            model: Any = MllamaForConditionalGeneration(self.sizes)
        torch.set_default_dtype(torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):  # as after some training: at 0 the cross-attention would not count
                parameter.data.fill_(0.5)
        select_trainable(model, "random", "default")
        self.model = model.train()
        self.parallel = SequenceParallel(model, SequenceParallelConfig(recompute="kv"), SequenceParallelGroups(1))
        image_id = self.sizes.image_token_index
        self.batches = Batches(model, RandomPixels(), 0, image_id, self.device, torch.bfloat16, self.parallel)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def batch(self, frames: int, text: int) -> dict[str, Any]:
        sample = video_sample(frames, text, self.sizes.image_token_index, self.sizes.text_config.vocab_size)
        layout = self.batches.collator.layout([sample])
        pixels = self.batches.collator.pixels(layout, [[BLANK] * frames])
        loaded = Loaded(layout, pixels, 0, layout.portions)
        return self.batches.prepare(loaded).inputs

    def step(self, inputs: dict[str, Any], policy: str) -> float:
        """One step; its seconds."""
        self.parallel.recomputation.policy = policy
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.model(**inputs).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def attempt(self, frames: int, text: int, policy: str) -> dict[str, float] | None:
        """Seconds and peak bytes of a step, or None when it does not fit."""
        try:
            inputs = self.batch(frames, text)
            torch.cuda.reset_peak_memory_stats()
            seconds = self.step(inputs, policy)
            return {"frames": frames, "step_time_s": seconds, "peak_memory_bytes": torch.cuda.max_memory_allocated()}
        except torch.cuda.OutOfMemoryError:
            return None
        finally:
            inputs = {}
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def random_features(self) -> Iterator[None]:
        """Random numbers in place of the vision encoder's outputs."""
        vision = self.model.model.vision_model
        usual = vision.forward

        def forward(pixel_values: Tensor, **unused: Any) -> Any:
            size = (1, pixel_values.shape[1], 1, vision.num_patches, self.sizes.vision_config.vision_output_dim)
            return SimpleNamespace(last_hidden_state=torch.randn(size, device=self.device, dtype=torch.bfloat16))

        vision.forward = forward
        try:
            yield
        finally:
            vision.forward = usual


def largest(attempt: Callable[[int], dict[str, float] | None], capacity: int) -> list[dict[str, float]]:
    """Attempts that fitted, the last at the largest number of frames: the memory of two small ones tells where."""
    fitted = []
    for frames in (64, 128):
        result = attempt(frames)
        if result is None:
            return fitted
        fitted.append(result)
    low, high = 128, None
    while high is None or high - low > max(STEP, low // 50):
        capacity = int(capacity * 0.985)  # not all of it is for tensors; less than thought, if the last one did not fit
        (f1, p1), (f2, p2) = ((r["frames"], r["peak_memory_bytes"]) for r in (fitted[0], fitted[-1]))
        guess = int(f1 + (capacity - p1) * (f2 - f1) / (p2 - p1))
        guess = max(guess, low + low // 50) if high is None else min(max(guess, low + low // 50), high - low // 100)
        guess = max(guess // STEP * STEP, low + STEP)
        result = attempt(guess)
        if result is None:
            high = guess
        else:
            low = guess
            capacity = int(capacity / 0.985)
            fitted.append(result)
        print(json.dumps({"tried": guess, "fits": result}), flush=True)
    return fitted


def costs(setup: Setup, frames: int, text: int, steps: int) -> dict[str, Any]:
    """Median time of a step of each policy, taken in turn."""
    inputs = setup.batch(frames, text)
    times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for number in range(steps + 1):
        for policy in POLICIES:
            seconds = setup.step(inputs, policy)
            if number:
                times[policy].append(seconds)
    medians = {policy: statistics.median(seconds) for policy, seconds in times.items()}
    return {"frames": frames, "step_time_s": medians, "cost": medians["kv"] / medians["none"] - 1, "all": times}


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results["texts"]), figsize=(5 * len(results["texts"]), 3.6), squeeze=False)
    for axis, (text, result) in zip(axes[0], results["texts"].items(), strict=True):
        for policy, colour in zip(POLICIES, ("tab:orange", "tab:blue"), strict=True):
            points = [(r["frames"], r["peak_memory_bytes"] / 2**30) for r in result["fits"][policy]]
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=f"recompute: {policy}")
        axis.axhline(results["capacity_bytes"] / 2**30, color="gray", linestyle=":", label="memory of the GPU")
        axis.set(title=f"{text} text tokens", xlabel="frames of 1,601 visual tokens", ylabel="peak memory (GiB)")
        axis.set(xlim=0, ylim=0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="384,2048")
    parser.add_argument("--layers", type=int, default=40, help="text layers, of which every fifth is cross-attention")
    parser.add_argument("--frames", type=int, default=32, help="frames of the timed steps")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each policy, after one to warm up")
    parser.add_argument("--verify", default="", help="text lengths to run with the encoder at the largest number")
    parser.add_argument("--output", type=Path, required=True, help="path of the results without its ending")
    args = parser.parse_args()
    start_distributed("nccl")
    setup = Setup(args.layers)
    _, capacity = torch.cuda.mem_get_info()
    device = torch.cuda.get_device_name()
    results: dict[str, Any] = {"device": device, "capacity_bytes": capacity, "layers": args.layers, "texts": {}}

    def write() -> None:
        args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")

    for text in map(int, args.text.split(",")):
        result: dict[str, Any] = {"fits": {}}
        results["texts"][str(text)] = result
        result["time"] = costs(setup, args.frames, text, args.steps)
        with setup.random_features():
            result["time_without_encoder"] = costs(setup, args.frames, text, args.steps)
            for policy in POLICIES:
                result["fits"][policy] = largest(lambda f, p=policy, t=text: setup.attempt(f, t, p), capacity)
        most = {policy: int(fits[-1]["frames"]) for policy, fits in result["fits"].items()}
        result |= {"frames": most, "ratio": most["kv"] / most["none"]}
        print(json.dumps({key: value for key, value in result.items() if key != "fits"}), flush=True)
        write()
    for text in filter(None, args.verify.split(",")):
        result = results["texts"][text]
        result["verified"] = setup.attempt(result["frames"]["kv"], int(text), "kv")
        print(json.dumps({"text": int(text), "verified": result["verified"]}), flush=True)
        write()
    plot(results, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
