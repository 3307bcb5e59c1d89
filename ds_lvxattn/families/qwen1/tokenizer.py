"""The tokenizer of Qwen-VL as a fast one, from the ``qwen.tiktoken`` that published checkpoints have."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.hub import cached_file

from ds_lvxattn.families.qwen1.config import QWenConfig

# Where a text is cut ahead of the merging of bytes: contractions, words, single digits, signs, white space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OF_FILES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Behind the ranks, in the order of their ids; the last three stand for an image.
SPECIAL = (
    END, TURN, TURN_END, *(f"<|extra_{number}|>" for number in range(205)),
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>",
)  # fmt: skip
TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ids of byte strings, from a file with one in base64 and its id a line.

    Raises:
        ValueError: a line is something else, by its number.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no base64 string with its rank") from error
    return ranks


def byte_level_tokenizer(ranks: Mapping[bytes, int]) -> Tokenizer:
    """The tokenizer that joins neighbouring bytes by ``ranks``, with ``SPECIAL`` behind them."""
    letters = bytes_to_unicode()

    def shown(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    def merges() -> Iterator[tuple[str, str]]:
        for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
            halves = ((token[:at], token[at:]) for at in range(1, len(token)))
            known = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
            # That which the merging of bytes comes to first comes first.
            yield from ((shown(a), shown(b)) for a, b in sorted(known, key=lambda x: (ranks[x[0]], ranks[x[1]])))

    vocabulary = {shown(token): rank for token, rank in ranks.items()}
    made = Tokenizer(models.BPE(vocabulary, list(merges()), fuse_unk=False, byte_fallback=False))
    made.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([cut, as_letters])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


class QWenTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of a published checkpoint, known by the name that its files give it; see ``from_pretrained``."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *init_inputs: Any, **kwargs: Any) -> Any:
        """As of transformers. What ``qwen.tiktoken`` makes is saved as a fast tokenizer like any other.

        Raises:
            OSError: there is neither that file nor a fast tokenizer.
            ValueError: see ``read_ranks``.
        """
        name = pretrained_model_name_or_path
        options = {key: kwargs[key] for key in OF_FILES if key in kwargs}
        if cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **options) is not None:
            return PreTrainedTokenizerFast.from_pretrained(name, *init_inputs, **kwargs)
        file = cached_file(name, "qwen.tiktoken", **options)
        assert file is not None  # it raises
        # A turn of the assistant ends so, and a text that is padded goes on with the other.
        return PreTrainedTokenizerFast(
            tokenizer_object=byte_level_tokenizer(read_ranks(Path(file))), eos_token=TURN_END, pad_token=END,
            chat_template=TEMPLATE,
        )  # fmt: skip


AutoTokenizer.register(QWenConfig, fast_tokenizer_class=QWenTokenizer, exist_ok=True)
