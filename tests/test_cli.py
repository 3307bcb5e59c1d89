"""The command ``ds-lvxattn``: what it starts, what it tells, and that the built wheel holds all it needs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ds_lvxattn import cli
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training import runner
from ds_lvxattn.training.launch import free_port, launch_environment
from tests.support.processes import REPOSITORY, finish

SETTINGS = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"ds-lvxattn {name} " in told for name in cli.COMMANDS)  # with an example of each
    assert cli.main(["finetun"]) == 2
    assert "no command 'finetun'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_explains_itself_without_starting_ranks(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and "usage:" in told and f"ds-lvxattn {name} " in told


def test_ranks_are_started_by_the_launcher_on_a_free_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []
    monkeypatch.setattr(cli.os, "execvpe", lambda file, words, environment: started.append(words) or sys.exit(0))
    monkeypatch.delenv("RANK", raising=False)
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"sequence_parallel_size": 2}))
    rest = ["--ds_config", str(config), "sequence_parallel_size=4", "--steps", "3"]
    for options in ([], ["--num_gpus", "3", "--master_port", "7777"]):
        with pytest.raises(SystemExit):
            cli.main(["finetune", *options, *rest])
    free, given = started
    assert free[1:5] == ["-m", "ds_lvxattn.training.runner", "--num_gpus", "4"]
    assert free[5] == "--master_port" and free[7:] == ["--module", "ds_lvxattn.training.finetune", *rest]
    assert given[3:7] == ["--num_gpus", "3", "--master_port", "7777"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hostfile", "none"], "--hostfile none: no such file"),
        (["--hostfile", __file__], "bad entry"),
        (["--num_gpus", "0"], "--num_gpus is 0; give at least 1"),
        (["--include", "elsewhere:0"], "elsewhere"),
    ],
)
def test_ranks_that_cannot_be_started_are_one_message(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner.subprocess, "Popen", subprocess.Popen)  # which it replaces
    monkeypatch.setattr(sys, "argv", ["runner", *options, "--module", "none"])
    assert runner.main() == 2
    assert re.search(f"^the ranks cannot be started: .*{re.escape(said)}", capsys.readouterr().err, re.MULTILINE)


def test_gpus_that_are_not_there_are_not_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    assert launch_environment()["DS_ACCELERATOR"] == "cpu"  # asked for, as in all tests
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES is '9'"):
        launch_environment()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launch_environment()["DS_ACCELERATOR"] == "cpu"


def alone() -> dict[str, str]:
    """What a launcher tells the only rank."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}


@pytest.mark.slow
def test_the_wheel_holds_all_that_the_commands_need(tmp_path: Path) -> None:
    """Built from the repository, and run from an empty folder with nothing of the repository on the path."""
    sources = tmp_path / "sources"  # a build leaves files behind
    shutil.copytree(REPOSITORY / "ds_lvxattn", sources / "ds_lvxattn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, sources)
    built = finish(
        [sys.executable, "-m", "pip", "wheel", sources, "--no-deps", "--no-build-isolation", "-w", tmp_path],
        cwd=tmp_path, PYTHONPATH=None,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert "ds_lvxattn/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "train/", "benchmarks")) for name in names)
    settings = SETTINGS | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    where = [sys.executable, "-c", "import ds_lvxattn; print(ds_lvxattn.__file__)"]
    assert str(installed) in finish(where, cwd=empty, **settings).stdout

    def command(*words: object, **rank: str) -> str:
        done = finish([sys.executable, "-m", "ds_lvxattn.cli", *words], cwd=empty, **settings, **rank)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    plan = command("plan", "--model", "Llama-3.2-11B-Vision", "--text", 512, "--frames", 64, "--gpus", 8, "--json")
    assert json.loads(plan)["choice"]
    config = REPOSITORY / "ds_configs" / "quickstart.json"
    command("finetune", "--ds_config", config, "--steps", 2, "--output_dir", "run", "finetuning.steps=2",
            "finetuning.eval_examples=0", "sequence_parallel.strategy=lv_xattn")  # fmt: skip
    assert len((empty / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    layers = json.loads((empty / "run" / "plan.json").read_text())
    assert {layer["strategy"] for layer in layers if layer["role"] != "local"} == {"lv_xattn"}
    # On the rank at hand, as under a launcher.
    said = command("generate", "--ds_config", config, "--model", "run/model", "--question", "which digit ?",
                   "--max_new_tokens", 2, **alone())  # fmt: skip
    assert said is not None
