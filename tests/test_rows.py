"""Layouts of rows: what other tools write becomes turns with media in their places, or one clear error."""

from __future__ import annotations

import base64
import csv
import json
import logging
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_lvxattn.data.conversations import ConversationSource
from ds_lvxattn.data.model_text import ModelText
from ds_lvxattn.data.rows import read_row, unknown_keys
from ds_lvxattn.data.sample import SampleError
from ds_lvxattn.data.table import open_table
from ds_lvxattn.data.turns import MediaRef
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.hf.rows import as_dataset
from tests.support.conversations import IMAGE, TOKENIZER

ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "Grey."}]}


def asked(content: Any, **others: Any) -> dict[str, Any]:
    return {**others, "messages": [{"role": "user", "content": content}, ANSWER]}


def shown(row: dict[str, Any]) -> list[Any]:
    """Role and parts of the turns; a medium by its kind and source."""
    return [
        (turn.role, *[(p.kind, p.source) if isinstance(p, MediaRef) else p for p in turn.parts])
        for turn in read_row(row)
    ]


GREY = ("assistant", "Grey.")
CLIP, PICTURE = ("video", "a.mp4"), ("image", "a.png")
PNG = base64.b64encode(b"pixels").decode()


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        # Media inside parts.
        (asked([{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]), [("user", CLIP, "What?")]),
        (asked([{"type": "image_url", "image_url": {"url": "a.png"}}, "What?"]), [("user", PICTURE, "What?")]),
        (asked([{"type": "image", "url": "a.png"}]), [("user", PICTURE)]),
        (asked([{"type": "image", "path": "a.png", "image": None}]), [("user", PICTURE)]),
        (asked([{"type": "image", "base64": PNG}]), [("user", ("image", b"pixels"))]),
        (asked([{"type": "image_url", "image_url": f"data:image/png;base64,{PNG}"}]), [("user", ("image", b"pixels"))]),
        (asked({"type": "text", "text": "hi"}), [("user", "hi")]),
        (
            asked([{"type": "video", "video": ["1.png", "2.png"]}, {"type": "text", "text": "?"}]),
            [("user", ("video", ("1.png", "2.png")), "?")],
        ),
        # Media beside the turns.
        (asked("<video>What?", video="file://a.mp4"), [("user", CLIP, "What?")]),
        (asked("What?", video="file://localhost/d/a.mp4"), [("user", ("video", "/d/a.mp4"), "What?")]),
        ({"messages": json.dumps(asked("hi")["messages"])}, [("user", "hi")]),
        (asked("What?", video="file:///d/a%20b.mp4"), [("user", ("video", "/d/a b.mp4"), "What?")]),
        (asked("<video>?", videos=[["1.png", "2.png"]]), [("user", ("video", ("1.png", "2.png")), "?")]),
        (asked("<video>?", video=["1.png", "2.png"]), [("user", ("video", ("1.png", "2.png")), "?")]),
        (asked("<video>\n<video>?", video=["a.mp4", "a.mp4"]), [("user", CLIP, "\n", CLIP, "?")]),
        (asked([{"type": "image"}, {"type": "text", "text": "?"}], image="a.png"), [("user", PICTURE, "?")]),
        (asked("a <image> b", video="a.mp4"), [("user", "a ", CLIP, " b")]),
        # Tags that are text.
        (asked("Which attributes has the tag <video>?"), [("user", "Which attributes has the tag <video>?")]),
        (asked("<video>\nIs <image> the tag?", video="a.mp4"), [("user", CLIP, "\nIs <image> the tag?")]),
        (asked("Is <image> it?\n<image>", image="a.png"), [("user", "Is <image> it?\n", PICTURE)]),
        (
            asked([{"type": "image", "image": "a.png"}, {"type": "text", "text": "Is it <image>?"}]),
            [("user", PICTURE, "Is it <image>?")],
        ),
        # Roles.
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "{}"}, ANSWER]},
            [("user", "hi"), ("tool", "{}")],
        ),
        (asked("hi", system=[{"type": "text", "text": "Be brief."}]), [("system", "Be brief."), ("user", "hi")]),
        ({"messages": [{"role": "developer", "content": "Be."}, ANSWER]}, [("system", "Be.")]),
        # Pairs.
        ({"prompt": "hi", "completion": "Grey."}, [("user", "hi")]),
        ({"prompt": [{"role": "user", "content": "hi"}], "completion": [ANSWER]}, [("user", "hi")]),
        ({"query": "<image>hi", "response": "Grey.", "images": ["a.png"]}, [("user", PICTURE, "hi")]),
        (
            {"query": "c", "response": "Grey.", "history": [["a", "b"]]},
            [("user", "a"), ("assistant", "b"), ("user", "c")],
        ),
        ({"instruction": "a", "input": "b", "output": "Grey."}, [("user", "a\nb")]),
        ({"question": "a", "answer": "Grey."}, [("user", "a")]),
        (
            {"question": "a?", "options": ["A. Black.", "Grey."], "answer": "Grey."},
            [("user", "a?\nA. Black.\nB. Grey.\nAnswer with the letter of the best option alone.")],
        ),
    ],
)  # fmt: skip
def test_layouts(row, turns):
    assert shown(row) == [*turns, GREY]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": ["user"], "content": "hi"}, ANSWER]}, r"a turn is from \['user'\]"),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]},
            "a turn holds None",
        ),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]},
            "an answer is empty",
        ),
        ({"messages": {"role": "user"}}, "the turns are a dict"),
        ({"messages": "hi"}, "the turns are a text that is not JSON"),
        (asked("hi", video=7), "media is a int"),
        (asked("hi", image="https://example.org/a.png"), "is a URL, which is not read"),
        (asked([{"type": "image", "image": ["a.png", "b.png"]}]), "an image is a list"),
        (asked([{"type": "image_url", "image_url": "data:image/png;base64,?"}]), "is not base64"),
        (asked([{"type": "audio", "audio": "a.wav"}]), "a turn holds .*text, image or video, not audio"),
        (asked("hi", video="a.mp4", audios=["a.wav"]), "'audios' asks for audio, which no model is given"),
        (asked("hi", video="a.mp4", use_audio_in_video=True), "'use_audio_in_video' asks for audio"),
        (asked([{"type": "video", "video": "a.mp4", "use_audio_in_video": True}]), "'use_audio_in_video' asks"),
        (asked("<video>\nWhat?"), "1 placeholders .* for 0 images and videos"),
        (asked("<image> <image> x <image>", image=["a.png", "b.png"]), "3 placeholders .* for 2"),
        (asked([{"type": "image"}, "?"]), "1 placeholders .* for 0"),
        (asked([{"type": "image"}, {"type": "image", "image": "a.png"}]), "1 placeholders .* for 0"),
        (asked("hi", video="a.mp4", fps="fast"), "'fps' is 'fast'"),
        (asked("hi", video="a.mp4", fps=0), "'fps' is 0, which takes no frame"),
        (asked("hi", video="a.mp4", nframes=0), "'nframes' is 0, which takes no frame"),
        (asked("hi", video="a.mp4", start=3, end=2), "'end' is 2, which is not behind 'start' 3"),
        (asked("hi", video="a.mp4", sha256="12"), "'sha256' is '12'; give 64 hexadecimal digits"),
        (asked("hi", images=["a.png", "b.png"], sha256=["0" * 64]), "'sha256' is .* for 2 images and videos"),
        (asked("hi", video="a.mp4", sha256=7), "'sha256' is 7; give 64"),
        (asked("cut \ud83d"), "half of a pair of surrogates"),
        ({"query": "c", "response": "d", "history": ["a"]}, "'history' holds 'a'"),
        ({"messages": [ANSWER, {"role": "user", "content": "hi"}]}, "the first turn is an answer"),
        (
            {"question": "a?", "options": ["x", "y"], "answer": "(C)"},
            r"'\(C\)', and the 2 options have other letters",
        ),
        (
            asked([{"type": "picture", "data": "A" * 10**6}]),
            r"^a turn holds .*\[... 999\d+ characters ...\] A+'}; give",
        ),
        # Media that would be missed in silence.
        *(
            ({"prompt": "hi", "completion": "red", key: "a"}, f"the key '{key}' is not read.*; rename it to {right}")
            for key, right in (
                ("video_path", "'video'"),
                ("Video", "'video'"),
                ("clips", "'video'"),
                ("img", "'image'"),
                ("image-urls", "'image'"),
                ("media", "'image' or 'video'"),
            )
        ),
        ({"prompt": "hi", "completion": "red", "imgs": [{"bytes": b"a", "path": None}]}, "the key 'imgs' is not read"),
        (asked("Picture 1: <img>a b.png</img>\nhi"), "write <image> in its place"),
        ({"question": "hi", "answer": ["yes", "yeah"]}, "'answer' holds 2 texts"),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "image"}]}]},
            "media stand in the user's turns",
        ),
    ],
)
def test_refusals(row, message):
    with pytest.raises(SampleError, match=message):
        read_row(row)


