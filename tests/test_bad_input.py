"""What cannot work: one clear error on every rank or a defined behaviour, no hang, and no checkpoint lost."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from ds_lvxattn.batches.loader import ControlGroups, Loader
from ds_lvxattn.data.conversations import ConversationSource
from ds_lvxattn.data.model_text import ModelText
from ds_lvxattn.data.sample import Sample, SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.needle.task import IMAGE, build_tokenizer
from ds_lvxattn.training.run_folder import RunFolder
from tests.support.distributed import run
from tests.support.tiny_model import (
    MODES,
    PATTERNS,
    ListSource,
    attach,
    ds_config,
    groups_of,
    losses_on_one_rank,
    tiny_model,
    tiny_sample,
)
from tests.support.training import Case, finetune, metrics_in, train, write_config, write_model

# The command: configs, models and data that cannot work


def refused(folder: Path, config: dict[str, Any], *words: Any, ranks: int = 2, **finetuning: Any) -> str:
    """The one error of all ranks; nothing may have been written."""
    file = write_config(folder / "ds.json", config, **{"eval_examples": 0, **finetuning})
    out = folder / "out"
    arguments = ["--ds_config", file, "--steps", 2, "--output_dir", out, *words]
    errors = run(ranks, finetune, [str(word) for word in arguments])
    assert len(set(errors)) == 1, errors
    assert not (out / "checkpoints").exists()
    return errors[0]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"sequence_parallel": {"strategy": "megatron"}}, ("strategy", "'megatron'", "'lv_xattn'", "'ulysses'")),
        ({"sequence_parallel": {"stragety": "ring"}}, ("'sequence_parallel.stragety'", "'ring'", "strategy")),
        ({"sequence_parallel": {"layers": {"*.9.*": "ring"}}}, ("'*.9.*'", "matches none", "layers.1.cross_attn")),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            ("'activation_checkpointing.partition_activations'", "True"),
        ),
        ({"sequence_parallel_size": 3}, ("'sequence_parallel_size' is 3", "2 ranks", "[1, 2]")),
    ],
    ids=str,
)
def test_configs(change: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    error = refused(tmp_path, {**ds_config(1, 2, 2), **change})
    assert all(part in error for part in parts), error


def test_fewer_heads_than_ranks(tmp_path: Path) -> None:
    loaded_from = write_model(tmp_path / "model", heads=1)
    error = refused(tmp_path, ds_config(1, 2, 2, strategy="ulysses"), "--model", loaded_from)
    assert "'ulysses' cannot run" in error and "use lv_xattn" in error


def test_attention_dropout(tmp_path: Path) -> None:
    error = refused(tmp_path, ds_config(1, 2, 2), "--model", write_model(tmp_path / "model", dropout=0.1))
    assert "dropout is 0.1" in error and "set it to 0" in error


def attach_with_another_implementation() -> str:
    model = tiny_model()
    model.config.text_config._attn_implementation = "flex_attention"
    try:
        attach(model, 2, MODES[0], [tiny_sample("Ita")])
    except ConfigError as error:
        return str(error)
    return ""


def test_attention_implementation_of_somebody_else() -> None:
    errors = run(2, attach_with_another_implementation)
    assert errors[0] == errors[1] and "'flex_attention'" in errors[0] and "without attn_implementation" in errors[0]


@pytest.mark.parametrize(
    ("content", "part"), [(None, "no such file"), ("", "empty"), ("[]", "empty"), ("{nonsense}", "not JSON")]
)
def test_datasets(content: str | None, part: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_text(content)
    error = refused(tmp_path, ds_config(1, 2, 2), "--data", data)
    assert str(data) in error and part in error


def test_models_parameters_and_checkpoints_that_are_not_there(tmp_path: Path) -> None:
    config = ds_config(1, 2, 2)
    nowhere = tmp_path / "nowhere"
    assert f"--model {nowhere}: cannot be loaded (no such folder)" in refused(tmp_path, config, "--model", nowhere)
    rows = f"{nowhere}.jsonl"  # which is told ahead of the model, which may take minutes to load
    assert f"--data {rows}: {rows}: no such file" in refused(tmp_path, config, "--model", nowhere, "--data", rows)
    setting = f"'finetuning.eval_data': {rows}: no such file"
    assert setting in refused(tmp_path, config, "--model", nowhere, eval_data=rows)
    folder = f"'finetuning.media_root': media_root is '{nowhere}': no such folder"
    assert folder in refused(tmp_path, config, "--model", nowhere, media_root=str(nowhere))
    assert "'*.no_such.*', which matches no parameter" in refused(tmp_path, config, trainable=["*.no_such.*"])
    assert "holds no checkpoint" in refused(tmp_path, config, "--resume")


# Broken samples


@dataclass(frozen=True)
class VideoRow:
    """A row of a conversation dataset with its video."""

    file: str
    frames: int = 8
    broken_after: int | None = None
    words: int = 3

    def write(self, folder: Path) -> str:
        if self.frames:
            path = folder / self.file
            with av.open(str(path), "w") as container:
                stream = container.add_stream("mjpeg", rate=5)
                stream.width = stream.height = 32
                stream.pix_fmt = "yuvj420p"
                for value in range(self.frames):
                    image = np.full((32, 32, 3), 8 * value, dtype=np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                container.mux(stream.encode())
            if self.broken_after is not None:
                with av.open(str(path)) as container:
                    packets = [p for p in container.demux(video=0) if p.size]
                    damaged = [(p.pos, p.size) for p in packets[self.broken_after :]]
                with path.open("r+b") as file:
                    for position, size in damaged:
                        file.seek(position)
                        file.write(bytes(size))
        turns = [
            {"from": "human", "value": "<video> " + "which " * self.words},
            {"from": "gpt", "value": " 7"},
        ]
        return json.dumps({"video": self.file, "conversations": turns})


GOOD = VideoRow("good.mp4")
BROKEN_ON_RANK_1 = VideoRow("broken.mp4", broken_after=5)
MISSING = VideoRow("missing.mp4", frames=0)
TOO_LONG = VideoRow("long.mp4", words=500)


def load_rows(folder: Path, size: int, skip: bool) -> tuple[str, Any, list[str]]:
    """Load a micro-batch of two rows of this rank's group: the error, what was loaded, and the warnings."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ds_lvxattn.batches.loader")
    logger.addHandler(handler)
    try:
        source = ConversationSource(
            folder / "data.jsonl", build_tokenizer(), ModelText(IMAGE), max_frames=8, max_text_tokens=100,
            eval_share=0.0,
        )  # fmt: skip
        model = tiny_model()
        batches = attach(model, size, MODES[0], [tiny_sample("Ita")])
        control = ControlGroups.beside(groups_of(size))
        loader = Loader(source, batches, control, skip_bad=skip)
        first = 2 * groups_of(size).get_data_parallel_rank()
        loaded = loader.load([first, first + 1])
    except SampleError as error:
        return str(error), None, warnings
    finally:
        logger.removeHandler(handler)
    layout = loaded.layout
    summary = (loaded.skipped, layout.frames, layout.input_ids.shape, layout.supervised_tokens)
    return "", summary, warnings


