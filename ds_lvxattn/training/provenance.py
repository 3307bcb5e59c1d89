"""``run.json``: what a run was started with, so that it can be started again."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ds_lvxattn.training.files import replace_text
from ds_lvxattn.training.secrets import without_secrets

FILE = "run.json"
PACKAGES = (
    "ds-lvxattn", "torch", "deepspeed", "transformers", "accelerate", "datasets", "peft", "triton", "bitsandbytes",
    "av", "numpy",
)  # fmt: skip


def write_provenance(output_dir: Path, ds_config: dict[str, Any], seed: int, steps: int, ranks: int) -> None:
    """Write ``run.json``: command, seed, steps, ranks, device, versions, and the config with its overrides."""
    found = {
        "command": sys.argv,
        "seed": seed,
        "steps": steps,
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **_versions()},
        "ds_config": without_secrets(ds_config),
    }
    replace_text(output_dir / FILE, json.dumps(found, indent=2) + "\n")


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
