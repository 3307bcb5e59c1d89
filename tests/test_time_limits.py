"""What hangs ends by a time limit, with the place where it hangs; what is only slow does not."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch.distributed as dist

from tests.support import deadline
from tests.support.distributed import run
from tests.support.processes import finish


def wait_for_a_rank_that_has_left() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


@pytest.mark.slow
def test_ranks_that_hang() -> None:
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0\] of 2.*rank 0:.*in wait_for_a_rank_that_has_left.*rank 1:"):
        run(2, wait_for_a_rank_that_has_left, timeout=1)
    assert run(2, os.getpid)


def test_a_process_that_hangs() -> None:
    with pytest.raises(TimeoutError, match="in hang"):
        finish([sys.executable, "-c", "import time\ndef hang():\n    time.sleep(1000)\nhang()"], seconds=2)


def test_time_without_a_processor_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, starved = [0.0], {1: 5.0, 2: 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(deadline, "_starved_seconds", lambda process: starved[process])
    limit = deadline.Deadline(3.0)
    assert not limit.passed([1, 2])
    clock[0], starved[1], starved[2] = 100.0, 104.5, 50.0
    assert not limit.passed([1, 2]) and limit.left == 2.5
    clock[0] = 102.5
    assert limit.passed([1, 2])
