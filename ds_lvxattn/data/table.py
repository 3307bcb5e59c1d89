"""The rows of a dataset on disk: JSON lines, a JSON list, Parquet, CSV, a folder of ``save_to_disk``, or what
``datasets.load_dataset`` finds."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
import pyarrow as pa

from ds_lvxattn.data.rows import MEDIA_KEYS, TURN_KEYS, media_keys_of
from ds_lvxattn.data.sample import SampleError

BOM = "\ufeff"
SEPARATORS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", *SEPARATORS)  # of files of rows
SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes

Data: TypeAlias = str | os.PathLike[str] | datasets.Dataset  # a file, a name, or rows that are loaded


@dataclass(frozen=True)
class Table:
    """Rows in Arrow, read from disk when asked for.

    Attributes:
        name: of the dataset, for messages.
        rows: in Arrow format, so that media stay undecoded.
        is_json: rows are JSON texts in one column ``text``: those of a file need not share a schema.
        unit: ``line`` or ``row``, for messages.
        folder: where relative paths start.
    """

    name: str
    rows: datasets.Dataset
    is_json: bool
    unit: Literal["line", "row"]
    folder: str

    def row_name(self, number: int) -> str:
        return f"{self.name}, {self.unit} {number + 1}"

    def row(self, number: int) -> dict[str, Any]:
        """Row ``number``. Raises ``SampleError`` where it is no JSON object."""
        [row] = self.rows[number : number + 1].to_pylist()
        return self._parse(row)

    def digest(self) -> str:
        """Of all rows, embedded media left out."""
        names = [field.name for field in self.rows.features.arrow_schema if not _holds_bytes(field.type)]
        digest = hashlib.blake2b(digest_size=8)
        if names:
            for batch in self.rows.select_columns(names).iter(batch_size=1000):
                digest.update(json.dumps(batch.to_pydict(), default=str).encode())
        return digest.hexdigest()

    def media_keys(self, strict: bool = True) -> Iterator[tuple[int, str]]:
        """The number of every row, and a text that is equal for rows about the same media. Skips blank lines.

        Args:
            strict: whether a line that is not a JSON object is an error now, rather than when it is read as a row.

        Raises:
            ValueError: there is such a line.
        """
        # Embedded media are not read for this, so each of their rows counts as its own.
        names = ["text"] if self.is_json else [*MEDIA_KEYS, *TURN_KEYS]
        schema = self.rows.features.arrow_schema
        columns = [field.name for field in schema if field.name in names and not _holds_bytes(field.type)]
        if not columns:
            yield from ((number, f"row {number}") for number in range(len(self.rows)))
            return
        number = 0
        for batch in self.rows.select_columns(columns).iter(batch_size=1000):
            for row in batch.to_pylist():
                if not self.is_json or row["text"].strip(f" \t\r\n{BOM}"):
                    try:
                        parsed = self._parse(row)
                    except (SampleError, RecursionError) as error:
                        if strict and isinstance(error, SampleError):
                            raise ValueError(f"{self.row_name(number)}: {error}") from error
                        parsed = {}
                    yield number, media_keys_of(parsed) or f"row {number}"
                number += 1

    def _parse(self, row: dict[str, Any]) -> dict[str, Any]:
        if not self.is_json:
            return row
        try:
            parsed = json.loads(row["text"].lstrip(BOM))
        except json.JSONDecodeError as error:
            raise SampleError(f"not JSON ({error}); give one object a line") from error
        if not isinstance(parsed, dict):
            raise SampleError(f"holds a {type(parsed).__name__}, not an object")
        return parsed


def open_table(data: Data) -> Table:
    """The rows of a file, of a dataset as ``NAME``, ``NAME:SPLIT`` or ``NAME:CONFIG:SPLIT``, or of one that is loaded.

    The name of a dataset on the hub may end in ``@REVISION``, a commit, tag or branch.

    Raises:
        ValueError: neither is there, or it cannot be read.
    """
    if isinstance(data, datasets.Dataset):
        return Table(name_of(data), data.with_format("arrow"), False, "row", "")
    check_has_rows(data)
    data = os.fspath(data)
    folder = str(Path(data).parent)
    if Path(data).suffix == ".parquet" and os.path.isfile(data):
        return Table(data, _load(data, "parquet", data_files=data, split="train"), False, "row", folder)
    if Path(data).suffix in SEPARATORS and os.path.isfile(data):
        return Table(data, _read_csv(data, SEPARATORS[Path(data).suffix]), False, "row", folder)
    if os.path.isfile(data):
        rows, unit = _read_json(data)
        return Table(data, rows.with_format("arrow"), True, unit, folder)
    check_rows_file(data)
    name, *selection = data.split(":")
    if os.path.isfile(name):
        raise ValueError(f"{data}: a file has no splits; give {name}")
    if any(os.path.isfile(os.path.join(name, file)) for file in SAVED):
        return Table(data, _saved(data, name, selection), False, "row", name)
    *config, split = selection or ["train"]
    pinned: dict[str, str] = {}
    if "@" in name and not os.path.isdir(name):
        name, _, pinned["revision"] = name.rpartition("@")
    rows = _load(data, name, *config, split=split, **pinned)
    return Table(data, rows, False, "row", name if os.path.isdir(name) else "")


def check_rows_file(data: str | os.PathLike[str]) -> None:
    """Refuse what is named as a file of rows and is not there.

    Raises:
        ValueError: there is no such file.
    """
    if Path(data).suffix in SUFFIXES and not os.path.isfile(data):
        raise ValueError(f"{os.fspath(data)}: no such file")


def check_folder(media_root: str | os.PathLike[str] | None) -> None:
    """Refuse a folder of media that is not there.

    Raises:
        ValueError: there is no such folder.
    """
    if media_root is not None and not os.path.isdir(media_root):
        raise ValueError(f"media_root is {os.fspath(media_root)!r}: no such folder")


def check_has_rows(data: object) -> None:
    """Refuse what ``datasets`` has loaded and what is no table of rows.

    Raises:
        ValueError: a streaming dataset, or several splits.
    """
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise ValueError(
            "a streaming dataset has neither a number of rows nor a row by its number, by which a run orders its rows, "
            "holds some out and resumes; load it without streaming=True: its rows stay on the disk, not in memory"
        )
    if isinstance(data, datasets.DatasetDict):
        raise ValueError(f"a dataset of the splits {sorted(data)}; give one of them")


def name_of(data: Data) -> str:
    """Of a dataset, for messages."""
    return f"the dataset of {len(data)} rows" if isinstance(data, datasets.Dataset) else os.fspath(data)


def _saved(data: str, folder: str, selection: Sequence[str]) -> datasets.Dataset:
    """The split ``selection`` of what ``save_to_disk`` wrote, ``train`` by default; or all of it, where it has none."""
    try:
        rows = datasets.load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{data}: cannot be read: {error}") from error
    if isinstance(rows, datasets.DatasetDict):
        split = selection[0] if selection else "train"
        if len(selection) > 1 or split not in rows:
            raise ValueError(f"{data}: a dataset of the splits {sorted(rows)}; give {folder}:SPLIT")
        return rows[split].with_format("arrow")
    if selection:
        raise ValueError(f"{data}: the dataset was saved without splits; give {folder}")
    return rows.with_format("arrow")


def _load(data: str, *where: str, **what: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(*where, **what).with_format("arrow")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # What datasets says of a file without a row, and Arrow of Parquet with an empty part.
        if "corresponds to no data" in str(error) or "BatchSize must be" in str(error.__cause__):
            raise ValueError(f"{data}: the dataset is empty") from error
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        fault = "cannot be read" if os.path.isfile(data) else "neither a file nor a dataset that can be loaded"
        raise ValueError(f"{data}: {fault}: {error}{cause}") from error


def _read_csv(path: str, separator: str) -> datasets.Dataset:
    """All columns as text: an answer may be a number."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file, delimiter=separator), [])
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read: {error}; write it as UTF-8 text") from error
    if not names:
        raise ValueError(f"{path}: the file is empty")
    features = datasets.Features({name: datasets.Value("string") for name in names})
    how: dict[str, Any] = {"sep": separator, "keep_default_na": False, "features": features}
    return _load(path, "csv", data_files=path, split="train", **how)


def _read_json(path: str) -> tuple[datasets.Dataset, Literal["line", "row"]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            start = next((line.lstrip() for line in file if not line.isspace()), "")
            if start.startswith("["):
                file.seek(0)
                rows = json.loads(file.read().lstrip(BOM))
                return datasets.Dataset.from_dict({"text": [json.dumps(row) for row in rows]}), "row"
            if not start:
                raise ValueError("the file is empty")
        return datasets.load_dataset("text", data_files=path, split="train"), "line"
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read: {error}; write it as UTF-8 text, not compressed") from error
    except (OSError, ValueError, RecursionError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds embedded media."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_holds_bytes(kind.field(n).type) for n in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