def write_rows(folder: Path, *rows: VideoRow) -> None:
    (folder / "data.jsonl").write_text("".join(row.write(folder) + "\n" for row in rows))


BAD_ROWS = {
    "broken on rank 1": (BROKEN_ON_RANK_1, "broken.mp4"),
    "missing": (MISSING, "missing.mp4: No such file"),
    "too long": (TOO_LONG, "max_text_tokens is 100"),
}


@pytest.mark.parametrize(("row", "part"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_sample_is_skipped_with_a_warning_or_fatal(row: VideoRow, part: str, tmp_path: Path) -> None:
    write_rows(tmp_path, row, GOOD)
    skipping = run(2, load_rows, tmp_path, 2, True)
    assert [(error, summary[:2]) for error, summary, _ in skipping] == [("", (1, (0, 8)))] * 2
    assert skipping[0][1] == skipping[1][1] and skipping[0][1][3] > 0
    assert [len(warnings) for *_, warnings in skipping] == [1, 0] and part in skipping[0][2][0]

    (error, *_), (other, *_) = run(2, load_rows, tmp_path, 2, False)
    assert error == other and part in error and "'finetuning.on_bad_sample' to 'skip'" in error


@pytest.mark.slow
def test_a_fatal_sample_of_one_group_stops_the_other_groups(tmp_path: Path) -> None:
    write_rows(tmp_path, GOOD, replace(GOOD, file="second.mp4"), BROKEN_ON_RANK_1, replace(GOOD, file="third.mp4"))
    errors = {error for error, *_ in run(4, load_rows, tmp_path, 2, False)}
    assert len(errors) == 1 and "broken.mp4" in errors.pop()
    assert [summary[0] for _, summary, _ in run(4, load_rows, tmp_path, 2, True)] == [0, 0, 1, 1]


@dataclass
class HoleySource(ListSource):
    """Some rows cannot be used."""

    bad: tuple[int, ...] = ()

    def sample(self, index: int) -> Sample:
        if index in self.bad:
            raise SampleError(f"row {index} is broken")
        return self.samples[index]


@pytest.mark.slow
def test_training_goes_on_where_all_samples_of_a_step_are_bad(tmp_path: Path) -> None:
    samples = [tiny_sample(PATTERNS["several images"], seed) for seed in range(10)]
    case = Case(2, 2, 3, MODES[0], steps=5)
    run(2, train, case, tmp_path, HoleySource(samples, bad=(4, 5)))
    empty = tiny_sample("t")
    expected = losses_on_one_rank([*samples[:4], empty, empty, *samples[6:]], 5, 2, 2)
    assert expected[2] == 0 and all(map(math.isfinite, metrics_in(tmp_path)))
    assert metrics_in(tmp_path) == pytest.approx(expected, rel=1e-5)


# Checkpoints: whatever is refused, the one that is there stays


def same_samples() -> ListSource:
    """Samples with equally many answer tokens, so that groups of any number of ranks average to one loss."""
    return ListSource([tiny_sample(PATTERNS["several images"], seed) for seed in range(16)])


CASE = Case(2, 2, 2, MODES[0], steps=2, micro_batch=4)


class OtherSource(ListSource):
    digest = "other samples"


def attempt_on_other_data(folder: Path, new_data: bool) -> str:
    source = OtherSource(same_samples().samples)
    try:
        train(replace(CASE, steps=3), folder, source, resume=True, new_data=new_data)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_run_goes_on_with_its_own_data_or_says_so(tmp_path: Path) -> None:
    run(2, train, CASE, tmp_path, same_samples())
    for refusal in run(2, attempt_on_other_data, tmp_path, False):
        assert "was made on other data (samples in a list; this run has other samples)" in refusal
        assert "--new_data" in refusal
    assert run(2, attempt_on_other_data, tmp_path, True) == ["", ""]
    assert len(metrics_in(tmp_path)) == 3


def attempt(case: Case, folder: Path, source: ListSource, resume: bool, seed: int, **finetuning: Any) -> str:
    """Train on this rank; the error, if one comes."""
    try:
        train(case, folder, source, resume=resume, seed=seed, **finetuning)
    except (ConfigError, SampleError) as error:
        return str(error)
    return ""


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of the checkpoints."""
    files = (path for path in sorted((folder / "checkpoints").rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(2, attempt, CASE, folder, same_samples(), False, 0) == ["", ""]
    return folder


REFUSALS = {
    "no --resume": (CASE, {"resume": False}, "give --resume"),
    "other stage": (replace(CASE, stage=1), {}, "zero_stage 2, this run has 1"),
    "other batch": (replace(CASE, micro_batch=2), {}, "train_batch_size 4, this run has 2"),
    "other seed": (CASE, {"seed": 1}, "seed 0, this run has 1"),
    "other world size": (replace(CASE, ranks=4, size=4), {}, "world_size 2, this run has 4"),
    "other world size, same size": (replace(CASE, ranks=4, micro_batch=2), {}, "world_size 2, this run has 4"),
    "broken sample": (replace(CASE, steps=4), {"bad": (9,), "on_bad_sample": "fail"}, "row 9 is broken"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "options", "part"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refused_run_leaves_the_checkpoint_as_it_is(
    case: Case, options: dict[str, Any], part: str, trained: Path
) -> None:
    before = contents(trained)
    options = {"resume": True, "seed": 0, "bad": (), **options}
    source = HoleySource(same_samples().samples, options.pop("bad"))
    resume, seed = options.pop("resume"), options.pop("seed")
    errors = run(case.ranks, functools.partial(attempt, **options), case, trained, source, resume, seed)
    assert len(set(errors)) == 1 and part in errors[0], errors
    assert contents(trained) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "part"),
    [("", "give --resume"), ("--resume", "seed 0, this run has 7"), ("--resume", "in use by another run")],
)
def test_a_folder_is_refused_ahead_of_the_model(options: str, part: str, trained: Path, tmp_path: Path) -> None:
    """Which may take minutes to load, and is not there here."""
    file = write_config(tmp_path / "ds.json", ds_config(CASE.stage, CASE.batch, CASE.micro_batch), eval_examples=0)
    words = f"--ds_config {file} --model {tmp_path}/none --seed 7 --output_dir {trained} {options}".split()
    other = RunFolder(trained) if "in use" in part else None
    errors = run(2, finetune, words)
    if other is not None:
        other.close()
    assert len(set(errors)) == 1 and part in errors[0], errors


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_checkpoint_resumes_with_any_sequence_parallel_size(size: int, trained: Path, tmp_path: Path) -> None:
    """Also the proof that the refused runs above lost nothing: the losses are those of an unbroken run."""
    folder = tmp_path / "resumed"
    shutil.copytree(trained, folder)
    case = replace(CASE, size=size, micro_batch=4 * size // 2, steps=4)
    assert run(2, attempt, case, folder, same_samples(), True, 0) == ["", ""]
    expected = losses_on_one_rank(same_samples().samples, 4, 4, 4)
    assert metrics_in(folder) == pytest.approx(expected, rel=1e-5)
