"""The user's own data: rows, media, chat templates, labels, splits, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from ds_lvxattn.data.conversations import ConversationSource
from ds_lvxattn.data.media import MediaError, decode_frames, sample_indices
from ds_lvxattn.data.model_text import ModelText
from ds_lvxattn.data.sample import IGNORE, SampleError
from ds_lvxattn.needle.task import clip_path
from tests.support.conversations import END, IMAGE, LLAMA_3, TOKENIZER, make_tokenizer, write_video

# White space behind the end of a turn, as ChatML has it.
TRAILING = LLAMA_3.replace("'<|eot_id|>'", "'<|eot_id|>\\n'")
# Only the last answer is kept, as templates do that drop earlier reasoning.
FORGETFUL = LLAMA_3.replace("m.content | trim", "(m.content if loop.last else 'gone')")
REFUSING = "{{ raise_exception('roles must alternate') }}"

Row = dict[str, Any]


def grey(images: list[np.ndarray]) -> list[int]:
    """The frame numbers of ``write_video`` that the images show."""
    return [round(float(image.mean()) / 8) for image in images]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder: videos of 20 and 3 frames, a red and a blue picture, and a broken video."""
    (tmp_path / "media").mkdir()
    write_video(tmp_path / "media" / "long.mp4", 20)
    write_video(tmp_path / "media" / "short.mp4", 3)
    Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (8, 6), (0, 0, 255)).save(tmp_path / "blue.png")
    (tmp_path / "broken.mp4").write_bytes(b"not a video" * 100)
    return tmp_path


