"""The scripts of ``examples/`` as their own text says to run them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, finish

TORCHRUN = Path(sys.executable).with_name("torchrun")


@pytest.mark.slow
def test_sp_attention() -> None:
    example = REPOSITORY / "examples" / "sp_attention.py"
    assert len(example.read_text().splitlines()) <= 30
    done = finish(
        [TORCHRUN, "--standalone", "--nproc_per_node", 2, example], CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"rank \d of 2: rows \[1, 8, 16, 64\], off by (\S+)", done.stdout)
    assert len(differences) == 2 and all(float(difference) < 1e-5 for difference in differences)
