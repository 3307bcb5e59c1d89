"""The command that reads a dataset as training would and says which rows are bad, and why.

    ds-lvxattn data my.jsonl --model PATH
    ds-lvxattn data my.jsonl --json --save frames

Exit code 0: every row is good; 1: some are bad; 2: the data cannot be read.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from ds_lvxattn.data.check import Encode, Findings, check_rows
from ds_lvxattn.data.media import Media
from ds_lvxattn.data.model_text import ModelText, tokenised
from ds_lvxattn.data.sample import IGNORE, SampleError
from ds_lvxattn.data.table import check_folder, open_table
from ds_lvxattn.data.turns import Turn
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import VisualFamily, family_of_config
from ds_lvxattn.training.dataset import text_of_family
from ds_lvxattn.training.loading import at_revision, config_of, take_template
from ds_lvxattn.training.settings import FinetuningConfig

SHOWN = 20  # bad rows that the report for people lists


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ds-lvxattn data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a file of rows (.jsonl, .json, .parquet) or a dataset's name, as of --data")
    parser.add_argument("--model", help="local path or hub name: counts tokens and tries its chat template")
    parser.add_argument("--limit", type=int, help="read the first rows only")
    parser.add_argument("--frames", type=int, help="frames of a row, as 'finetuning.frames'")
    parser.add_argument("--media_root", help="folder of relative paths; by default that of the data file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the sampled frames as ROW-MEDIUM-NUMBER.png")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the rows, print what was found; the exit code."""
    asked = parse(arguments)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # every finding is in the report
    datasets.disable_progress_bars()
    try:
        findings = check(asked)
    except (ConfigError, ValueError, OSError) as error:
        print(f"ds-lvxattn data: {error}", file=sys.stderr)
        return 2
    finally:
        logging.disable(disabled)
    if asked.json:
        bad = [{"row": row, "reason": reason} for row, reason in findings.bad.items()]
        media = [asdict(medium) for medium in findings.media]
        print(json.dumps({"rows": findings.rows, "good": findings.good, "bad": bad, "media": media}))
    else:
        print(report(asked.data, findings))
    return 1 if findings.bad else 0


def check(asked: argparse.Namespace) -> Findings:
    """The findings of a parsed command.

    Raises:
        ValueError: the data cannot be read, or no model loads under the name.
    """
    check_folder(asked.media_root)
    table = open_table(asked.data)
    if asked.save is not None:
        asked.save.mkdir(parents=True, exist_ok=True)
    encode, merged = (None, 0) if asked.model is None else encode_for(asked.model)
    return check_rows(
        table,
        max_frames=asked.frames or FinetuningConfig.model_fields["frames"].default,
        root=table.folder if asked.media_root is None else asked.media_root,
        encode=encode,
        merged=merged,
        limit=asked.limit,
        save=asked.save,
    )


def encode_for(name: str) -> tuple[Encode, int]:
    """How many tokens the model called ``name`` makes of a conversation; its weights are not loaded.

    Returns:
        That, and how many frames of a video it merges to one; 0: it takes frames by themselves.

    Raises:
        ConfigError: nothing loads under the name, or no family knows it.
    """
    try:
        name = at_revision(name, weights=False)
        family = family_of_config(config_of(name))
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        visual = family if isinstance(family, VisualFamily) else None
        processor = None if visual is None else visual.load_processor(name)
        if visual is not None:
            take_template(tokenizer, processor if isinstance(processor, ProcessorMixin) else None, name)
    except ConfigError as error:
        raise ConfigError(f"--model {name}: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {name}: cannot be loaded ({error})") from error
    most = family.text_config.max_position_embeddings
    text = ModelText(None) if visual is None else text_of_family(visual, tokenizer, processor)

    def count(turns: Sequence[Turn], media: Sequence[Media]) -> tuple[int, int]:
        text.check_takes(len(media))
        made = tokenised(turns, media, tokenizer, text)
        if made.rows > most:
            raise SampleError(f"{made.rows} tokens, and the model's positions reach {most}")
        return made.rows, sum(label != IGNORE for label in made.labels)

    return count, text.merged


def report(data: str, findings: Findings) -> str:
    """The findings for people to read."""
    lines = [f"{data}: {findings.rows} rows, {findings.good} good, {len(findings.bad)} bad"]
    films = [medium for medium in findings.media if medium.sampled_s]
    if findings.media:
        sizes = Counter(f"{medium.width} x {medium.height}" for medium in findings.media).most_common(3)
        lines.append(
            f"media: {len(films)} videos, {len(findings.media) - len(films)} images; most frequent sizes: "
            + ", ".join(f"{size} ({count})" for size, count in sizes)
        )
        if films:
            lines.append("frames a video: " + _spread([medium.frames for medium in films]))
            lines.append("frames sampled: " + _spread([len(medium.sampled_s) for medium in films]))
    if findings.tokens:
        lines.append("tokens a row: " + _spread(findings.tokens))
        lines.append("of them with loss: " + _spread(findings.supervised))
    for key, row in findings.unknown.items():
        lines.append(f"key {key!r} is not read (first in row {row})")
    for row, reason in list(findings.bad.items())[:SHOWN]:
        lines.append(f"row {row}: {reason}")
    if len(findings.bad) > SHOWN:
        lines.append(f"... and {len(findings.bad) - SHOWN} more bad rows; --json has them all")
    return "\n".join(lines)


def _spread(values: Sequence[int]) -> str:
    return f"{min(values)} to {max(values)}, median {statistics.median(values):g}"


if __name__ == "__main__":
    sys.exit(main())