def chat(question: str = "what ?", answer: str = "red", **media: Any) -> Row:
    return {
        **media,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def source_of(folder: Path) -> Callable[..., ConversationSource]:
    """A source of the given rows, none held out."""

    def make(*rows: Row, tokenizer: PreTrainedTokenizerFast = TOKENIZER, **options: Any) -> ConversationSource:
        path = write_rows(folder / "data.jsonl", list(rows))
        options = {"text": ModelText(IMAGE), "max_frames": 8, "eval_share": 0.0, **options}
        return ConversationSource(path, tokenizer, **options)

    return make


def answers(sample: Any, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> list[str]:
    """The supervised runs of a sample as text; checks that labels are the tokens themselves."""
    runs, previous = [], IGNORE
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            runs.append([*runs.pop(), label] if previous != IGNORE else [label])
        previous = label
    return [tokenizer.decode(run) for run in runs]


def text_of(sample: Any) -> str:
    return TOKENIZER.decode(sample.input_ids)


# Media


def test_video_is_sampled_and_only_the_asked_frames_are_decoded(source_of, monkeypatch):
    sample = source_of(chat("<image>\nwhat ?", video="media/long.mp4")).sample(0)
    assert sample.num_frames == 8
    assert f"\n\n{IMAGE * 8}\nwhat ?{END}" in text_of(sample)
    assert answers(sample) == [f"red{END}"]

    decoded = []

    def record(path, indices, size):
        decoded.append((Path(path).name, list(indices)))
        return decode_frames(path, indices, size)

    monkeypatch.setattr("ds_lvxattn.data.media.medium.decode_frames", record)
    expected = sample_indices(20, 8)
    assert grey(sample.load_frames([5, 0])) == [expected[5], expected[0]]
    assert decoded == [("long.mp4", [expected[5], expected[0]])]
    assert sample.load_frames([]) == []


def test_tokens_that_the_model_has_no_embedding_of(source_of):
    """A token added to the tokenizer alone; the image token is not looked up, so it may be one."""
    image, header = (TOKENIZER.convert_tokens_to_ids(token) for token in (IMAGE, "<|start_header_id|>"))
    row = chat("what ?", video="media/long.mp4")
    for embeddings in (image, header):
        with pytest.raises(SampleError, match=rf"{header}, '<\|start_header_id\|>'.* embeddings of {embeddings} "):
            source_of(row, text=ModelText(IMAGE, embeddings=embeddings)).sample(0)
    assert image in source_of(row, text=ModelText(IMAGE, embeddings=len(TOKENIZER))).sample(0).input_ids


def test_real_clip(source_of):
    sample = source_of(chat(video=clip_path("bikes"))).sample(0)
    frames = sample.load_frames(range(sample.num_frames))
    assert len(frames) == 8
    assert all(frame.dtype == np.uint8 and frame.shape == frames[0].shape for frame in frames)
    assert not np.array_equal(frames[0], frames[-1])


def test_samples_can_be_pickled(source_of):
    sample = pickle.loads(pickle.dumps(source_of(chat(image="red.png")).sample(0)))
    assert sample.load_frames([0])[0].shape == (6, 8, 3)


def test_media_without_placeholder_go_first(source_of):
    sample = source_of(chat(video="media/short.mp4")).sample(0)
    assert sample.num_frames == 3  # the video has no more
    assert f"\n\n{IMAGE * 3}what ?" in text_of(sample)


def test_images_and_videos_of_a_row_in_the_order_of_the_text(source_of):
    row = chat("<video> then <|image|> then <image>", video="media/long.mp4", image=["red.png", "blue.png"])
    sample = source_of(row).sample(0)
    assert f"{IMAGE * 6} then {IMAGE} then {IMAGE}{END}" in text_of(sample)  # two frames of eight are images
    frames = sample.load_frames([7, 6, 2])
    assert frames[0][0, 0].tolist() == [0, 0, 255]
    assert frames[1][0, 0].tolist() == [255, 0, 0]
    assert grey(frames[2:]) == [sample_indices(20, 6)[2]]


def test_frames_a_second_by_the_config_or_by_the_row(source_of):
    rows = chat(video="media/long.mp4"), chat(video="media/long.mp4", fps=1, start=2)  # four seconds, five frames each
    source = source_of(*rows, fps=0.5)
    assert [source.sample(row).num_frames for row in (0, 1)] == [2, 2]
    assert grey(source.sample(0).load_frames([0, 1])) == [5, 15]
    assert grey(source.sample(1).load_frames([0, 1])) == [12, 17]


def test_videos_share_the_frame_budget(source_of):
    row = chat("<image> <image>", videos=["media/long.mp4", "media/long.mp4"])
    sample = source_of(row, max_frames=5).sample(0)
    assert f"{IMAGE * 3} {IMAGE * 2}" in text_of(sample)
    expected = [*sample_indices(20, 3), *sample_indices(20, 2)]
    assert grey(sample.load_frames(range(5))) == expected


def test_media_root(folder, source_of):
    sample = source_of(chat(video="short.mp4"), media_root=folder / "media").sample(0)
    assert sample.num_frames == 3


def test_text_only_rows_beside_rows_of_other_shapes(source_of):
    source = source_of(chat(), chat(video=None, image=[]), chat(image="red.png"), chat(video=["media/short.mp4"]))
    assert [source.sample(i).num_frames for i in range(4)] == [0, 0, 1, 3]


# Text and labels


def test_labels_of_several_turns(source_of):
    row = {
        "image": ["red.png", "blue.png"],
        "system": "be brief",
        "conversations": [
            {"from": "human", "value": "<image> colour ?"},
            {"from": "gpt", "value": "red"},
            {"from": "human", "value": "and <image> ?"},
            {"from": "gpt", "value": "sky blue é"},
        ],
    }
    sample = source_of(row).sample(0)
    assert answers(sample) == [f"red{END}", f"sky blue é{END}"]
    assert text_of(sample).startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{IMAGE} colour ?"
    )


def test_chat_layout_gives_the_same_sample(source_of):
    parts = [{"type": "image"}, {"type": "text", "text": "what ?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
    source = source_of({"image": "red.png", "messages": messages}, chat("<image>what ?", image="red.png"))
    assert source.sample(0).input_ids == source.sample(1).input_ids
    assert source.sample(0).labels == source.sample(1).labels


def test_white_space_of_the_template_is_no_answer(source_of):
    tokenizer = make_tokenizer(TRAILING)
    assert answers(source_of(chat(), tokenizer=tokenizer).sample(0), tokenizer) == [f"red{END}"]


def test_plain_template(source_of):
    tokenizer = make_tokenizer(None)
    row = chat("colour ?", "red", system="be brief")
    sample = source_of(row, tokenizer=tokenizer).sample(0)
    text = f"<|begin_of_text|>System: be brief\nUser: colour ?\nAssistant: red{END}\n"
    assert tokenizer.decode(sample.input_ids) == text
    # ": red" is one token here, which spans prompt and answer; it is supervised and nothing before it is.
    assert answers(sample, tokenizer) == [f": red{END}"]


def test_text_limit_names_row_length_and_limit(source_of):
    source = source_of(chat(), chat(answer="blue " * 50), max_text_tokens=100)
    assert len(source.sample(0).input_ids) <= 100
    with pytest.raises(SampleError, match=r"data\.jsonl, line 2: \d{3} tokens.*max_text_tokens is 100"):
        source.sample(1)


def test_a_frame_is_written_and_counted_as_the_model_has_it(source_of):
    row = chat("<image>what ?", image="red.png")
    text = ModelText(IMAGE, frame_text=f"[{IMAGE}]", frame_tokens=lambda size: (200,))
    sample = source_of(row, text=text).sample(0)
    assert f"[{IMAGE}]what ?" in text_of(sample) and len(sample.input_ids) < 100
    with pytest.raises(SampleError, match=r"2\d\d tokens, 200 of them for frames, but max_text_tokens is 200"):
        source_of(row, max_text_tokens=200, text=text).sample(0)


# Splits and order


def test_split_holds_out_whole_videos(source_of):
    rows = [chat(f"question {n}", video=f"{n % 20}.mp4") for n in range(60)]
    train, held_out = (source_of(*rows, split=split, eval_share=0.2) for split in ("train", "eval"))
    assert sorted(train.rows + held_out.rows) == list(range(60))
    videos = [{row % 20 for row in source.rows} for source in (train, held_out)]
    assert len(videos[1]) == 4 and not videos[0] & videos[1]

    # Neither the seed nor other rows move a video that was held out to the other side.
    again = source_of(*rows[::-1], split="eval", eval_share=0.2, seed=7)
    assert {19 - row % 20 for row in again.rows} == videos[1]


def test_separate_evaluation_file(folder, source_of):
    other = write_rows(folder / "eval.jsonl", [chat("other ?")])
    options = {"eval_data": other, "eval_share": 0.5}
    assert len(source_of(chat(), chat(), split="train", **options)) == 2
    held_out = source_of(chat(), split="eval", **options)
    assert len(held_out) == 1 and "other ?" in text_of(held_out.sample(0))


def test_limit_spreads_over_the_rows(source_of):
    assert source_of(*[chat()] * 10, limit=2).rows == [2, 7]


def test_order_depends_on_seed_and_epoch_alone(source_of):
    orders = [list(source_of(*[chat()] * 30, seed=seed).order(epoch)) for seed in (0, 1) for epoch in (0, 1, 0)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert orders[0] == orders[2] and orders[3] == orders[5]
    assert len({tuple(order) for order in orders}) == 4


def test_loading_touches_no_media(source_of):
    source = source_of(chat(video="missing.mp4"), chat())
    assert len(source) == 2 and source.sample(1).num_frames == 0


# Formats


def test_json_list_and_blank_lines(folder):
    options = {"text": ModelText(IMAGE), "max_frames": 8, "eval_share": 0.0}
    as_list = folder / "list.json"
    as_list.write_text(json.dumps([chat(), chat(image="red.png")], indent=2))
    lines = folder / "lines.jsonl"
    lines.write_text("\n" + json.dumps(chat()) + "\n\n  \n" + json.dumps(chat(image="red.png")) + "\n\n")
    for path, second in ((as_list, "row 2"), (lines, "line 5")):
        source = ConversationSource(path, TOKENIZER, **options)
        assert len(source) == 2
        sample = source.sample(1)
        assert sample.num_frames == 1 and sample.name == f"{path}, {second}"


def test_a_changed_file_is_read_again(folder, source_of):
    assert len(source_of(chat())) == 1
    assert len(source_of(chat(), chat(), chat())) == 3


def test_hub_dataset_with_paths(folder):
    rows = [{"video": None, **chat()}, chat(video="media/short.mp4"), chat(video="media/long.mp4")]
    (folder / "hub").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "hub" / "train.parquet"))
    options = {"text": ModelText(IMAGE), "max_frames": 4, "media_root": folder, "eval_share": 0.34}
    train, held_out = (
        ConversationSource(str(folder / "hub"), TOKENIZER, split=split, **options) for split in ("train", "eval")
    )
    assert sorted(train.rows + held_out.rows) == [0, 1, 2]
    counts = {source.rows[i]: source.sample(i).num_frames for source in (train, held_out) for i in range(len(source))}
    assert counts == {0: 0, 1: 3, 2: 4}
    with pytest.raises(ValueError, match="neither a file nor a dataset"):
        ConversationSource(f"{folder / 'hub'}:nosuchsplit", TOKENIZER, **options)


def test_hub_dataset_with_embedded_images(folder):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "conversations": [{k: datasets.Value("string") for k in ("from", "value")}],
        }
    )
    embedded = [{"bytes": (folder / "red.png").read_bytes()}, {"bytes": b"not an image"}]
    rows = {"image": embedded, "conversations": [chat()["conversations"]] * 2}
    (folder / "hub").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "hub" / "train.parquet"))
    source = ConversationSource(f"{folder / 'hub'}:train", TOKENIZER, ModelText(IMAGE), max_frames=4, eval_share=0.0)
    assert source.sample(0).load_frames([0])[0][0, 0].tolist() == [255, 0, 0]
    with pytest.raises(SampleError, match="embedded image cannot be decoded"):
        source.sample(1).load_frames([0])


