"""What the documentation says to type: files that are there, arguments that the commands take, rows that are read."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_lvxattn import cli
from ds_lvxattn.data.rows import read_row
from ds_lvxattn.training import finetune, generate
from tests.support.processes import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PARSERS = {"finetune": finetune.parse, "generate": generate.parse}
SCRIPTS = re.compile(r"^(?:launch|train|examples|ds_configs)/[\w./-]+$")


def blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield page.name, words


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60]
)
def test_commands(page: str, words: list[str]) -> None:
    for word in words:
        assert not SCRIPTS.match(word) or (REPOSITORY / word).exists(), word
    if "[" in " ".join(words):  # the arguments that there are, not a command
        return
    script = next((word for word in words if SCRIPTS.match(word)), "")
    if words[0] == "ds-lvxattn":
        assert words[1] in cli.COMMANDS
        if words[1] in PARSERS:
            PARSERS[words[1]](cli._launcher_options(words[2:])[1])
    elif script in ("launch/single_node.sh", "launch/multi_node.sh"):
        config, *rest = words[words.index(script) + 1 :]
        finetune.parse(["--ds_config", config, *rest])


def test_rows() -> None:
    page = REPOSITORY / "docs" / "your-data-and-model.md"
    rows = [json.loads(block) for block in blocks(page, "json") if "trainable" not in block]
    assert len(rows) >= 7
    for row in rows:
        assert read_row(row)[-1].role == "assistant"
