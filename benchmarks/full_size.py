"""One training step of Llama-3.2-11B-Vision's sizes, random weights: step time, memory and the frames that fit.

    deepspeed --num_gpus 2 benchmarks/full_size.py --ds_config ds_configs/zero3.json --frames 16,32,64 --output FILE

Cross-attention layers and projector train, as by default for a pretrained model. Frames are random pixels: this
measures the machine, not the data. Frame counts are tried in the given order until one does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from ds_lvxattn.batches.prepare import Batches
from ds_lvxattn.batches.sequence_parallel import SequenceParallel
from ds_lvxattn.config import load_ds_config, sequence_parallel_config
from ds_lvxattn.data.sample import IGNORE, FrameSize, Sample
from ds_lvxattn.groups import SequenceParallelGroups, start_distributed
from ds_lvxattn.training.ds_config import resolve_ds_config
from ds_lvxattn.training.loading import model_dtype, select_trainable

IMAGE_SIZE = 560


def model_config(text_layers: int) -> MllamaConfig:
    """Llama-3.2-11B-Vision: transformers' own defaults, at the published image size."""
    config = MllamaConfig(vision_config=MllamaVisionConfig(image_size=IMAGE_SIZE))
    # Without it no row of the embedding is set to zero at initialisation, which a partitioned one cannot do.
    config.text_config.pad_token_id = None
    config.text_config.num_hidden_layers = text_layers
    config.text_config.cross_attention_layers = [
        n for n in config.text_config.cross_attention_layers if n < text_layers
    ]
    return config


def video_sample(frames: int, text: int, image_token: int, vocabulary: int, side: int = IMAGE_SIZE) -> Sample:
    """``frames`` image tokens, then ``text`` tokens of which the last quarter are answers; frames have ``side`` pixels.

    Their sizes are those of images: with more than one tile they count with all their tiles.
    """
    rng = np.random.default_rng(0)
    words = rng.integers(10, vocabulary - 10, text).tolist()
    labels = [IGNORE] * (frames + text - text // 4) + words[text - text // 4 :]

    def load(wanted):
        return [rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in wanted]

    sizes = [FrameSize(side, side)] * frames
    return Sample([image_token] * frames + words, labels, frames, load, f"{frames} random frames", sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", required=True)
    parser.add_argument("--frames", default="16,32,64,96,128")
    parser.add_argument("--text", type=int, default=384)
    parser.add_argument("--layers", type=int, default=40, help="text layers, of which every fifth is cross-attention")
    parser.add_argument("--steps", type=int, default=3, help="timed steps after one to warm up")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=0)
    args = parser.parse_args()
    start_distributed()
    get_accelerator().set_device(args.local_rank)
    ds_config = load_ds_config(args.ds_config)
    config = sequence_parallel_config(ds_config, dist.get_world_size())
    ds_config = resolve_ds_config(ds_config, 100, dist.get_world_size() // config.size)
    # A micro-batch of one a step: gradient accumulation would only repeat it.
    ds_config["train_micro_batch_size_per_gpu"] = 1
    ds_config["train_batch_size"] = dist.get_world_size() // config.size
    sizes = model_config(args.layers)
    dtype = model_dtype(ds_config)

    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=ds_config):  # whose dtype is that of the settings
        model = MllamaForConditionalGeneration(sizes)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):  # as after some training: at 0 the cross-attention would not count
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.fill_(0.5)
    select_trainable(model, "random", "default")
    groups = SequenceParallelGroups(config.size)
    parallel = SequenceParallel(model, config, groups) if config.size > 1 else None
    processor = MllamaImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, max_image_tiles=1)
    device = torch.device(get_accelerator().current_device_name())
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=ds_config, mpu=groups)
    batches = Batches(model, processor, 0, sizes.image_token_index, device, dtype, parallel)
    results = []
    for frames in map(int, args.frames.split(",")):
        sample = video_sample(frames, args.text, sizes.image_token_index, sizes.text_config.vocab_size)
        result = measure(engine, batches, sample, args.steps)
        results.append({"frames": frames, "text": args.text, "ranks": dist.get_world_size(), **result})
        if dist.get_rank() == 0:
            print(json.dumps(results[-1]), flush=True)
            args.output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "runs": results}, indent=2))


def measure(engine: Any, batches: Batches, sample: Sample, steps: int) -> dict[str, Any]:
    """Time of a step (mean over ``steps``), peak memory and traffic. Ends the process when memory runs out."""
    loaded = batches.load([sample], batches.collator.layout([sample]))
    if batches.parallel and batches.planner:
        batches.planner.start(batches.collator.sizes(loaded.layout))
        batches.parallel.comm.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = 0.0
    for step in range(steps + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        batch = batches.prepare(loaded)
        try:
            loss = engine(**batch.inputs).loss
            engine.backward(loss)
            engine.step()
        except torch.cuda.OutOfMemoryError:
            # The other ranks wait in a collective; only leaving ends the run. What fitted is already written.
            print(f"rank {dist.get_rank()}: {sample.num_frames} frames do not fit", flush=True)
            sys.exit(3)
        torch.cuda.synchronize()
        seconds += (time.perf_counter() - began) * (step > 0)
    plan = batches.planner.plan if batches.planner else ()
    return {
        "step_time_s": seconds / steps,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "comm_bytes": batches.parallel.comm.bytes_received // (steps + 1) if batches.parallel else 0,
        "cross_strategy": sorted({layer.strategy for layer in plan if layer.role == "cross"}),
    }


if __name__ == "__main__":
    main()
