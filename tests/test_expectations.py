"""What people expect of a run: trackers, checkpoints that stay, an early end, epochs, generated answers, its origin."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_lvxattn.data.sample import IGNORE, Sample
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training import hub, trackers
from ds_lvxattn.training.answers import judge, question_and_answer
from ds_lvxattn.training.best import Best
from ds_lvxattn.training.run_settings import read_settings
from tests.support.distributed import run
from tests.support.hub import hub_server
from tests.support.processes import finish
from tests.support.tiny_model import ds_config
from tests.support.training import finetune, metrics_in, write_config, write_model


@pytest.mark.slow
def test_a_run_with_all_of_it(tmp_path: Path) -> None:
    """A learning rate at which the loss rises ends early; the best checkpoint stays with the last, and is exported."""
    pytest.importorskip("tensorboard")
    write_model(tmp_path / "model")
    config = ds_config(3, 2, 2, strategy="lv_xattn")
    config["optimizer"]["params"]["lr"] = 3.0
    file = write_config(
        tmp_path / "ds.json", config, trainable="all", steps=6, eval_examples=3, eval_every=1, save_every=1,
        keep_last=1, keep_best=True, patience=2, eval_new_tokens=3, report_to="tensorboard",
    )  # fmt: skip
    out = tmp_path / "out"
    words = ["--ds_config", str(file), "--model", str(tmp_path / "model"), "--output_dir", str(out), "--seed", "3"]
    assert run(2, finetune, words, timeout=300) == ["", ""]
    done, best = len(metrics_in(out)), json.loads((out / "best.json").read_text())
    assert (best["step"], best["since"]) == (done - 2, 2) and done < 6
    names = {path.name for path in (out / "checkpoints").glob("step-*")}
    assert names == {f"step-{best['step']}", f"step-{done}"}
    found = json.loads((out / "eval.json").read_text())
    assert found["generated"] == 3 and 0 <= found["exact"] <= found["contained"] <= 1
    assert list((out / "tensorboard").glob("events.*"))
    origin = json.loads((out / "run.json").read_text())
    assert (origin["seed"], origin["steps"], origin["ranks"]) == (3, 6, 2)
    assert {"torch", "deepspeed", "transformers", "python"} <= origin["versions"].keys()
    assert origin["ds_config"]["finetuning"]["patience"] == 2


def test_the_best_evaluation(tmp_path: Path) -> None:
    best = Best()
    losses = {2: 3.0, 4: 2.0, 6: float("nan"), 8: 2.0}
    assert [best.note(step, loss) for step, loss in losses.items()] == [True, True, False, False]
    assert (best.step, best.since) == (4, 2)
    best.write(tmp_path)
    assert Best.read(tmp_path, 8) == best
    assert Best.read(tmp_path, 3) == Best()  # resumed before it was found


def test_epochs_say_the_steps_and_the_schedule(tmp_path: Path) -> None:
    config = ds_config(2, 4, 4)
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}
    file = write_config(tmp_path / "ds.json", config, epochs=2.5)
    settings = read_settings(file, None, 0, 2)
    assert settings.steps_of(99) == 62  # of 4 samples, with a part of one at the end
    assert settings.ds_config["scheduler"]["params"]["warmup_num_steps"] == 3
    assert read_settings(file, 7, 0, 2).steps_of(99) == 7


@pytest.mark.parametrize(
    ("said", "wanted", "exact", "contained", "choice"),
    [
        ("Red.", "red", True, True, None),
        ("a red  car", "Red car", False, True, None),
        ("blue", "red", False, False, None),
        ("reduced", "red", False, False, None),
        ("B", "B", True, True, True),
        ("(b) the red one", "B.", False, True, True),
        ("Answer: C", "C", False, True, True),
        ("The best option is (D).", "D", False, True, True),
        ("A car", "B", False, False, False),
        ("Because of the rain", "B", False, False, False),
        ("A. a dog", "A. a dog", True, True, True),
    ],
)
def test_judging_an_answer(said: str, wanted: str, exact: bool, contained: bool, choice: bool | None) -> None:
    assert judge(said, wanted) == {"exact": exact, "contained": contained, "choice": choice}


def test_the_last_question_of_a_row() -> None:
    labels = [IGNORE, IGNORE, 7, IGNORE, IGNORE, 8, 9, IGNORE]
    found = question_and_answer(Sample(list(range(8)), labels))
    assert found is not None
    prompt, answer = found
    assert list(prompt.input_ids) == [0, 1, 2, 3, 4] and answer == [8, 9]
    assert question_and_answer(Sample([1, 2], [IGNORE, IGNORE])) is None


def test_settings_that_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, **finetuning: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            read_settings(write_config(tmp_path / "ds.json", ds_config(2, 4, 4), **finetuning), None, 0, 2)

    refused("'finetuning.report_to' is 'mlflow'", report_to="mlflow")
    refused("'finetuning.patience' is 2, and nothing is evaluated", patience=2)
    refused("'finetuning.keep_best' is True, and nothing is evaluated", keep_best=True, eval_every=5, eval_examples=0)
    refused("no repository", push_to_hub="a/b/c")
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: None)
    refused("there is no token", push_to_hub="somebody/model")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    refused("'finetuning.report_to' is 'trackio', which is not installed", report_to="trackio")
    assert isinstance(trackers.start_tracker(None, tmp_path, {}), trackers.Nowhere)


@pytest.mark.slow
def test_trackio_and_the_hub_get_a_run(tmp_path: Path) -> None:
    """By the command, offline and with a server of this machine: steps in trackio's files, both exports on the hub."""
    pytest.importorskip("trackio")
    model = write_model(tmp_path / "model")
    file = write_config(
        tmp_path / "ds.json", ds_config(2, 2, 2, size=1), eval_examples=0, report_to="trackio", push_to_hub="me/digits",
        lora={"r": 2, "target_modules": ["q_proj"], "merge": True},
    )  # fmt: skip
    out, words = tmp_path / "out", ["--ds_config", file, "--model", model, "--steps", 2]
    with hub_server() as server:
        done = finish(
            [sys.executable, "-m", "ds_lvxattn.training.finetune", *words, "--output_dir", out], cwd=tmp_path,
            TRACKIO_DIR=str(tmp_path / "trackio"), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
            HF_ENDPOINT=server.address, HF_TOKEN="hf_secret", HF_HUB_OFFLINE=None,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())  # the console breaks lines where paths happen to end
    assert "pushed to" in said and "is not pushed" not in said and "hf_secret" not in said
    for name, at in (("model", ""), ("adapter", "adapter/")):
        for path in (out / name).iterdir():
            assert server.files[f"me/digits/{at}{path.name}"] == path.read_bytes()
    assert server.tokens == {"Bearer hf_secret"}

    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "ds_lvxattn.db")) as database:
        rows = [(step, json.loads(told)) for step, told in database.execute("SELECT step, metrics FROM metrics")]
    told = {step: values["train/loss"] for step, values in rows if "train/loss" in values}
    assert list(told.values()) == pytest.approx(metrics_in(out)) and list(told) == [1, 2]