def test_checksums_stand_beside_their_media():
    one, other = "0a" * 32, "0B" * 32
    for row in (
        asked("hi", images=["a.png", "b.png"], sha256=[one, other]),
        asked("hi", images=[{"path": "a.png", "sha256": one}, {"path": "b.png", "sha256": other}]),
        asked([{"type": "image", "image": name, "sha256": x} for name, x in (("a.png", one), ("b.png", other))]),
    ):
        media = [part for part in read_row(row)[0].parts if not isinstance(part, str)]
        assert [medium.sha256 for medium in media] == [(one,), (other.lower(),)]
    [turn, _] = read_row(asked("hi", video=["a.png", "b.png"], sha256=[[one, other]]))
    assert turn.parts[0].sha256 == (one, other.lower())
    assert read_row(asked("hi", video="a.mp4", sha256=None))[0].parts[0].sha256 == ()


def test_sampling_of_a_row_and_of_a_part():
    [turn, _] = read_row(asked([{"type": "video", "video": "a.mp4", "fps": 2.0, "video_start": 1, "nframes": 4}]))
    assert turn.parts[0].sampling == {"fps": 2.0, "start": 1, "frames": 4}
    [turn, _] = read_row(asked("hi", video="a.mp4", image="a.png", start=1, end=2.5))
    assert [part.sampling for part in turn.parts[:2]] == [{}, {"start": 1, "end": 2.5}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "query",
        "response",
        "history",
        "image",
        "videos",
        "system",
        "fps",
    ]
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "video", "image_url"])},
    optional={"text": JSON, "image": JSON, "image_url": JSON, "url": JSON},
)
ROLE = st.sampled_from(["user", "assistant", "tool"]) | JSON
TURN = st.fixed_dictionaries({"role": ROLE, "content": st.lists(PART | JSON) | JSON})


