"""What the documentation says to type: files that are there, arguments that are taken, and that it runs; its links."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ds_lvxattn import cli
from ds_lvxattn.config import SequenceParallelConfig
from ds_lvxattn.data.rows import read_row
from ds_lvxattn.needle.small_models import SMALL_MODELS
from ds_lvxattn.training import finetune
from ds_lvxattn.training.compare import command as compare
from ds_lvxattn.training.loading import LoadedModel
from ds_lvxattn.training.settings import FinetuningConfig, LoraSettings
from tests.support.conversations import IMAGE, TOKENIZER, write_video
from tests.support.processes import REPOSITORY, finish
from tests.support.tiny_model import tiny_config, tiny_model, tiny_processor
from tests.support.training import metrics_in

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
LINKING = [*PAGES, REPOSITORY / "SECURITY.md", REPOSITORY / "CHANGELOG.md"]
SCRIPTS = re.compile(r"^(?:launch|train|examples|benchmarks|ds_configs)/[\w./-]+$")
INLINE = re.compile(r"`((?:ds-lvxattn|python|deepspeed|torchrun|bash|[A-Z_]+=\S+ bash) [^`]+)`")


def blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def texts(page: Path) -> list[str]:
    """The commands of a page as they stand there, those in the middle of its sentences too."""
    made = [block.split(" && ")[0] for block in re.findall(r"^<!-- Made by:\n(.*?)^-->", page.read_text(), re.M | re.S)]
    lines = [line for block in [*blocks(page, "bash"), *made] for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return [*filter(None, lines), *(" ".join(found.split()) for found in INLINE.findall(prose))]


def usage(source: Path) -> list[str]:
    """The commands in the docstring of a file: indented, and begun by what starts Python."""
    doc = (ast.get_docstring(ast.parse(source.read_text())) or "").replace("\\\n", " ")
    lines = re.findall(r"^(?: {4})?((?:[A-Z_0-9]+=\S+ )*(?:ds-lvxattn|python|deepspeed|torchrun) .*)$", doc, re.M)
    return [re.split(r" {3,}(?![ -])", line)[0] for line in lines]  # what follows is a remark


COMMANDS = [(page.name, text) for page in PAGES for text in texts(page)]
SOURCES = [
    path for name in ("benchmarks", "ds_lvxattn", "examples", "train") for path in (REPOSITORY / name).rglob("*.py")
]
USAGES = [(str(path.relative_to(REPOSITORY)), text) for path in sorted(SOURCES) for text in usage(path)]


def started(words: list[str]) -> str:
    """What a command starts: the script, the module, the command of ``ds-lvxattn``, or else its first word."""
    if words[0] == "ds-lvxattn":
        return " ".join(words[:2])
    for before, word in zip(["", *words], words, strict=False):
        if (SCRIPTS.match(word) and word.endswith((".py", ".sh"))) or before in ("-m", "--module"):
            return word
    return words[0]


HERE = "tests/test_docs.py"
GPUS = "measures or checks GPUs"
# Where the tests run what the pages say to start.
RUN = {
    "ds-lvxattn calibrate": "tests/test_calibrate.py::test_ranks_measure_once_and_agree",
    "ds-lvxattn compare": "tests/test_report.py::test_runs_through_the_launcher_and_goes_on_after_a_failure",
    "ds-lvxattn data": f"{HERE}::test_one_s_own_rows",
    "ds-lvxattn finetune": f"{HERE}::test_one_s_own_rows",
    "ds-lvxattn generate": f"{HERE}::test_one_s_own_rows",
    "ds_lvxattn.calibrate": "tests/test_calibrate.py::test_ranks_measure_once_and_agree",
    "ds_lvxattn.plan": f"{HERE}::test_machines_that_are_not_there",
    "examples/own_loop.py": "tests/test_own_loop.py::test_the_example_trains_as_the_command_does",
    "examples/trainer.py": "tests/test_trainer.py::test_the_example",
    "launch/quickstart.sh": f"{HERE}::test_the_quickstart",
    "launch/single_node.sh": f"{HERE}::test_the_script_of_one_machine",
    "train/compare.py": "tests/test_report.py::test_runs_through_the_launcher_and_goes_on_after_a_failure",
    "train/finetune.py": "tests/test_training.py::test_the_command_and_its_resumption",
    "train/generate.py": "tests/test_generation.py::test_the_command_gives_one_answer_on_any_number_of_ranks",
    "benchmarks/nodes_on_paper.py": "tests/test_two_levels.py::test_the_table_on_paper_is_that_of_the_page",
    "benchmarks/rebuttal.py": "tests/test_rebuttal.py::test_the_command_knows_its_rows_by_name",
}
# What they do not run, and why.
NOT_RUN = {
    "benchmarks/accuracy.py": GPUS,
    "benchmarks/data_wait.py": GPUS,
    "benchmarks/decoding.py": "minutes of films that it writes itself",
    "benchmarks/exchange.py": GPUS,
    "benchmarks/families.py": GPUS,
    "benchmarks/full_size.py": GPUS,
    "benchmarks/host_time.py": GPUS,
    "benchmarks/kernels.py": GPUS,
    "benchmarks/local_attention.py": GPUS,
    "benchmarks/planner.py": GPUS,
    "benchmarks/recompute.py": "hours of compute on one machine",
    "benchmarks/scaling.py": GPUS,
    "benchmarks/step.py": GPUS,
    "benchmarks/tiles.py": GPUS,
    "benchmarks/two_levels.py": GPUS,
    "launch/gpu_check.sh": GPUS,
    "launch/gpu_faults.sh": GPUS,
    "launch/kernel_check.sh": GPUS,
    "launch/multi_node.sh": "needs several nodes, with ssh or SLURM",
    "launch/test.sh": "runs the tests",
    "export": "sets what the tests run with",
    "pytest": "runs the tests",
    "pip": "makes the environment that the tests run in",
}


def test_each_command_is_run_or_it_is_said_why_not() -> None:
    found = {started(words): page for page, text in COMMANDS if (words := shlex.split(text, comments=True))}
    assert found.keys() == RUN.keys() | NOT_RUN.keys() and not RUN.keys() & NOT_RUN.keys()
    for test in RUN.values():
        file, name = test.split("::")
        assert f"\ndef {name}(" in (REPOSITORY / file).read_text(), test


class Taken(BaseException):
    """The arguments of a command were taken; nothing else of it is to run."""


def take(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a Python command up to its parser.

    Raises:
        SystemExit: the parser refuses the arguments.
    """

    def stopping(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parsed(*arguments: Any) -> None:
            parse(*arguments)
            raise Taken

        return parsed

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    if words[0] == "ds-lvxattn":
        script, arguments = cli.COMMANDS[words[1]].module, cli.launcher_options(words[2:])[1]
    else:
        script = started([*words])
        arguments = [*words[[*words].index(script) + 1 :]]
    arguments = ["h200" if word == "profile.json" else word for word in arguments]  # a profile that there is
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.chdir(REPOSITORY)
    with mock.patch.dict(os.environ), pytest.raises(Taken):  # scripts set what libraries read as they start
        if script.endswith(".py"):
            monkeypatch.syspath_prepend(Path(script).parent.resolve())
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # the module is run once more
@pytest.mark.parametrize(("page", "text"), COMMANDS + USAGES, ids=lambda value: value[:60])
def test_commands(page: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(text, comments=True)
    for word in words:
        assert not SCRIPTS.match(word) or (REPOSITORY / word).exists(), word
    if any(sign in text for sign in ("[", "...", "|")):  # the arguments that there are, not a command
        return
    script = started(words)
    if script in ("launch/single_node.sh", "launch/multi_node.sh"):
        take(["train/finetune.py", "--ds_config", *words[words.index(script) + 1 :]], monkeypatch)
    elif words[0] == "ds-lvxattn":
        assert words[1] in cli.COMMANDS
        if len(words) > 2:
            take(words, monkeypatch)
    elif not script.endswith(".sh") and any(word.startswith("--") for word in words[words.index(script) :]):
        take(words, monkeypatch)


def anchors(page: Path) -> set[str]:
    """What a link may name behind '#', as GitHub makes it of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    names = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", name.strip().lower()).replace(" ", "-") for name in names}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    """To files and headings of the repository; and files that a page names are there."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            name, _, heading = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not heading or heading in anchors(target), link
    for name in re.findall(r"`((?:\w+/)+[\w.*-]+\.(?:py|sh|json|md|png))`", text):
        inside = f"ds_lvxattn/{name}"  # as most pages write them
        assert "NAME" in name or any(REPOSITORY.glob(name)) or any(REPOSITORY.glob(inside)), name


def first_cells(page: Path, heading: str) -> set[str]:
    """The names in the first column of the tables between a heading and the next one."""
    [text] = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#)", page.read_text(), re.M | re.S)
    return {name for cell in re.findall(r"^\|([^|]+)\|", text, re.M) for name in re.findall(r"`([^`]+)`", cell)}


def test_the_reference_has_every_key_and_argument(capsys: pytest.CaptureFixture[str]) -> None:
    page = REPOSITORY / "docs" / "config.md"
    blocks = {"`sequence_parallel`": SequenceParallelConfig, "`finetuning`": FinetuningConfig, "`lora`": LoraSettings}
    for heading, block in blocks.items():
        assert first_cells(page, heading) == block.model_fields.keys() - {"size", "offload"}, (
            heading
        )  # beside the block
    listed = {name.split()[0] for name in first_cells(page, "Command lines")}
    taken = set()
    for parse in (finetune.parse, compare.parse):
        with pytest.raises(SystemExit):
            parse(["--help"])
        taken |= set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.M))
    assert listed == taken - {"--local_rank"}  # which the launcher gives
    assert all(f"`{name}`" in page.read_text() for name in SMALL_MODELS)


