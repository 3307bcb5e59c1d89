"""The whole training step of Llama-3.2-11B-Vision's sizes under every strategy, in turns, and what it is made of.

    torchrun --nproc_per_node 4 benchmarks/step.py --stage 2 --link nvlink --output step_nvlink.json
    torchrun --nproc_per_node 4 benchmarks/step.py --stage 3 --link nodes --work 96:4:384 --output step_nodes.json
    torchrun --nproc_per_node 4 benchmarks/step.py --stage 3 --work 96:4:384 --strategies lv_xattn --largest
    torchrun --nproc_per_node 1 benchmarks/step.py --strategies lv_xattn --work 24:1:384 --output step_one.json
    torchrun --nproc_per_node 2 benchmarks/step.py --strategies lv_xattn,lv_xattn@,lv_xattn+,lv_xattn+@ --work 48:1:384
    python benchmarks/step.py --read step_nvlink.json step_nodes.json step_one.json --plot step.png
    python benchmarks/step.py --read docs/step_*.json --predict docs/two_levels.json

Random weights and pixels, bf16; cross-attention and projector train; the optimizer's step is in it, with a learning
rate of 0, so that every step has the same loss, whatever the strategy. In a round each strategy makes a step that does
not count and one that does; orders change from round to round. Frames are made into pixels before, as the loader does
while the step before runs. A step's time is that of the slowest rank.

``--link``: ``nvlink``, whatever NCCL finds; ``slow``, without peer-to-peer (``NCCL_P2P_DISABLE=1``); ``nodes``, halves
of the ranks that NCCL takes for hosts (``NCCL_HOSTID``), with sockets between. ``--work``: FRAMES:TILES:TEXT, several.
The floor of a strategy is the time in which compute kernels are busy in a profiled step, exchanges left out. What is
measured is written after every round. ``--largest`` doubles the frames of the last item until a step does not fit; what
fits is written. Under ZeRO-3 what does not train stays gathered, as in a run where it fits, unless ``--gather_frozen``
is given, and what trains is gathered once a step, unless ``--gather_trained`` is. ``--read`` compares a run on one GPU
with one of as many frames a GPU on several; ``--predict`` prints what the planner predicts from a machine's profile
beside what was measured (``step_prediction.py``). ``--tiny`` runs a small model, on CPUs too, which checks that
everything runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

LINKS: dict[str, dict[str, str]] = {
    "nvlink": {},
    "slow": {"NCCL_P2P_DISABLE": "1"},
    "nodes": {
        "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_NTHREADS": "4", "NCCL_NSOCKS_PERTHREAD": "4",
    },
}  # fmt: skip


def use_link(name: str) -> None:
    """Set what NCCL reads when it starts."""
    os.environ.update(LINKS[name])
    if name == "nodes":
        os.environ["NCCL_HOSTID"] = f"node{int(os.environ['RANK']) * 2 // int(os.environ['WORLD_SIZE'])}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="96:1:384,96:1:4096,96:4:384,96:4:4096", help="FRAMES:TILES:TEXT, ...")
    parser.add_argument(
        "--strategies",
        default="lv_xattn,ulysses,ring",
        help="each with :SCHEDULE, or + for text on every rank; behind that @ for compiled layers",
    )
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="of ZeRO")
    parser.add_argument("--link", choices=LINKS, default="nvlink")
    parser.add_argument("--seconds", type=float, default=150, help="for each item of --work, profile not counted")
    parser.add_argument("--rounds", type=int, default=9, help="at most, for each item of --work")
    parser.add_argument("--layers", type=int, default=40, help="text layers, of which every fifth is cross-attention")
    parser.add_argument("--largest", action="store_true", help="go on with twice the frames until a step does not fit")
    parser.add_argument(
        "--gather_frozen",
        action="store_true",
        help="ZeRO-3 gathers everything for each use, as with --largest",
    )
    parser.add_argument("--gather_trained", action="store_true", help="ZeRO-3 gathers what trains for each use")
    parser.add_argument("--no_profile", action="store_true")
    parser.add_argument("--zero", type=json.loads, default={}, help="more keys of 'zero_optimization', as JSON")
    parser.add_argument(
        "--gradients", choices=("fp32", "bf16"), default="fp32", help="as ZeRO adds them up over the ranks"
    )
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--output", type=Path, default=Path("step.json"))
    parser.add_argument("--read", type=Path, nargs="*", help="print, and with --plot draw, what these files hold")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--predict", metavar="PROFILE", help="with --read: predicted beside measured steps")
    return parser.parse_args()


args = arguments() if __name__ == "__main__" else None
if args is not None and not args.read:
    use_link(args.link)  # ahead of everything that might start NCCL

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from full_size import model_config, video_sample  # noqa: E402
from paired import LEAST, Comparison, compare, spread  # noqa: E402
from step_parts import PARTS, WAITS, Marks, parts_of_host, parts_of_profile  # noqa: E402
from step_prediction import prediction_report, predictions, read_profile  # noqa: E402
from transformers import MllamaConfig, MllamaForConditionalGeneration  # noqa: E402
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil  # noqa: E402

from ds_lvxattn.batches.prepare import Batches, Loaded  # noqa: E402
from ds_lvxattn.batches.sequence_parallel import SequenceParallel  # noqa: E402
from ds_lvxattn.config import sequence_parallel_config  # noqa: E402
from ds_lvxattn.groups import SequenceParallelGroups, start_distributed  # noqa: E402
from ds_lvxattn.runtime.compiled import compile_layers  # noqa: E402
from ds_lvxattn.runtime.kept_parameters import KeptParameters  # noqa: E402
from ds_lvxattn.training.loading import (  # noqa: E402
    loss_factor,
    parameter_groups,
    partition_over_all_ranks,
    select_trainable,
)

SETTLING = 2  # steps of a strategy ahead of the rounds: kernels compile, connections open, memory finds its place
COPIED, COMPILED = "+", "@"  # behind a strategy: text on every rank; layers under torch.compile


def copies_text(name: str) -> bool:
    return name.removesuffix(COMPILED).endswith(COPIED)


def ds_config(stage: int, ranks: int, on_gpu: bool, zero: Mapping[str, Any], gradients: str) -> dict[str, Any]:
    """The shipped settings for a pretrained model, with a learning rate of 0."""
    return {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
        "bf16": {"enabled": on_gpu},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "weight_decay": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, **zero},
        "seq_parallel_communication_data_type": gradients,
        "sequence_parallel_size": ranks,
    }


def tiny_config() -> MllamaConfig:
    """A model for trying out: the same parts, for frames of 28 pixels."""
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "attention_heads": 2, "num_hidden_layers": 2,
        "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 32, "image_size": 28,
        "patch_size": 14, "max_num_tiles": 4,
    }  # fmt: skip
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 4, "cross_attention_layers": [1, 3], "pad_token_id": None,
        "bos_token_id": 1, "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=64)


class Runner:
    """One engine and, for each strategy, what makes its batches."""

    def __init__(
        self, stage: int, sizes: MllamaConfig, strategies: Sequence[str], zero: Mapping[str, Any] | None = None,
        keeps: bool = True, keeps_trained: bool = True, gradients: str = "fp32",
    ) -> None:  # fmt: skip
        self.ranks, self.cuda = dist.get_world_size(), torch.cuda.is_available()
        self.device = torch.device(get_accelerator().current_device_name())
        settings = ds_config(stage, self.ranks, self.cuda, zero or {}, gradients)
        config = sequence_parallel_config(settings, self.ranks)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        groups = SequenceParallelGroups(self.ranks)
        self.model = _random_model(sizes, settings, dtype, self.device, groups)
        self.parallel = SequenceParallel(self.model, config, groups)
        tile = sizes.vision_config.image_size
        processor = MllamaImageProcessorPil(
            size={"height": tile, "width": tile}, max_image_tiles=sizes.vision_config.max_num_tiles,
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        )  # fmt: skip
        self.sizes = sizes
        self.batches: dict[str, Batches] = {}
        for name in strategies:
            strategy, _, schedule = name.removesuffix(COMPILED).removesuffix(COPIED).partition(":")
            text = "replicated" if copies_text(name) else "divided"
            update = {"strategy": strategy, "schedule": schedule or "auto", "text": text}
            self.parallel.config = config.model_copy(update=update)
            self.batches[name] = Batches(
                self.model, processor, 0, sizes.image_token_index, self.device, dtype, self.parallel
            )
        self.factor = loss_factor(settings, self.ranks)
        # The forward functions of the layers as they are, and compiled.
        self.forwards = {False: {layer: layer.forward for layer in self.parallel.compilable}}
        if any(name.endswith(COMPILED) for name in strategies):
            compile_layers(self.parallel.compilable)
            self.forwards[True] = {layer: layer.forward for layer in self.parallel.compilable}
        partition_over_all_ranks(self.model, settings, groups)
        self.engine, *_ = deepspeed.initialize(
            model=self.model, model_parameters=parameter_groups(self.model), config=settings, mpu=groups
        )
        kept = KeptParameters(self.model, keeps_trained)
        if keeps:
            kept.keep()
        self.kept, self.kept_trained = kept.kept, kept.kept and bool(kept.trained)
        text = self.model.get_submodule("model.language_model")
        self.parts = [
            (self.model.get_submodule("model.vision_model"), "encoder"),
            (self.model.get_submodule("model.multi_modal_projector"), "projection"),
            *((module, "cross-attention") for name, module in text.named_modules() if name.endswith(".cross_attn")),
        ]

    def load(self, frames: int, tiles: int, text: int) -> dict[bool, Loaded]:
        """The rank's part of the batch, pixels included, with text divided and (True) on every rank.

        Raises:
            ValueError: its frames have another number of tiles.
        """
        side = {1: 1, 4: 2}[tiles] * self.sizes.vision_config.image_size
        sample = video_sample(frames, text, self.sizes.image_token_index, self.sizes.text_config.vocab_size, side)
        batches = next(iter(self.batches.values()))
        loaded = batches.load([sample], batches.collator.layout([sample]))
        tokens = (self.sizes.vision_config.image_size // self.sizes.vision_config.patch_size) ** 2 + 1
        if loaded.layout.keys.total != frames * tiles * tokens:
            raise ValueError(f"{frames} frames of {tiles} tiles have {loaded.layout.keys.total} visual tokens")
        if self.ranks == 1:
            return {False: loaded}
        return {False: loaded, True: replace(loaded, layout=batches.collator.frames_layout([sample]))}

    def step(self, name: str, loaded: Mapping[bool, Loaded], marks: Marks | None = None) -> tuple[float, float]:
        """Seconds of a step, of the slowest rank, and its loss."""
        _synchronize(self.cuda)
        dist.barrier()
        began = time.perf_counter()
        if marks:
            marks.set("text")
        for layer, forward in self.forwards[name.endswith(COMPILED)].items():
            vars(layer)["forward"] = forward
        batch = self.batches[name].prepare(loaded[copies_text(name)], marks)  # type: ignore[arg-type]
        loss = self.engine(**batch.inputs).loss
        self.engine.backward(loss * self.factor)
        if marks:
            marks.set("optimizer")
        self.engine.step()
        _synchronize(self.cuda)
        seconds = torch.tensor(time.perf_counter() - began, device=self.device, dtype=torch.float64)
        whole = loss.detach().double()
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        dist.all_reduce(whole)
        return seconds.item(), whole.item()

    def parts_of_step(self, name: str, loaded: Mapping[bool, Loaded]) -> dict[str, float]:
        """What a profiled step is made of, on this rank."""
        marks = Marks(self.cuda)
        if not self.cuda:
            with marks.around(self.parts):
                self.step(name, loaded, marks)
            return parts_of_host(marks, time.perf_counter())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.step(name, loaded)  # the start of the profiler holds up one rank longer than another
            with marks.around(self.parts):
                self.step(name, loaded, marks)
        return parts_of_profile(profile.events(), marks.labels)


def _random_model(
    sizes: MllamaConfig, settings: dict[str, Any], dtype: torch.dtype, device: torch.device, groups: Any
) -> MllamaForConditionalGeneration:
    """Random weights, the same in every stage of ZeRO, with gates that let frames through as after some training."""
    torch.set_default_dtype(dtype)
    if settings["zero_optimization"]["stage"] == 3:
        # Its dtype is that of the settings: one that is given DeepSpeed 0.19.8 drops where a device has no fp16.
        with deepspeed.zero.Init(
            data_parallel_group=groups.get_sequence_data_parallel_group(), config_dict_or_path=settings, mpu=groups
        ):
            model = MllamaForConditionalGeneration(sizes)
    else:
        with device:
            model = MllamaForConditionalGeneration(sizes)
    # transformers leaves weights that are partitioned as their modules made them. How long products take depends on
    # the numbers too: a GPU at the limit of its power slows down.
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
            elif name.endswith("bias") or (parameter.dim() == 1 and name.endswith("weight")):
                parameter.fill_(float(name.endswith("weight")))
            else:
                parameter.normal_(std=0.02, generator=generator)
    torch.set_default_dtype(torch.float32)
    select_trainable(model, "random", "default")
    return model.train()


def _synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def measure(
    runner: Runner, work: tuple[int, int, int], seconds: float, rounds: int, profiled: bool, save: Any
) -> dict[str, Any]:
    """All strategies on one batch, in turns; ``save`` gets what is known after each round."""
    frames, tiles, text = work
    loaded = runner.load(frames, tiles, text)
    names = list(runner.batches)
    found: dict[str, Any] = {
        "frames": frames,
        "tiles": tiles,
        "text": text,
        "visual_tokens": loaded[False].layout.keys.total,
    }
    found["strategies"] = {name: {"steps": [], "losses": []} for name in names}
    for name in names:
        if runner.cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(SETTLING):
            runner.step(name, loaded)
        if runner.cuda:
            found["strategies"][name]["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    began = time.perf_counter()
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            runner.step(name, loaded)
            took, loss = runner.step(name, loaded)
            found["strategies"][name]["steps"].append(took)
            found["strategies"][name]["losses"].append(loss)
        save(found)
        late = torch.tensor(time.perf_counter() - began > seconds, device=runner.device, dtype=torch.int32)
        dist.broadcast(late, 0)
        if late.item() and number + 1 >= min(LEAST, rounds):
            break
    for name in names if profiled else ():
        parts = runner.parts_of_step(name, loaded)
        of_ranks: list[Any] = [None] * runner.ranks
        dist.all_gather_object(of_ranks, parts)
        # The rank that computes longest; the others wait for it.
        found["strategies"][name]["parts"] = max(of_ranks, key=lambda rank: rank["floor"])
        found["strategies"][name]["parts_of_ranks"] = of_ranks
        save(found)
    return found


# The report


def comparisons(run: Mapping[str, Any]) -> list[Comparison]:
    """The first strategy against the others."""
    times = {name: figures["steps"] for name, figures in run["strategies"].items()}
    first, *others = times
    return [compare(first, other, times) for other in others]


def report(run: Mapping[str, Any]) -> str:
    """A table of one run."""
    lines = [
        f"\nZeRO-{run['stage']}, {run['link']}, {run['ranks']} x {run['device']}: {run['frames']} frames of "
        f"{run['tiles']} tiles ({run['visual_tokens']:,} visual tokens), text {run['text']}, gradients "
        f"{run.get('gradients', 'fp32')}",
        f"{'':18}{'step s':>8} {'+-':>6} {'floor':>7}{'x':>6} "
        + "".join(f"{p[:10]:>11}" for p in (*PARTS, *WAITS))
        + f"{'GiB':>7}{'loss':>10}",
    ]
    for name, figures in run["strategies"].items():
        steps, parts = figures["steps"], figures.get("parts", {})
        floor = parts.get("floor", float("nan"))
        columns = "".join(f"{parts.get(p, float('nan')):11.3f}" for p in (*PARTS, *WAITS))
        gib = figures.get("peak_memory_bytes", 0) / 2**30
        lines.append(
            f"{name:18}{median(steps):8.3f} {spread(steps):6.3f} {floor:7.3f}{median(steps) / floor:6.2f} {columns}"
            f"{gib:7.1f}{median(figures['losses']):10.5f}"
        )
    for pair in comparisons(run):
        lines.append(
            f"{pair.one} against {pair.other}: {pair.ratio:.3f} times as fast, {pair.verdict} "
            f"({pair.low:+.4f} to {pair.high:+.4f} s)"
        )
    return "\n".join(lines)


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Stacked bars: a panel for each run, a bar for each strategy, the floor as a line across it."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colours = dict(zip((*PARTS, *WAITS), plt.get_cmap("tab20").colors[::2], strict=False))  # type: ignore[attr-defined]
    colours |= {"idle": "0.85", "not profiled": "0.7"}
    named: set[str] = set()  # a legend names each once
    figure, axes = plt.subplots(1, len(runs), figsize=(1.2 + 2.4 * len(runs), 4), squeeze=False, sharey=False)
    for axis, run in zip(axes[0], runs, strict=True):
        for place, figures in enumerate(run["strategies"].values()):
            parts, whole = figures.get("parts"), median(figures["steps"])
            shown = {"not profiled": whole}
            if parts is not None:
                shown = {key: parts[key] for key in (*PARTS, *WAITS[:-1])}
                shown["idle"] = max(whole - sum(shown.values()), 0.0)  # of the step as it runs without the profiler
            bottom = 0.0
            for key, height in shown.items():
                label = key if key not in named else None
                named.add(key)
                axis.bar(place, height, bottom=bottom, color=colours[key], label=label)
                bottom += height
            if parts is not None:
                axis.hlines(parts["floor"], place - 0.4, place + 0.4, color="black", linestyle="--", linewidth=1)
            axis.text(place, max(whole, bottom), f"{whole:.2f}", ha="center", va="bottom", fontsize=8)
        axis.margins(y=0.1)  # for the numbers above the bars
        axis.set_xticks(range(len(run["strategies"])), list(run["strategies"]), rotation=30, ha="right", fontsize=8)
        axis.set_title(
            f"{run['ranks']} {run['device'].removeprefix('NVIDIA ').split()[0]}, {run['link']}, ZeRO-{run['stage']}\n"
            f"{run['frames']} x {run['tiles']} tiles, text {run['text']}",
            fontsize=8,
        )
    axes[0][0].set_ylabel("seconds a step (dashed: floor)")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.legend(loc="lower center", ncols=5, fontsize=7)
    figure.savefig(path, dpi=150)


def works(listed: str, largest: bool) -> Iterator[tuple[int, int, int]]:
    """Frames, tiles and text of what is listed, and with ``largest`` of ever more frames."""
    items = [tuple(map(int, item.split(":"))) for item in listed.split(",")]
    for frames, tiles, text in items:
        yield frames, tiles, text
    while largest:
        frames *= 2
        yield frames, tiles, text


def weak_scaling(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each strategy, a step on one GPU over one of as many frames a GPU on several."""
    lines = []
    for one in (run for run in runs if run["ranks"] == 1):
        for many in (run for run in runs if run["ranks"] > 1):
            alike = all(one[key] == many[key] for key in ("tiles", "text", "device", "stage"))
            if not alike or many["frames"] != one["frames"] * many["ranks"]:
                continue
            for name in one["strategies"].keys() & many["strategies"].keys():
                alone, together = (median(run["strategies"][name]["steps"]) for run in (one, many))
                lines.append(
                    f"{name}, {many['link']}: {one['frames']} frames on one {one['device']} {alone:.3f} s, "
                    f"{many['frames']} on {many['ranks']} {together:.3f} s: {alone / together:.3f}"
                )
    return lines