def test_a_push_that_fails_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    client = hub.huggingface_hub.hf_api.api
    with hub_server() as server:
        monkeypatch.setattr(client, "endpoint", server.address)
        assert "pushed to" in hub.push(folder, "me/model") and server.files == {"me/model/config.json": b"{}"}
        for server.fails in ("/create", "/commit/main"):  # a token without rights, and a server that takes no files
            told = hub.push(folder, "me/model", "inside")
            assert "not pushed to me/model: " in told and f"'hf upload me/model {folder} inside'" in told
            assert "hf_secret" not in told
    assert "not pushed to me/model" in hub.push(folder, "me/model")  # no server any more
    assert (folder / "config.json").exists()


def test_a_tracker_that_fails_does_not_cost_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")  # of its folder
    started = trackers.start_tracker("tensorboard", tmp_path, {})
    started.log({"train/loss": 1.0}, 1)
    started.table("plan", ["layer"], [["a"]])
    started.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tensorboard fails, and nothing more is recorded with it" in caplog.text


@pytest.mark.slow
def test_nothing_is_imported_that_is_not_used() -> None:
    code = (
        "import sys, ds_lvxattn.training.finetune, ds_lvxattn.training.generate, ds_lvxattn.training.compare.command\n"
        "print({'wandb', 'peft', 'matplotlib', 'tensorboard', 'trackio', 'bitsandbytes'} & set(sys.modules))"
    )
    done = finish([sys.executable, "-c", code])
    assert done.stdout.strip().splitlines()[-1] == "set()"