def test_rows() -> None:
    page = REPOSITORY / "docs" / "your-data-and-model.md"
    rows = [json.loads(block) for block in blocks(page, "json") if "trainable" not in block]
    assert len(rows) >= 7
    for row in rows:
        assert read_row(row)[-1].role == "assistant"


# The journeys: the commands as they stand on the pages, with other names


ASKED = [
    {"from": "human", "value": "<image>\nWhat happens?"},
    {"from": "gpt", "value": "It rains."},
    {"from": "human", "value": "And then?"},
    {"from": "gpt", "value": "It snows."},
]
ROWS = [{"video": "clip.mp4", "conversations": ASKED}, {"conversations": ASKED[2:]}] * 8
STEPS = 3  # DeepSpeed's warm-up begins with two steps at a learning rate of 0
FEW_STEPS = f"finetuning.steps={STEPS} finetuning.eval_examples=2"


def documented(page: str, start: str) -> str:
    """The one command of the page that begins like this."""
    [text] = [text for name, text in COMMANDS if name == page and text.startswith(start)]
    return text


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like a checkout, to which the commands may write, with a model and rows about a video."""
    for name in ("ds_configs", "ds_lvxattn", "launch", "train"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    [(module, function)] = re.findall(r'^ds-lvxattn = "(.+):(.+)"', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    command = tmp_path / "bin" / "ds-lvxattn"  # as pip writes it, of these sources whatever is installed
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    command.chmod(0o755)
    config = tiny_config(vocab_size=len(TOKENIZER), max_position_embeddings=256)
    config.image_token_index = TOKENIZER.convert_tokens_to_ids(IMAGE)
    loaded = LoadedModel(tiny_model(config), TOKENIZER, tiny_processor(), IMAGE)
    loaded.save(tmp_path / "MODEL", loaded.model.state_dict())
    write_video(tmp_path / "clip.mp4", 12)
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def typed(text: str, folder: Path, **names: str) -> subprocess.CompletedProcess[str]:
    """Run the command in the folder as a shell does, on a machine without a GPU, ``names`` replaced in its text."""
    for name, other in names.items():
        assert name in text
        text = text.replace(name, other)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = finish(
        ["bash", "-euc", text], cwd=folder, PATH=path, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1", WANDB_MODE="disabled", ENVIRONMENT="active",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_one_s_own_rows(checkout: Path) -> None:
    """Looked at, trained on, and the model that comes of it asked."""
    said = typed(documented("your-data-and-model.md", "ds-lvxattn data"), checkout, PATH="MODEL").stdout
    assert f"{len(ROWS)} rows, {len(ROWS)} good, 0 bad" in said and "sampled: 12" in said
    train = documented("README.md", "ds-lvxattn finetune")
    typed(f"{train} {FEW_STEPS}", checkout, **{"meta-llama/Llama-3.2-11B-Vision-Instruct": "MODEL"})
    out = checkout / "runs" / "mine"
    assert len(metrics_in(out)) == STEPS and metrics_in(out, "lr")[-1] > 0
    assert json.loads((out / "eval.json").read_text())["examples"]
    done = typed(f"{documented('README.md', 'ds-lvxattn generate')} --max_new_tokens 2", checkout)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_script_of_one_machine(checkout: Path) -> None:
    """In the environment at hand; what makes another one is left out."""
    script = documented("your-data-and-model.md", "GPUS=4 bash launch/single_node.sh")
    names = {"GPUS=4": "GPUS=2", "PATH": "MODEL", "runs/mine": "runs/node"}
    typed(f"{script} {FEW_STEPS}", checkout, **names)
    assert len(metrics_in(checkout / "runs" / "node")) == STEPS


@pytest.mark.slow
def test_the_quickstart(checkout: Path) -> None:
    """A few of its steps, in the environment at hand."""
    typed(f"{documented('README.md', 'bash launch/quickstart.sh')} {FEW_STEPS}", checkout)
    [run] = (checkout / "runs").iterdir()
    assert len(metrics_in(run)) == STEPS and (run / "model" / "config.json").exists()


@pytest.mark.slow
def test_machines_that_are_not_there(checkout: Path) -> None:
    pytest.importorskip("matplotlib")
    (checkout / "docs").mkdir()
    asked = [text for _, text in COMMANDS if "ds_lvxattn.plan --" in text and "|" not in text]
    assert len(asked) >= 3
    for text in asked:
        assert "choice: " in typed(text, checkout).stdout, text
    assert {path.name for path in (checkout / "docs").iterdir()} == {"planner_map.png", "planner_scaling.png"}