def main(args: argparse.Namespace) -> None:
    if args.read:
        runs = [run for path in args.read for run in json.loads(path.read_text())["runs"]]
        print("\n".join([*map(report, runs), *weak_scaling(runs)]))
        if args.predict:
            print("\n" + prediction_report(predictions(runs, read_profile(args.predict))))
        if args.plot:
            draw(runs, args.plot)
        return
    start_distributed()
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    sizes = tiny_config() if args.tiny else model_config(args.layers)
    keeps = not (args.gather_frozen or args.largest)
    strategies = args.strategies.split(",")
    runner = Runner(args.stage, sizes, strategies, args.zero, keeps, not args.gather_trained, args.gradients)
    first = dist.get_rank() == 0
    device = torch.cuda.get_device_name() if runner.cuda else "CPU"
    common = {
        "device": device,
        "torch": torch.__version__,
        "ranks": runner.ranks,
        "stage": args.stage,
        "gradients": args.gradients,
        "kept": runner.kept,
        "kept_trained": runner.kept_trained,
    }
    done: list[dict[str, Any]] = []

    def save(run: dict[str, Any]) -> None:
        if first:
            runs = [*done, {**common, "link": args.link, **run}]
            args.output.write_text(json.dumps({"runs": runs}, indent=1))

    for frames, tiles, text in works(args.work, args.largest):
        try:
            run = measure(runner, (frames, tiles, text), args.seconds, args.rounds, not args.no_profile, save)
        except torch.cuda.OutOfMemoryError:
            # The other ranks wait in a collective; only leaving ends the run. What was measured is written.
            print(f"rank {dist.get_rank()}: {frames}:{tiles}:{text} does not fit", flush=True)
            os._exit(3)
        done.append({**common, "link": args.link, **run})
        if first:
            print(report(done[-1]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert args is not None
    main(args)
