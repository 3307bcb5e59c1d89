"""The parts that faults meet: files, locks, the launcher, the log, wandb, secrets."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from safetensors.torch import save_file

from ds_lvxattn.errors import ConfigError, RunError
from ds_lvxattn.training import rank, run_log, runner
from ds_lvxattn.training.build_locks import OwnedBaton, await_builds, remove_if_left
from ds_lvxattn.training.check_data import encode_for
from ds_lvxattn.training.checkpoint import CheckpointFiles, export
from ds_lvxattn.training.compare.report import unfinished
from ds_lvxattn.training.divergence import FiniteLoss
from ds_lvxattn.training.files import Digest, replace_folder, replace_text, storage_problem, writing
from ds_lvxattn.training.loading import at_revision, load_model
from ds_lvxattn.training.run_folder import RunFolder
from ds_lvxattn.training.runner import Launcher
from ds_lvxattn.training.secrets import without_secrets
from ds_lvxattn.training.trackers import start_tracker
from ds_lvxattn.training.watchdog import Watchdog

ROOT = Path(__file__).parents[2]


# Files


def test_a_text_is_replaced_or_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    replace_text(file, "old")
    replace_text(file, "new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(RunError, match=r"cannot be written"):
        replace_text(tmp_path / "gone" / "eval.json", "text")


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("new", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "model").rename(tmp_path / "new")
    for stray in ("model", "model.old"):
        (tmp_path / stray).write_text("a file where a folder is meant to be")
    replace_folder(tmp_path / "new", tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_an_export_is_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    folder = export(tmp_path, "model", write)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"), (errno.EIO, "disk")],
)
def test_errors_of_the_file_system_are_named(number: int, words: str) -> None:
    message = f"checkpoint cannot be written: .*{words}.*{errno.errorcode[number]}"
    with pytest.raises(RunError, match=message), writing("checkpoint"):
        raise OSError(number, os.strerror(number))
    assert storage_problem(OSError("odd"), "file")


def test_a_checkpoint_file_is_digested_read_back_and_free_of_secrets(tmp_path: Path) -> None:
    files, path = CheckpointFiles(True, lambda: None), tmp_path / "shard.pt"
    files.save({"weight": torch.arange(5.0), "ds_config": {"comet": {"api_key": "secret!"}}}, str(path))
    assert files.written == {path: Digest.of(path)} and files.problem is None
    loaded = files.load(str(path))
    assert torch.equal(loaded["weight"], torch.arange(5.0))
    assert loaded["ds_config"]["comet"]["api_key"] == "(left out)"
    assert b"secret!" not in path.read_bytes()


def test_a_checkpoint_file_that_runs_code_is_not_read(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "shard.pt"
    torch.save({"weight": Harm()}, path)
    with pytest.raises(pickle.UnpicklingError):
        CheckpointFiles(True, lambda: None).load(str(path))
    assert not (tmp_path / "harm").exists()


# The folder of a run


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match=f"in use by another run .process {os.getpid()} on"):
        RunFolder(tmp_path / "run")
    first.close()
    RunFolder(tmp_path / "run").close()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output_dir .*file/run cannot be written"):
        RunFolder(tmp_path / "file" / "run")


def test_a_run_is_finished_with_its_last_step_and_its_model(tmp_path: Path) -> None:
    assert unfinished(tmp_path, 2) is not None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert "step 2 of 2" in str(unfinished(tmp_path, 2))
    (tmp_path / "model").mkdir()
    assert unfinished(tmp_path, 2) is None and unfinished(tmp_path, 3) is not None


# The log


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def log_of(folder: Path, done: int | None) -> run_log.RunLog:
    return run_log.RunLog(folder, 0, 9, {}, done)


def test_metrics_count_steps_not_lines(tmp_path: Path, silent: None) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step}) for step in (2, 1, 1, 3, 4)]
    file.write_text("\n".join([*lines, '{"step": 5, "lo']))
    log_of(tmp_path, 3).close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_a_new_run_keeps_the_metrics_of_an_older_one(tmp_path: Path, silent: None) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    log_of(tmp_path, None).close()
    [kept] = tmp_path.glob("metrics-*.jsonl")
    assert kept.read_text() == '{"step": 1}\n' and (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_diverged_run_ends_and_names_the_checkpoint() -> None:
    finite = FiniteLoss(lambda: "the newest whole checkpoint is step-2", steps=3)
    nan = float("nan")
    for step, loss in enumerate((1.0, nan, nan, 1.0, nan, nan), 1):
        finite.note(step, loss, 1.0)
        assert finite.finite == (loss == 1.0)
    with pytest.raises(RunError, match="since step 5.*step-2"):
        finite.note(7, 1.0, float("inf"))


# wandb


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("banana", None),
        (None, wandb.errors.AuthenticationError("API key must have 40+ characters, has 5.")),
        (None, ValueError("base_url\n  Input should be a valid URL")),
    ],
    ids=["mode", "key", "address"],
)
def test_whatever_is_wrong_with_wandb_the_run_is_recorded_offline(
    mode: str | None,
    error: Exception | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    modes: list[str] = []

    class Recorded:
        def __init__(self, mode: str, **arguments: Any) -> None:
            modes.append(mode)
            self.arguments = arguments

    def login(prompt: bool) -> bool:
        assert not prompt and error is not None
        raise error

    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(wandb, "init", Recorded)
    monkeypatch.setattr(wandb, "login", login)
    with caplog.at_level(logging.WARNING):
        started: Any = start_tracker("wandb", tmp_path, {"comet": {"api_key": "secret!"}, "lr": 1})
    assert modes == ["offline"] and caplog.records
    assert started._tracker._run.arguments["config"] == {"comet": {"api_key": "(left out)"}, "lr": 1}


def test_wandb_that_does_not_start_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(mode: str, **arguments: Any) -> str:
        if mode == "disabled":
            return mode
        raise wandb.errors.CommError("no server")

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", broken)
    started: Any = start_tracker("wandb", tmp_path, {})
    assert started._tracker._run == "disabled"


def test_secrets_by_name_and_in_addresses() -> None:
    config = {
        "comet": {"api_key": "a", "project": "p"},
        "hub": [{"token": "b"}, "https://user:c@host/data"],
        "max_text_tokens": 5, "image_token": "", "password": None,
    }  # fmt: skip
    assert without_secrets(config) == {
        "comet": {"api_key": "(left out)", "project": "p"},
        "hub": [{"token": "(left out)"}, "https://(left out)@host/data"],
        "max_text_tokens": 5, "image_token": "", "password": None,
    }  # fmt: skip


# Trust


def test_a_model_that_brings_code_along_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "unheard-of", "auto_map": {"AutoConfig": "configuration.Harm"}})
    )
    (tmp_path / "configuration.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    with pytest.raises(ConfigError, match="'unheard-of', code that its repository"):
        load_model(str(tmp_path), {}, 0)


def test_a_revision_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **what: Any) -> str:
        asked.update(what, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("ds_lvxattn.training.loading.snapshot_download", download)
    assert at_revision("org/name@0a1b") == str(tmp_path)
    assert (asked["repository"], asked["revision"]) == ("org/name", "0a1b")
    with pytest.raises(ConfigError, match="org/name@0a1b|Unrecognized model"):  # the folder is empty
        encode_for("org/name@0a1b")
    assert "*.safetensors" in asked["ignore_patterns"]
    (tmp_path / "a@b").mkdir()
    assert at_revision(str(tmp_path / "a@b")) == str(tmp_path / "a@b") and at_revision("org/name") == "org/name"


# Processes


def test_a_lock_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.write_text("")
    os.utime(lock, (1, 1))
    os.utime(lock.parent, (1, 1))
    await_builds(tmp_path, idle=60.0)
    assert not lock.exists()


HOLD = """
import os, sys
from ds_lvxattn.training.build_locks import OwnedBaton
assert OwnedBaton(sys.argv[1]).try_acquire()
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_the_lock_of_a_process_that_was_killed_is_removed_at_once(tmp_path: Path) -> None:
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for wait in (lambda: await_builds(tmp_path, idle=1e9), OwnedBaton(str(lock)).wait):
        killed = subprocess.run([sys.executable, "-c", HOLD, str(lock)], env=environment, check=False)
        assert killed.returncode == -signal.SIGKILL and lock.exists()
        wait()
        assert not lock.exists()
    mine = OwnedBaton(str(lock))
    assert mine.try_acquire() and not remove_if_left(lock)
    mine.release()