# Refusals

NO_ROLE = {"conversations": [{"from": "robot", "value": "hi"}]}
NO_VALUE = {"conversations": [{"from": "human"}]}
BAD_PART = {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}
NO_ANSWER = {"conversations": [{"from": "human", "value": "hi"}]}
NO_USER = {"image": "red.png", "conversations": [{"from": "gpt", "value": "red"}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"video": "media/long.mp4"},
            r"no 'conversations' \(or 'messages'\); the row has the keys \['video'\]",
        ),
        ({"conversations": []}, "no 'conversations'"),
        ({"conversations": ["hi"]}, "a turn is 'hi'"),
        (NO_ROLE, "a turn is from 'robot'; choose one of"),
        (NO_VALUE, "a turn holds None"),
        (BAD_PART, "a turn holds .*audio"),
        (NO_ANSWER, "no answer"),
        (NO_USER, "no turn of the user"),
        (chat("<image> <image>", image="red.png"), "2 placeholders .* for 1 images and videos"),
        (chat("<image>", image=["red.png", "blue.png"]), "1 placeholders .* for 2 images and videos"),
        (chat("<video>"), "1 placeholders .* for 0"),
        (chat(answer=f"here: {IMAGE}", image="red.png"), "2 image tokens for 1 frames"),
        (chat(video="missing.mp4"), "missing.mp4: No such file"),
        (chat(video="broken.mp4"), "broken.mp4: cannot decode"),
        (chat(image=3), "media is a int"),
        (chat(image=["red.png"] * 9), "9 images and videos, but max_frames is 8"),
    ],
)
def test_unusable_rows(source_of, row, message):
    source = source_of(chat(), row)
    with pytest.raises(SampleError, match=rf"data\.jsonl, line 2: .*{message}"):
        source.sample(1)


