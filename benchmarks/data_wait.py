"""How long a training run waits for its data: the finetune command over real films, at Llama-3.2-11B-Vision's sizes.

    python benchmarks/data_wait.py --num_gpus 2 --output FILE.json

Films of 1280 x 720 with a key frame every 250 are made, a model of the published sizes with random weights is saved,
and ``ds-lvxattn finetune`` trains on rows of one film each, ``--frames`` frames at equal parts of it. The figure is
``data_wait_s`` over ``step_time_s`` of ``metrics.jsonl``, summed over the steps after the first three: of those, one
waits for its film to be indexed and others warm kernels up. ``--tiny`` tries the command with a small model.

The file is written again after every step, with what there is: the phases of the start with their times, and the
steps. The run is ended after its last step, since its checkpoint and its export, 65 GB of the whole model, say nothing
of data, or when ``--seconds`` of the whole command are over. Its strategy is set, so that no machine is measured first.
Films and model are left in ``--folder``, where a later call finds them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import torch
from decoding import make_film, processors
from full_size import IMAGE_SIZE, model_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MllamaConfig, MllamaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from ds_lvxattn.needle.small_models import Scale, mllama_config

KEY_EVERY = 250
WARM_UP = 3  # steps that are not counted
BEGAN = time.perf_counter()
SPECIAL = ("<|begin_of_text|>", "<|eot_id|>", "<|image|>")
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|eot_id|>' }}{% endfor %}"


def save_model(folder: Path, sizes: MllamaConfig) -> None:
    """Random weights, a tokenizer of bytes and the image processor, as a published model has them."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:],
    )
    tokenizer.chat_template = TEMPLATE
    sizes.image_token_index = tokenizer.convert_tokens_to_ids(SPECIAL[2])
    sizes.text_config.vocab_size = max(sizes.text_config.vocab_size, len(tokenizer))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = MllamaForConditionalGeneration(sizes)
    torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):  # as after some training: at 0 the cross-attention would not count
            parameter.data.fill_(0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = sizes.vision_config.image_size
    MllamaImageProcessorPil(size={"height": side, "width": side}, max_image_tiles=4).save_pretrained(folder)


def write_rows(folder: Path, films: list[Path], rows: int, text: int) -> Path:
    """``rows`` conversations over the films in turn, of about ``text`` tokens each."""
    data = folder / "rows.jsonl"
    question = "What happens in this film, and in which order? "
    answer = "First one thing happens, and then another. " * 4
    filled = (question * (text // len(question)))[: text - len(answer)]
    lines = [
        {"video": film.name, "question": filled, "answer": answer} for film in (films * (rows // len(films) + 1))[:rows]
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data


def ds_config(frames: int, ranks: int, steps: int, on_gpu: bool) -> dict[str, object]:
    return {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000,
        "bf16": {"enabled": on_gpu},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "sequence_parallel_size": ranks,
        "sequence_parallel": {"strategy": "lv_xattn", "recompute": "layer"},
        "finetuning": {"steps": steps, "frames": frames, "eval_examples": 0, "trainable": "default"},
    }


class Run:
    """The command, watched: its lines with the time that has passed, its phases, and its metrics as they come.

    Attributes:
        phases: what ``finetune`` began between steps, and when, in seconds of this command.
        steps: the lines of ``metrics.jsonl`` so far.
    """

    def __init__(self, command: list[str], metrics: Path) -> None:
        self.metrics = metrics
        self.phases: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            command, env={"WANDB_MODE": "disabled", **os.environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._tell, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _tell(self, lines: IO[str]) -> None:
        for line in lines:
            say(line.rstrip())
            if found := re.fullmatch(r"\d\d:\d\d:\d\d  (.+)", line.rstrip()):
                self.phases.append({"phase": found[1], "began_s": seconds_so_far()})

    def follow(self, steps: int, seconds: float, note: Callable[[Run], None]) -> None:
        """Until ``steps`` are done, the run ends, or ``seconds`` of this command are over; ``note`` what comes."""
        known = 0
        while True:
            ended = self.process.poll() is not None  # before the last look, so that it sees all
            lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
            new = [json.loads(line) for line in lines[len(self.steps) :] if line.endswith("\n")]
            for step in new:
                self.steps.append(step)
                say("step {step}: {step_time_s:.3f} s, of which {data_wait_s:.3f} s for data".format(**step))
            if known != len(self.phases) + len(self.steps):
                known = len(self.phases) + len(self.steps)
                note(self)
            if ended or len(self.steps) >= steps or seconds_so_far() > seconds:
                return
            time.sleep(0.2)

    def end(self) -> None:
        """End the launcher and its ranks, and read what they said to the end."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, number)
                self.process.wait(15)
        self._reader.join(15)


def seconds_so_far() -> float:
    return round(time.perf_counter() - BEGAN, 1)


def say(text: str) -> None:
    print(f"{seconds_so_far():7.1f} s  {text}", flush=True)


def make_films(films: list[Path], length: int) -> None:
    """Films of one content: what is known of a film is kept by its path."""
    for film in films:
        if not film.exists():
            partial = film.with_name(f"partial-{film.name}")
            if film is films[0]:
                make_film(partial, length, KEY_EVERY)
            else:
                shutil.copyfile(films[0], partial)
            partial.rename(film)


def figures_of(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the steps after those that warm up; empty without any."""
    counted = steps[WARM_UP:]
    if not counted:
        return {}
    waited, took = sum(s["data_wait_s"] for s in counted), sum(s["step_time_s"] for s in counted)
    return {
        "steps": len(counted),
        "step_s": statistics.median(s["step_time_s"] for s in counted),
        "longest_wait_s": max(s["data_wait_s"] for s in counted),
        "data_wait": waited / took,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_gpus", type=int, default=2, help="on one of 80 GB, give --layers 20 (%(default)s)")
    parser.add_argument("--frames", type=int, default=24, help="of a row, for each GPU (%(default)s)")
    parser.add_argument("--text", type=int, default=384, help="tokens of a row (%(default)s)")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--films", type=int, default=4)
    parser.add_argument("--length", type=int, default=7200, help="frames of a film (%(default)s)")
    parser.add_argument("--layers", type=int, default=40, help="text layers, of which every fifth is cross-attention")
    parser.add_argument("--seconds", type=float, default=240, help="of the whole command, at most (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where films, model and run go; by default a temporary folder")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the command")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run, a session of its own, ends with this
    with tempfile.TemporaryDirectory() as made:
        measure(args, args.folder or Path(made))


def measure(args: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    films = [folder / f"film{args.length}-{number}.mp4" for number in range(args.films)]
    making = get_context("spawn").Process(target=make_films, args=(films, args.length))
    making.start()
    model = folder / ("model-tiny" if args.tiny else f"model-{args.layers}")
    if not (model / "config.json").exists():
        partial = folder / "partial-model"
        save_model(partial, mllama_config(Scale(), tiles=4) if args.tiny else model_config(args.layers))
        partial.rename(model)
        torch.cuda.empty_cache()
    say("the model is there")
    making.join()
    if making.exitcode:
        sys.exit("no films")
    say("the films are there")
    data = write_rows(folder, films, args.steps + 1, args.text)
    config, out = folder / "ds_config.json", folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    frames = args.frames * args.num_gpus
    config.write_text(json.dumps(ds_config(frames, args.num_gpus, args.steps, torch.cuda.is_available())))
    command = [
        sys.executable, "-m", "ds_lvxattn.cli", "finetune", "--num_gpus", str(args.num_gpus),
        "--ds_config", str(config), "--model", str(model), "--data", str(data),
        "--steps", str(args.steps), "--output_dir", str(out),
    ]  # fmt: skip
    facts = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "gpus": args.num_gpus,
        **processors(),
        "frames": frames,
        "image_size": IMAGE_SIZE,
        "layers": args.layers,
    }

    def note(run: Run) -> None:
        each = [{key: step[key] for key in ("step", "step_time_s", "data_wait_s")} for step in run.steps]
        found = {**facts, **figures_of(run.steps), "phases": run.phases, "each_step": each}
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")

    say("starting the run")
    run = Run(command, out / "metrics.jsonl")
    try:
        run.follow(args.steps, args.seconds, note)
    finally:
        run.end()
        note(run)
    print(json.dumps({**facts, **figures_of(run.steps)}, indent=1))
    if len(run.steps) < args.steps:
        sys.exit(f"{len(run.steps)} of {args.steps} steps; the run ended with code {run.process.returncode}")


if __name__ == "__main__":
    main()