def test_a_launcher_that_is_killed_is_a_failure() -> None:
    """DeepSpeed's runner ends with the code of its launcher where that is above 0."""
    launcher = Launcher([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert launcher.wait() == launcher.returncode == 128 + signal.SIGKILL
    assert Launcher([sys.executable, "-c", "raise SystemExit(2)"]).wait() == 2


def test_ctrl_c_is_one_line_and_a_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(watchdog: Watchdog) -> None:
        watchdog.enter("step 3")
        raise KeyboardInterrupt

    monkeypatch.setattr(rank, "_leave", sys.exit)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="130"):
        rank.run_rank("finetune", interrupted)
    assert capsys.readouterr().err == "finetune: interrupted in the phase 'step 3'\n"


def test_a_launcher_that_an_interrupt_left_out_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, wait, calls = Launcher(["sleep", "99"]), subprocess.Popen.wait, []

    def interrupted_once(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        calls.append(timeout)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(runner, "SECONDS_TO_END", 0.1)
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted_once)
    assert launcher.wait() == launcher.returncode == 128 + signal.SIGINT
    assert calls == [None, 0.1, None]


# A rank below the two processes of ``deepspeed``, which are told by their command lines.
RANK = """
import os, time
from ds_lvxattn.training.launcher import follow_launcher
follow_launcher()
print(os.getpid(), flush=True)
time.sleep(99)
"""
PARENT = "import subprocess, sys; raise SystemExit(subprocess.call([sys.executable, '-c', *sys.argv[2:]]))"


@pytest.mark.parametrize("killed", ["the launcher", "the command"])
def test_ranks_end_with_their_launcher(killed: str) -> None:
    command = [sys.executable, "-c", PARENT, "deepspeed.launcher.runner", PARENT, "deepspeed.launcher.launch", RANK]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    try:
        assert process.stdout is not None
        rank = int(process.stdout.readline())
        launcher = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(launcher if killed == "the launcher" else process.pid, signal.SIGKILL)
        assert process.stdout.read() == ""  # the rank has ended: nobody holds its output any more
        process.wait()
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