@pytest.mark.parametrize(
    ("template", "message"),
    [(FORGETFUL, "rewrites the conversation around turn 2"), (REFUSING, "must alternate")],
)
def test_unusable_templates(source_of, template, message):
    row = {"conversations": chat()["conversations"] * 2}
    with pytest.raises(SampleError, match=message):
        source_of(row, tokenizer=make_tokenizer(template)).sample(0)


def test_broken_media_are_sample_errors():
    assert issubclass(MediaError, SampleError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"[]", "is empty"),
        (b"[1]", "row 1: holds a int, not an object"),
        (b"[{]", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read: .*; write it as UTF-8"),
        (b'{"conversations": []}\nnot json\n', "line 2: not JSON"),
        (b'{"conversations": []}\n\n[1, 2]\n', "line 3: holds a list, not an object"),
    ],
)
def test_unusable_files(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        ConversationSource(path, TOKENIZER, ModelText(IMAGE), max_frames=8)
    assert not isinstance(caught.value, SampleError) and str(path) in str(caught.value)


def test_unusable_settings(folder, source_of):
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        ConversationSource(folder / "nowhere.jsonl", TOKENIZER, ModelText(IMAGE), max_frames=8)
    with pytest.raises(ValueError, match="eval_share is 1"):
        source_of(chat(), eval_share=1)
    with pytest.raises(ValueError, match="the train split is empty: eval_share 0.5 holds out 1 of 1 videos"):
        source_of(chat(), eval_share=0.5)
    with pytest.raises(ValueError, match="the eval split is empty"):
        source_of(chat(), split="eval", eval_share=0.0)
    with pytest.raises(ValueError, match="no token '<frame>'"):
        source_of(chat(), text=ModelText("<frame>"))


def test_a_model_without_frames_takes_rows_without_media(source_of):
    source = source_of(chat(), chat(image="red.png"), text=ModelText(None))
    assert source.sample(0).num_frames == 0
    with pytest.raises(SampleError, match="line 2: 1 images and videos, and the model takes text alone"):
        source.sample(1)


def test_the_digest_tells_rows_apart(source_of):
    digest, same, other = (source_of(chat(answer=answer)).digest for answer in ("red", "red", "blue"))
    assert digest == same != other
    assert source_of(chat(), chat()).digest.startswith("2 rows, ")
