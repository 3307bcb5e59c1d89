"""Where a run is recorded beside its own files: wandb, TensorBoard, trackio, or nowhere.

A tracker is imported when a run starts it, and never costs a run: what is wrong with it is said, and the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.training.secrets import without_secrets

logger = logging.getLogger(__name__)

PROJECT = "ds_lvxattn"
WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
WANDB_SECONDS = 30.0  # for its server to answer
# What has to be installed for each.
NEEDS = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}


class Tracker(Protocol):
    """Takes what a run reports."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers of a step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table, which replaces an earlier one of its name."""

    def pictures(self, paths: Sequence[Path]) -> None:
        """Picture files, by their names."""

    def close(self) -> None:
        """The run is over."""


def check_tracker(name: str | None) -> None:
    """Raise ``ConfigError`` when a tracker that the config names is not installed."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        raise ConfigError(
            f"'finetuning.report_to' is {name!r}, which is not installed; install it, or choose 'none' or one of "
            f"{sorted({*NEEDS} - {name})}"
        )


def start_tracker(report_to: str | None, output_dir: Path, config: dict[str, Any], **names: str) -> Tracker:
    """The tracker that the config names; by default wandb where it is installed. Secrets stay out of it.

    Args:
        output_dir: of the run; TensorBoard writes into its folder ``tensorboard``.
        config: shown beside the run.
        names: ``name`` and ``group`` of the run, where the tracker has them.
    """
    config = without_secrets(config)
    if report_to is None:
        report_to = "wandb" if importlib.util.find_spec("wandb") else "none"
    if report_to == "wandb":
        return NeverFatal(report_to, lambda: Wandb(output_dir, config, **names))
    if report_to == "tensorboard":
        return NeverFatal(report_to, lambda: TensorBoard(output_dir, config))
    if report_to == "trackio":
        return NeverFatal(report_to, lambda: Trackio(config, **names))
    return Nowhere()


class Nowhere:
    """Records nothing."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        return

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        return

    def pictures(self, paths: Sequence[Path]) -> None:
        return

    def close(self) -> None:
        return


class NeverFatal:
    """A tracker, until it fails: then that is said once, and nothing is recorded from there on.

    Args:
        name: of the tracker, for the message.
        start: makes it.
    """

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker = Nowhere()
        with self._told():
            self._tracker = start()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the tracker, its service, the network or the disk
            logger.warning(
                "%s fails, and nothing more is recorded with it (metrics.jsonl has it all): %s", self._name,
                _first_line(error),
            )  # fmt: skip
            self._tracker = Nowhere()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        with self._told():
            self._tracker.log(values, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        with self._told():
            self._tracker.table(name, columns, rows)

    def pictures(self, paths: Sequence[Path]) -> None:
        with self._told():
            self._tracker.pictures(paths)

    def close(self) -> None:
        with self._told():
            self._tracker.close()


class Wandb:
    """A wandb run in the output folder, offline unless a key is at hand; the usual WANDB_* variables count."""

    def __init__(self, output_dir: Path, config: dict[str, Any], **names: str) -> None:
        import wandb

        self._wandb = wandb
        arguments: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT), "config": config, "dir": str(output_dir), **names,
        }  # fmt: skip
        for mode in dict.fromkeys((_wandb_mode(), "offline")):
            try:
                settings = wandb.Settings(init_timeout=WANDB_SECONDS)
                self._run = wandb.init(mode=mode, settings=settings, **arguments)  # type: ignore[arg-type]
                return
            except Exception as error:  # of wandb, its settings, its service, the network or the disk
                logger.warning("wandb does not start in the mode %r: %s", mode, _first_line(error))
        logger.warning("nothing is recorded with wandb; metrics.jsonl has it all")
        self._run = wandb.init(mode="disabled")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._run.log(dict(values), step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def pictures(self, paths: Sequence[Path]) -> None:
        self._run.log({path.stem: self._wandb.Image(str(path)) for path in paths})

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in ``OUTPUT_DIR/tensorboard``."""

    def __init__(self, output_dir: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"- `{key}`: `{value}`" for key, value in config.items()))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))

    def pictures(self, paths: Sequence[Path]) -> None:
        import numpy as np
        from PIL import Image

        for path in paths:
            self._writer.add_image(path.stem, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run of trackio, in the project ``TRACKIO_PROJECT``."""

    def __init__(self, config: dict[str, Any], **names: Any) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), config=config, **names)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import pandas

        self._trackio.log({name: self._trackio.Table(dataframe=pandas.DataFrame(rows, columns=list(columns)))})

    def pictures(self, paths: Sequence[Path]) -> None:
        self._trackio.log({path.stem: self._trackio.Image(str(path)) for path in paths})

    def close(self) -> None:
        self._trackio.finish()


def _wandb_mode() -> str:
    """The mode that ``WANDB_MODE`` names; without it, ``online`` where wandb finds a key that its server accepts."""
    import wandb

    given = os.environ.get("WANDB_MODE")
    if given in WANDB_MODES:
        return given
    if given:
        logger.warning("WANDB_MODE is %r, which is none of %s; using 'offline'", given, list(WANDB_MODES))
        os.environ["WANDB_MODE"] = "offline"  # wandb itself reads it, and raises
        return "offline"
    try:
        return "online" if wandb.login(prompt=False) else "offline"
    except Exception as error:  # a bad key, a bad address, no server
        logger.warning("wandb cannot log in, so the run is recorded offline: %s", _first_line(error))
        return "offline"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
