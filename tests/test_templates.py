"""Chat templates: those that take strings, those that walk content parts, and those that lose text."""

from __future__ import annotations

from typing import Any

import pytest

from ds_lvxattn.data.chat import WrittenVideos, encode, render
from ds_lvxattn.data.sample import SampleError
from ds_lvxattn.needle.task import IMAGE, build_tokenizer

WALKS = (
    "{% for m in messages %}{{ m.role }}: "
    "{% for part in m.content | selectattr('type', 'equalto', 'image') %}<|image|>{% endfor %}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRINGS = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
BOTH = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text if part.type == 'text' else 'x' }}{% endfor %}{% endif %} {% endfor %}"
)
CHAT = [
    {"role": "user", "content": f"{IMAGE}{IMAGE}which digit ?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "which digit ?"},
    {"role": "assistant", "content": "5"},
]


def tokenizer_with(template: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [WALKS, STRINGS, BOTH])
def test_a_template_gets_what_it_takes(template: str) -> None:
    text = render(CHAT, tokenizer_with(template), frame_text=IMAGE)
    assert text == f"user: {IMAGE}{IMAGE}which digit ? assistant: 3 user: which digit ? assistant: 5 "


def test_answers_are_found_where_a_template_walks_parts() -> None:
    tokenizer = tokenizer_with(WALKS)
    ids, labels = encode(CHAT, tokenizer, IMAGE)
    assert ids.count(tokenizer.convert_tokens_to_ids(IMAGE)) == 2
    assert tokenizer.decode([label for label in labels if label >= 0]) == "3 5"


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{% for m in messages %}{{ m.role }} {% endfor %}", "which"),
        ("{% for m in messages %}{% if loop.first or m.role == 'user' %}{{ m.content }} {% endif %}{% endfor %}", "3"),
    ],
)
def test_a_template_that_loses_text_makes_a_row_bad(template: str, word: str) -> None:
    with pytest.raises(SampleError, match=f"leaves the word '{word}' of the conversation out"):
        encode(CHAT, tokenizer_with(template), IMAGE)


def test_a_template_that_refuses_is_an_error() -> None:
    with pytest.raises(SampleError, match="refuses the conversation: no"):
        render(CHAT, tokenizer_with("{{ raise_exception('no') }}"))


def test_images_and_videos_in_another_order_than_the_row_make_it_bad() -> None:
    videos = WrittenVideos("<video>", "<video>", (IMAGE * 2,), IMAGE, (True, False))  # a video, then an image
    assert videos.put_into(f"<video> and {IMAGE}") == f"{IMAGE}{IMAGE} and {IMAGE}"
    with pytest.raises(SampleError, match="in another order than the row"):
        videos.put_into(f"{IMAGE}<video> and")
