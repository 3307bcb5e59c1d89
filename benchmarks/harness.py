"""What the benchmarks of the kernels share: timing, the row of a table, the table, and the command around them."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Written before every timed call: more than any L2 holds, and long enough for the host to queue the call meanwhile.
FLUSH_BYTES = 1 << 29
SECONDS = 0.1


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: what ran.
        baseline: what it is compared with.
        milliseconds, baseline_milliseconds: of one call.
        rate: TFLOP/s of attention, TB/s of operators that only move memory.
        ratio: baseline over own time; above 1 is faster than the baseline.
        target: the ratio to reach.
    """

    name: str
    baseline: str
    milliseconds: float
    baseline_milliseconds: float
    rate: float
    ratio: float
    target: float


def time_calls(*calls: Callable[[], object]) -> list[float]:
    """Median seconds that each call takes on the device, with a cold L2, at the clock that it settles to.

    The chip's clock follows the power that a call draws, and drifts: each call runs for ``SECONDS`` before it is
    timed for as long, and the calls take turns twice.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def times(call: Callable[[], object], count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    measured: list[list[float]] = [[] for _ in calls]
    for _ in range(2):
        for call, seconds in zip(calls, measured, strict=True):
            times(call, 1)
            count = max(5, min(50, math.ceil(SECONDS / times(call, 2)[1])))
            times(call, count)
            seconds += times(call, count)
    return [statistics.median(seconds) for seconds in measured]


def memory_row(name: str, call: Callable[[], object], moved: int, target: float) -> Row:
    """``call``, which has to read and write ``moved`` bytes together, against a device-to-device copy of as many."""
    source = torch.randn(moved // 8, device="cuda")
    copy = torch.empty_like(source)
    seconds, baseline = time_calls(call, lambda: copy.copy_(source))
    return Row(name, "copy", seconds * 1e3, baseline * 1e3, moved / seconds / 1e12, baseline / seconds, target)


def print_table(rows: Sequence[Row]) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'':44} {'ms':>9} {'T/s':>7} {'baseline':>9} {'ratio':>6} target")
    for row in rows:
        verdict = "" if round(row.ratio, 2) >= row.target else " missed"
        print(f"{row.name:44} {row.milliseconds:9.3f} {row.rate:7.1f} {row.baseline:>9} {row.ratio:6.2f} "
              f"{row.target:4.2f}{verdict}")  # fmt: skip


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark's command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    return parser


def write_json(output: Path | None, rows: Sequence[Row], **more: object) -> None:
    if output is not None:
        device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        output.write_text(json.dumps({**device, "rows": [asdict(row) for row in rows], **more}, indent=1))


def main(doc: str | None, measure: Callable[[], list[Row]]) -> None:
    """The command of one benchmark: table, and JSON where asked for."""
    args = arguments(doc).parse_args()
    rows = measure()
    write_json(args.output, rows)
    print_table(rows)
