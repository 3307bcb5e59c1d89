"""How long a training run waits for its data: the finetune command over real films, at Llama-3.2-11B-Vision's sizes.

    python benchmarks/data_wait.py --num_gpus 2 --output FILE.json

Films of 1280 x 720 with a key frame every 250 are made, a model of the published sizes with random weights is saved,
and ``ds-lvxattn finetune`` trains on rows of one film each, ``--frames`` frames at equal parts of it. The figure is
``data_wait_s`` over ``step_time_s`` of ``metrics.jsonl``, summed over the steps after the first three: of those, one
waits for its film to be indexed and others warm kernels up. ``--tiny`` tries the command with a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from decoding import make_film
from full_size import IMAGE_SIZE, model_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MllamaConfig, MllamaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from ds_lvxattn.needle.small_models import Scale, mllama_config

KEY_EVERY = 250
WARM_UP = 3  # steps that are not counted
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
        "sequence_parallel": {"strategy": "auto", "recompute": "layer"},
        "finetuning": {"steps": steps, "frames": frames, "eval_examples": 0, "trainable": "default"},
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
    parser.add_argument("--folder", type=Path, help="where films, model and run go; by default a temporary folder")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the command")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        films = [folder / f"film{number}.mp4" for number in range(args.films)]
        with ProcessPoolExecutor(min(args.films, os.cpu_count() or 1)) as pool:
            jobs = [pool.submit(make_film, film, args.length, KEY_EVERY) for film in films]
            save_model(folder / "model", mllama_config(Scale(), tiles=4) if args.tiny else model_config(args.layers))
            for job in jobs:
                job.result()
        data = write_rows(folder, films, args.steps + 1, args.text)
        config = folder / "ds_config.json"
        frames = args.frames * args.num_gpus
        config.write_text(json.dumps(ds_config(frames, args.num_gpus, args.steps, torch.cuda.is_available())))
        torch.cuda.empty_cache()
        command = [
            sys.executable, "-m", "ds_lvxattn.cli", "finetune", "--num_gpus", str(args.num_gpus),
            "--ds_config", str(config), "--model", str(folder / "model"), "--data", str(data),
            "--steps", str(args.steps), "--output_dir", str(folder / "run"),
        ]  # fmt: skip
        subprocess.run(command, check=True, env={"WANDB_MODE": "disabled", **os.environ})
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "data_wait_s" in line][WARM_UP:]
    waited, took = sum(s["data_wait_s"] for s in steps), sum(s["step_time_s"] for s in steps)
    figures = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "gpus": args.num_gpus,
        "cores": len(os.sched_getaffinity(0)),
        "frames": frames,
        "image_size": IMAGE_SIZE,
        "steps": len(steps),
        "step_s": statistics.median(s["step_time_s"] for s in steps),
        "longest_wait_s": max(s["data_wait_s"] for s in steps),
        "data_wait": waited / took,
    }
    print(json.dumps(figures, indent=1))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
