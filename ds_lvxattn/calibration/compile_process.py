"""A process that makes the calls it is told, for what they compile: a line of JSON each, answered by what failed."""

from __future__ import annotations

import json
import os
import sys
from typing import IO

import torch

from ds_lvxattn.calibration.extent import HeadLayout
from ds_lvxattn.calibration.kernels import Shape, compile_calls


def serve(device: torch.device, dtype: torch.dtype, items: IO[str], answers: IO[str]) -> None:
    """Answer each of ``items``, a ``compile_ahead.Item`` as JSON, once its calls are made: by an error, or nothing."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for line in items:
        kernel, backward, shapes = json.loads(line)
        trouble = ""
        try:
            for layout, *rest in shapes:
                compile_calls(Shape(HeadLayout(*layout), *rest), kernel, backward, device, dtype)
        except Exception as error:  # whoever measures meets it again, and says more
            trouble = f"{type(error).__name__}: {error}"
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the processes share the device
        answers.write(json.dumps(trouble) + "\n")
        answers.flush()


def main(device: str, dtype: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers write where they like
    serve(torch.device(device), getattr(torch, dtype), sys.stdin, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
