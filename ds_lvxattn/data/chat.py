"""A conversation as token ids and labels, by the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ds_lvxattn.data.sample import IGNORE, SampleError

Message = dict[str, Any]  # role and content, as chat templates take them

# For a tokenizer without a chat template.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message.role | capitalize }}: {{ message.content | trim }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    """The text of a conversation; with ``prompt``, up to where the assistant's answer begins.

    Raises:
        SampleError: the template refuses the conversation.
    """
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        )
    except Exception as error:  # a template is a program of its own, which may fail in any way
        raise SampleError(f"the chat template refuses the conversation: {error or type(error).__name__}") from error


def encode(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels that mask all but the answers and their end-of-turn tokens.

    Few chat templates mark the answers, so they are found by rendering: an answer is what a turn of the
    assistant adds to the conversation before it and its generation prompt. That is done on text and carried
    to tokens by their character offsets, so a token that spans prompt and answer does no harm: it is a label.

    Raises:
        SampleError: the template refuses the conversation, or rewrites earlier turns when later ones follow.
    """
    answers = []
    text = render(messages, tokenizer)
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(messages[:at], tokenizer, prompt=True)
            answered = render(messages[: at + 1], tokenizer)
            if not (answered.startswith(prompt) and text.startswith(answered)):
                raise SampleError(
                    f"the chat template rewrites the conversation around turn {at + 1}, so the answer "
                    "cannot be told from the prompt; use a template that only appends"
                )
            # White space behind the end-of-turn token belongs to the template.
            answers.append((len(prompt), len(answered.rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    input_ids = encoded["input_ids"]
    begin, end = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    is_answer = np.zeros(len(input_ids), dtype=bool)
    for start, stop in answers:
        is_answer |= (begin < stop) & (end > start)
    return input_ids, np.where(is_answer, input_ids, IGNORE).tolist()
