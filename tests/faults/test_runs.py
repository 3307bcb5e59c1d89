"""Runs that are hurt and resumed: what an unbroken run gives, bit for bit, and ranks that leave in time."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from benchmarks.campaign import judge_end, judge_whole
from benchmarks.faults.damage import DAMAGES
from benchmarks.faults.ranks import TIMEOUT, Ended, Fault, ds_config, left_in, run, write_config


def train(folder: Path, *words: object, stage: int = 2, fault: Fault | None = None, **finetuning: object) -> Ended:
    config = write_config(folder.with_name(f"{folder.name}-config"), ds_config(stage, **finetuning))
    logs = folder.with_name(f"{folder.name}-logs")
    return run(["--ds_config", config, "--output_dir", folder, *words], logs, fault)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    ended = train(folder)
    assert ended.codes == (0, 0), ended.text
    return folder


FAULTS = [
    Fault("kill", 0, "saving the checkpoint of step 4", 0.01),
    Fault("raise", 1, "evaluating"),
    Fault("ENOSPC", 1, "saving the checkpoint of step 4", 10_000),
    Fault("ENOSPC", 0, "evaluating"),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kind} in {fault.phase}")
def test_a_run_that_is_hurt_goes_on_as_if_it_had_not_been(fault: Fault, whole: Path, tmp_path: Path) -> None:
    folder, expected = tmp_path / "hurt", left_in(whole)
    ended = train(folder, fault=fault)
    left = left_in(folder)
    assert judge_end(fault, ended, left, expected) == ""
    assert set(ended.codes) != {0}
    assert left.checkpoints == (("step-4", "step-2") if fault.phase in ("evaluating", "exporting") else ("step-2",))
    assert judge_whole(train(folder, "--resume"), left_in(folder), expected) == ""


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_others_leave(tmp_path: Path) -> None:
    ended = train(tmp_path / "run", fault=Fault("stop", 1, "step 3"), timeout_s=TIMEOUT)
    assert ended.codes[0] == 1 and "rank 1 gives no sign of life" in ended.output[0], ended.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flip", "not named", "metrics torn"])
def test_a_damaged_run_is_resumed_from_what_is_whole(name: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    DAMAGES[name](random.Random(name), folder)
    passed = "step-4" not in left_in(folder, torn=True).checkpoints
    ended = train(folder, "--resume")
    assert judge_whole(ended, left_in(folder), left_in(whole)) == ""
    assert passed == ("passing over the checkpoint step-4" in ended.text)


@pytest.mark.slow
def test_nothing_is_lost_where_no_checkpoint_is_whole(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    for shard in folder.glob("checkpoints/step-*/mp_rank_00_model_states.pt"):
        shard.write_bytes(shard.read_bytes()[:-1])
    ended = train(folder, "--resume")
    assert ended.codes == (2, 2) and "Traceback" not in ended.text
    assert all("holds no checkpoint that is whole" in output for output in ended.output)
    assert left_in(folder).losses == left_in(whole).losses and left_in(folder).model == left_in(whole).model


@pytest.mark.slow
def test_a_run_that_diverges_ends_and_names_its_last_checkpoint(tmp_path: Path) -> None:
    settings = ds_config(save_every=1)
    settings["optimizer"]["params"]["lr"] = 1e30
    folder = tmp_path / "run"
    ended = run(["--ds_config", write_config(tmp_path, settings), "--output_dir", folder], tmp_path / "logs")
    assert ended.codes == (1, 1) and "Traceback" not in ended.text, ended.text
    left = left_in(folder)
    assert left.model is None and left.checkpoints
    assert all("the run has diverged; the newest whole checkpoint is" in output for output in ended.output)
    assert "no checkpoint of step 3: its loss or gradients are not finite" in ended.text


@pytest.mark.slow
def test_a_config_is_refused_alike_on_all_ranks(tmp_path: Path) -> None:
    config = write_config(tmp_path, {**ds_config(), "gradient_cliping": 1.0})
    ended = run(["--ds_config", config, "--output_dir", tmp_path / "run"], tmp_path / "logs")
    assert ended.codes == (2, 2) and not (tmp_path / "run").exists()
    messages = {next(line for line in output.splitlines() if "finetune:" in line) for output in ended.output}
    assert len(messages) == 1 and "did you mean 'gradient_clipping'?" in messages.pop()


@pytest.mark.slow
def test_secrets_stay_out_of_checkpoints(tmp_path: Path) -> None:
    folder, secret = tmp_path / "run", "0123456789abcdef"
    config = write_config(tmp_path, {**ds_config(), "comet": {"enabled": False, "api_key": secret}})
    ended = run(["--ds_config", config, "--output_dir", folder, "--steps", 2], tmp_path / "logs")
    assert ended.codes == (0, 0), ended.text
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files and not any(secret.encode() in path.read_bytes() for path in files)
    assert json.loads((folder / "checkpoints" / "step-2" / "run.json").read_text())["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics flipped", "list flipped"])
def test_changed_metrics_and_lists_are_found_and_kept(name: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    path = folder / ("metrics.jsonl" if name == "metrics flipped" else "checkpoints/step-4/run.json")
    text = path.read_text()
    # A number is another number: nothing that breaks the syntax.
    changed = (
        text.replace('"loss": 2', '"loss": 3', 1) if name == "metrics flipped" else text.replace(": 2,", ": 1,", 1)
    )
    assert changed != text
    path.write_text(changed)
    ended = train(folder, "--resume")
    assert ended.codes == (0, 0), ended.text
    if name == "metrics flipped":
        assert "metrics.jsonl is not what it was at step 4" in ended.text
        assert [kept.read_text() for kept in folder.glob("metrics-*.jsonl")] == [changed]
    else:
        assert "passing over the checkpoint step-4: run.json is damaged" in ended.text
        assert left_in(folder) == left_in(whole)
