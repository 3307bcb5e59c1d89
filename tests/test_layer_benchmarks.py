"""The benchmarks of one layer on several ranks: that they run in parts, and what they make of times."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from ds_lvxattn.exchange.comm import communicator
from tests.support.distributed import run

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)  # as where their scripts are started
import scaling  # noqa: E402
import two_levels  # noqa: E402


def two_nodes_in_two_parts(output: Path) -> None:
    comm = communicator(dist.group.WORLD)
    comm.host_ranks = 2  # as two hosts would have it
    try:
        two_levels.main(["--output", str(output), "--cases", "4", "--profile", "cpu"])
        two_levels.main(["--output", str(output), "--cases", "7", "--profile", str(output)])
    finally:
        comm.host_ranks = None
        comm.node_size = comm.ranks


@pytest.mark.slow
def test_modes_on_two_nodes_add_to_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "two_levels.json"
    run(4, two_nodes_in_two_parts, output)
    about, cases = two_levels.read(output)
    assert (about["ranks"], about["node_size"]) == (4, 2)
    assert len(cases) == 2 and cases[1].shape.endswith("causal")
    for case in cases:
        modes = {result.mode: result for result in case.results}
        assert {"lv_xattn/gather", "lv_xattn/two_level", "hybrid/kv_gather", "ulysses/auto"} <= set(modes)
        assert case.auto in modes and case.over_fastest >= 1 and case.floor_ms
        assert 0 < modes["lv_xattn/two_level"].between_mib < modes["lv_xattn/gather"].between_mib
    for what, said in (("--read", "auto within 5% of the fastest in"), ("--predict", "floor")):
        two_levels.main([what, str(output)])
        assert said in capsys.readouterr().out


def test_cases_by_number() -> None:
    assert len(set(two_levels.CASES)) == 20
    assert two_levels.numbers("0,3,5-7", 20) == [0, 3, 5, 6, 7]
    with pytest.raises(SystemExit, match="from 0 to 19"):
        two_levels.numbers("20", 20)


def scaling_in_two_parts(output: Path) -> list[int]:
    arguments = ["--seconds", "0", "--ranks", "2", "--output", str(output)]
    counts = []
    with mock.patch.object(scaling, "HEADS", scaling.HEADS[-1:]):
        for limit in ("0", "600", "600"):
            scaling.main([*arguments, "--limit", limit])
            counts.append(len(scaling.read(output)[0]) if output.exists() else 0)
            dist.barrier()
    return counts


@pytest.mark.slow
def test_scaling_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scaling.json"
    counts = run(2, scaling_in_two_parts, output)[0]
    assert counts[0] == 0 < counts[1] == counts[2]
    scaling.main(["--compare", str(output)])
    assert "2 ranks: " in capsys.readouterr().out