@given(st.dictionaries(KEYS, JSON | st.lists(TURN, max_size=3), max_size=5))
def test_any_row_is_read_or_refused(row):
    try:
        turns = read_row(row)
    except SampleError as error:
        assert str(error)
    else:
        assert any(turn.role == "assistant" for turn in turns)


def test_a_byte_order_mark_and_keys_that_nothing_reads(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "hi", "completion": "red", "vidoe": "a.mp4"}] * 2
    path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)))
    source = ConversationSource(path, TOKENIZER, ModelText(IMAGE), max_frames=8, eval_share=0.0)
    with caplog.at_level(logging.WARNING):
        assert [source.sample(i).num_frames for i in (0, 1)] == [0, 0]
    assert [record.message for record in caplog.records] == [f"{path}, line 1: the keys ['vidoe'] are not read"]


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        (asked("hi", messages_en=None, video=[{"path": "a.mp4", "begin": 0}]), {"video.begin"}),
        ({**asked("hi"), "prompt": "hi", "options": []}, {"prompt"}),
        ({"query": "hi", "response": "red", "input": "a"}, {"input"}),
        ({"conversations": [{"from": "human", "value": "hi"}, {**ANSWER, "weight": 0}]}, {"conversations[].weight"}),
        (
            asked([{"type": "video", "video": "a.mp4", "fps": 1, "max_pixels": 9}, {"type": "text", "text": "hi"}]),
            {"messages[].content[].max_pixels"},
        ),
        ({"instruction": "a", "input": "b", "output": "c", "history": [], "system": "s"}, set()),
    ],
)
def test_keys_that_nothing_reads_wherever_they_stand(row, unread):
    assert unknown_keys(row) == unread
    assert read_row(row)


def test_other_names_beside_media_that_are_read_or_of_nothing():
    for row in (asked("hi", video="a.mp4", video_url="b"), asked("hi", img="", frames=16, video_id="a", media=[None])):
        assert read_row(row)


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_tables_in_text(tmp_path, suffix, separator):
    path = tmp_path / f"rows{suffix}"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(
            [["video", "question", "answer", "fps"], ["a.mp4", 'a,\t"b"\nc', "3", "2"], ["", "NA", "None", ""]]
        )
    table = open_table(path)
    [asks, answers] = read_row(table.row(0))
    assert answers.parts == ("3",) and asks.parts[1] == 'a,\t"b"\nc' and asks.parts[0].sampling == {"fps": 2.0}
    assert [turn.parts for turn in read_row(table.row(1))] == [("NA",), ("None",)]
    path.write_bytes("question\né".encode("latin-1"))
    with pytest.raises(ValueError, match="cannot be read.*(?i:utf-8)"):
        open_table(path)
    with pytest.raises(ValueError, match=r"a file has no splits; give"):
        open_table(f"{path}:train")


def test_what_save_to_disk_wrote(tmp_path):
    rows = datasets.Dataset.from_dict({"query": ["a", "b"], "response": ["c", "d"]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    for name, first in (("one", "a"), ("two", "a"), ("two:test", "b")):
        assert open_table(f"{tmp_path}/{name}").row(0)["query"] == first
    for name, message in (("one:train", "saved without splits"), ("two:eval", r"of the splits \['test', 'train'\]")):
        with pytest.raises(ValueError, match=message):
            open_table(f"{tmp_path}/{name}")
    rows.select([]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="the dataset is empty"):
        open_table(tmp_path / "none.parquet")


def test_rows_that_python_itself_gives_up_on_are_bad_samples(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "hi", "completion": "red"}\n{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    source = ConversationSource(path, TOKENIZER, ModelText(IMAGE), max_frames=8, eval_share=0.0)
    assert len(source) == 2 and source.sample(0).num_frames == 0
    with pytest.raises((SampleError, RecursionError)):
        source.sample(1)


def test_what_has_no_rows_by_number_is_refused_by_name():
    rows = datasets.Dataset.from_dict({"query": ["a"], "response": ["b"]})
    for data, message in (
        (rows.to_iterable_dataset(), "a streaming dataset .* load it without streaming=True"),
        (datasets.DatasetDict(train=rows, test=rows), r"splits \['test', 'train'\]; give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            open_table(data)
        with pytest.raises(ConfigError, match=message):
            as_dataset(data)
