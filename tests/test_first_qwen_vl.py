"""The first Qwen-VL: against plain formulas, and as its checkpoints are published."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_lvxattn.data.sample import FrameShape, SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import family_of
from ds_lvxattn.families.qwen1 import vision
from ds_lvxattn.families.qwen1.config import QWenConfig
from ds_lvxattn.families.qwen1.family import Qwen1VL
from ds_lvxattn.families.qwen1.model import QWenLMHeadModel
from ds_lvxattn.families.qwen1.tokenizer import PATTERN, SPECIAL, QWenTokenizer, byte_level_tokenizer, read_ranks
from ds_lvxattn.training.check_data import encode_for
from ds_lvxattn.training.dataset import text_of_model
from ds_lvxattn.training.loading import load_model
from tests.support import qwen_vl_resampler
from tests.support.parity import norms_in_float64
from tests.support.tiny_families import tiny

# Parameters of a published checkpoint, of its first layers, with their sizes.
PUBLISHED = {
    "transformer.wte.weight": (151936, 4096),
    "transformer.h.31.ln_1.weight": (4096,),
    "transformer.h.31.attn.c_attn.weight": (12288, 4096),
    "transformer.h.31.attn.c_attn.bias": (12288,),
    "transformer.h.31.attn.c_proj.weight": (4096, 4096),
    "transformer.h.31.ln_2.weight": (4096,),
    "transformer.h.31.mlp.w1.weight": (11008, 4096),
    "transformer.h.31.mlp.w2.weight": (11008, 4096),
    "transformer.h.31.mlp.c_proj.weight": (4096, 11008),
    "transformer.ln_f.weight": (4096,),
    "transformer.visual.positional_embedding": (256, 1664),
    "transformer.visual.proj": (4096, 4096),
    "transformer.visual.conv1.weight": (1664, 3, 14, 14),
    "transformer.visual.ln_pre.weight": (1664,),
    "transformer.visual.ln_pre.bias": (1664,),
    "transformer.visual.transformer.resblocks.47.ln_1.weight": (1664,),
    "transformer.visual.transformer.resblocks.47.ln_1.bias": (1664,),
    "transformer.visual.transformer.resblocks.47.ln_2.weight": (1664,),
    "transformer.visual.transformer.resblocks.47.ln_2.bias": (1664,),
    "transformer.visual.transformer.resblocks.47.attn.in_proj.weight": (4992, 1664),
    "transformer.visual.transformer.resblocks.47.attn.in_proj.bias": (4992,),
    "transformer.visual.transformer.resblocks.47.attn.out_proj.weight": (1664, 1664),
    "transformer.visual.transformer.resblocks.47.attn.out_proj.bias": (1664,),
    "transformer.visual.transformer.resblocks.47.mlp.c_fc.weight": (8192, 1664),
    "transformer.visual.transformer.resblocks.47.mlp.c_fc.bias": (8192,),
    "transformer.visual.transformer.resblocks.47.mlp.c_proj.weight": (1664, 8192),
    "transformer.visual.transformer.resblocks.47.mlp.c_proj.bias": (1664,),
    "transformer.visual.attn_pool.pos_embed": (256, 4096),
    "transformer.visual.attn_pool.query": (256, 4096),
    "transformer.visual.attn_pool.kv_proj.weight": (4096, 1664),
    "transformer.visual.attn_pool.attn.in_proj_weight": (12288, 4096),
    "transformer.visual.attn_pool.attn.in_proj_bias": (12288,),
    "transformer.visual.attn_pool.attn.out_proj.weight": (4096, 4096),
    "transformer.visual.attn_pool.attn.out_proj.bias": (4096,),
    "transformer.visual.attn_pool.ln_q.weight": (4096,),
    "transformer.visual.attn_pool.ln_q.bias": (4096,),
    "transformer.visual.attn_pool.ln_kv.weight": (4096,),
    "transformer.visual.attn_pool.ln_kv.bias": (4096,),
    "transformer.visual.ln_post.weight": (4096,),
    "transformer.visual.ln_post.bias": (4096,),
    "lm_head.weight": (151936, 4096),
}


def test_parameters_are_those_of_published_checkpoints() -> None:
    with torch.device("meta"):
        model = QWenLMHeadModel(QWenConfig())
    made = {name: tuple(p.shape) for name, p in model.named_parameters()}
    last = {key: size for key, size in made.items() if not any(f".{part}." in key for part in others())}
    assert last == PUBLISHED
    assert model.transformer.visual.attn_pool.attn.num_heads == 32
    assert model.config.image_token_id == 151859


def others() -> list[str]:
    """All layers but the last of each kind."""
    return [f"h.{number}" for number in range(31)] + [f"resblocks.{number}" for number in range(47)]


def logits_of(model: Any, ids: Tensor, scaled: bool) -> Tensor:
    """Of a row of text, by plain formulas, one head after another."""
    config, weights = model.config, dict(model.named_parameters())
    size, places = config.kv_channels, torch.arange(len(ids), dtype=torch.float64)
    rates = torch.stack([places / config.rotary_emb_base ** (2 * i / size) for i in range(size // 2)], dim=1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt() * weights[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        a, b = x[:, : size // 2], x[:, size // 2 :]
        cos, sin = rates.cos(), rates.sin()
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=1)

    x = weights["transformer.wte.weight"][ids]
    hidden = places[:, None] < places
    further = torch.tensor([max(1.0, math.log(n + 1, config.seq_length)) for n in range(len(ids))])[:, None]
    for number in range(config.num_hidden_layers):
        name = f"transformer.h.{number}"
        made = norm(x, f"{name}.ln_1") @ weights[f"{name}.attn.c_attn.weight"].T + weights[f"{name}.attn.c_attn.bias"]
        q, k, v = made.split(size * config.num_attention_heads, dim=1)
        heads = []
        for head in range(config.num_attention_heads):
            own = slice(head * size, (head + 1) * size)
            query = turned(q[:, own]) * (further if scaled else 1)
            scores = (query @ turned(k[:, own]).T / size**0.5).masked_fill(hidden, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, own])
        x = x + torch.cat(heads, dim=1) @ weights[f"{name}.attn.c_proj.weight"].T
        gated = norm(x, f"{name}.ln_2")
        gate = gated @ weights[f"{name}.mlp.w2.weight"].T
        up = gated @ weights[f"{name}.mlp.w1.weight"].T
        x = x + (up * gate * gate.sigmoid()) @ weights[f"{name}.mlp.c_proj.weight"].T
    return norm(x, "transformer.ln_f") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("trains", [True, False])
def test_logits_are_those_of_the_plain_formulas(trains: bool) -> None:
    """Outside training, queries behind the longest text of the training are scaled."""
    model: Any = norms_in_float64(tiny("qwen-vl", torch.float64).train(trains))
    model.config.seq_length, model.config.use_dynamic_ntk = 5, False
    ids = torch.randint(model.config.vocab_size - 3, (11,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids[None]).logits[0], logits_of(model, ids, scaled=not trains))


def test_the_resampler_is_that_of_the_published_code() -> None:
    ours = nn.Module.to(vision.VisionResampler(9, 24, 3, 16), torch.float64)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs = nn.Module.to(qwen_vl_resampler.Resampler(3, 24, 3, 16), torch.float64)
    theirs.load_state_dict(ours.state_dict())
    theirs.ln_q.eps = theirs.ln_kv.eps = vision.EPSILON
    for patches, tolerance in ((9, 1e-12), (36, 1e-6)):  # theirs resizes positions in float32
        features = torch.randn(2, patches, 16, dtype=torch.float64)
        torch.testing.assert_close(ours(features), theirs(features), rtol=0, atol=100 * tolerance)


def test_vision_heads_have_queries_keys_and_values_side_by_side() -> None:
    attention = nn.Module.to(vision.VisionAttention(12, 3), torch.float64)
    x = torch.randn(7, 12, dtype=torch.float64)
    made = x @ attention.in_proj.weight.T + attention.in_proj.bias
    heads = []
    for head in range(3):
        q, k, v = (made[:, 12 * head + 4 * part : 12 * head + 4 * part + 4] for part in range(3))
        heads.append((q @ k.T / 2).softmax(-1) @ v)
    torch.testing.assert_close(attention(x[None])[0], attention.out_proj(torch.cat(heads, dim=1)))


def test_positions_of_the_resampler() -> None:
    made = vision.sincos_positions(3, 8)
    for row in range(3):
        for column in range(3):
            waves = [f(place / 100.0**i) for place in (column, row) for f in (math.sin, math.cos) for i in range(2)]
            torch.testing.assert_close(made[3 * row + column], torch.tensor(waves))


# The tokenizer

PAIRS = (b"th", b"he", b"the", b" t", b" the", b"in", b"ing", b"\xc3\xa9", b"\n\n", b"    ", b"  ")


def ranks() -> dict[bytes, int]:
    singles = [bytes([byte]) for byte in range(256)]
    return {token: rank for rank, token in enumerate((*singles, *PAIRS))}


def merged(piece: bytes, known: dict[bytes, int]) -> list[int]:
    """Neighbours joined one after another, those of the lowest rank first."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        joined = [(known[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in known]
        if not joined:
            return [known[part] for part in parts]
        _, at = min(joined)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@functools.cache
def tokenizer() -> Any:
    return byte_level_tokenizer(ranks())


@given(st.lists(st.sampled_from(["the", " the", "ing", "é", "\n", "\n\n", "  ", "    ", "7", "'s", "x", "。", "!"])))
def test_bytes_are_merged_by_their_ranks(words: list[str]) -> None:
    text = "".join(words)
    want = [token for piece in regex.findall(PATTERN, text) for token in merged(piece.encode(), ranks())]
    encoded = tokenizer().encode(text)
    assert encoded.ids == want
    assert tokenizer().decode(encoded.ids) == text


def test_a_line_that_is_no_rank_is_named(tmp_path: Path) -> None:
    file = tmp_path / "qwen.tiktoken"
    file.write_text("YQ== 0\n\nno rank\n")
    with pytest.raises(ValueError, match=r"qwen.tiktoken, line 3: no base64 string with its rank"):
        read_ranks(file)


# A checkpoint as it is published


def publish(folder: Path, **settings: Any) -> QWenLMHeadModel:
    """A small one, with the files and settings of a published one."""
    known = ranks()
    folder.joinpath("qwen.tiktoken").write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in known.items())
    )
    code = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    folder.joinpath("tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 8192, "tokenizer_class": "QWenTokenizer", "auto_map": code})
    )
    visual = {
        "heads": 2, "image_size": 56, "image_start_id": len(known) + SPECIAL.index("<img>"), "layers": 1,
        "mlp_ratio": 2.0, "output_dim": 16, "patch_size": 14, "width": 8,
    }  # fmt: skip
    config = {
        "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "bf16": True, "emb_dropout_prob": 0.0,
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
        "fp16": False, "fp32": False, "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 32,
        "kv_channels": 8, "layer_norm_epsilon": 1e-6, "max_position_embeddings": 8192, "model_type": "qwen",
        "no_bias": True, "num_attention_heads": 2, "num_hidden_layers": 2, "onnx_safe": None, "rotary_emb_base": 10000,
        "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048, "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer", "use_cache": True, "use_dynamic_ntk": True, "use_flash_attn": "auto",
        "use_logn_attn": True, "visual": visual, "vocab_size": 512, **settings,
    }  # fmt: skip
    folder.joinpath("config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = QWenLMHeadModel(QWenConfig.from_dict(json.loads(folder.joinpath("config.json").read_text())))
    save_file(dict(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    return model


def test_a_published_checkpoint_loads_and_an_export_loads_again(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    model = publish(tmp_path / "published")
    loaded = load_model(str(tmp_path / "published"), {}, seed=1)
    assert isinstance(loaded.model, QWenLMHeadModel) and isinstance(family_of(loaded.model), Qwen1VL)
    for name, parameter in loaded.model.named_parameters():
        torch.testing.assert_close(parameter, dict(model.named_parameters())[name])
    assert loaded.image_id == model.config.image_token_id
    text = text_of_model(loaded)
    shown = text.write(2 * text.of_frame + "the thing", [])
    assert shown == "Picture 1: <img><imgpad></img>\nPicture 2: <img><imgpad></img>\nthe thing"
    turns = [{"role": "user", "content": shown}, {"role": "assistant", "content": "the"}]
    chat = loaded.tokenizer.apply_chat_template(turns, tokenize=False)
    assert chat.endswith("</img>\nthe thing<|im_end|>\n<|im_start|>assistant\nthe<|im_end|>\n")
    assert loaded.tokenizer.eos_token == "<|im_end|>" and loaded.pad_token == len(ranks())
    pixels = family_of(loaded.model).pixels([np.zeros((30, 90, 3), np.uint8)], [], loaded.processor)["pixel_values"]
    black = [-mean / std for mean, std in zip((0.481, 0.458, 0.408), (0.269, 0.261, 0.276), strict=True)]
    assert pixels.shape == (1, 1, 3, 56, 56)
    torch.testing.assert_close(pixels[0, 0, :, 7, 7], torch.tensor(black), rtol=0.01, atol=0)
    loaded.save(tmp_path / "export", {key: p.detach().clone() for key, p in loaded.model.named_parameters()})
    again = load_model(str(tmp_path / "export"), {}, seed=1)
    assert type(again.tokenizer) is type(loaded.tokenizer) is not QWenTokenizer  # loads without this package too
    assert again.tokenizer(chat)["input_ids"] == loaded.tokenizer(chat)["input_ids"]
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template
    assert type(again.processor) is type(loaded.processor) and again.processor.size == loaded.processor.size


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"no_bias": False}, r"no_bias False \(not True\)"),
        ({"rotary_pct": 0.5}, r"rotary_pct 0.5 \(not 1.0\)"),
        ({"visual": {"pooling": "mean"}}, "visual.pooling 'mean'"),
        ({"visual": None}, "Qwen of text alone"),
    ],
)
def test_other_checkpoints_are_refused_by_what_they_have(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    publish(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | settings
    (tmp_path / "config.json").write_text(json.dumps({key: x for key, x in config.items() if x is not None}))
    with pytest.raises(ConfigError, match=f"--model .*{reason}"):
        load_model(str(tmp_path), {}, seed=0)
    if settings.get("visual", 0) is None:
        with pytest.raises(ConfigError, match=f"--model .*{reason}"):
            encode_for(str(tmp_path))


def test_texts_that_the_rotary_embedding_would_be_stretched_for_are_refused() -> None:
    model: Any = tiny("qwen-vl")
    model.config.seq_length = 8
    family, shapes = family_of(model), [FrameShape(9, 9)]
    with pytest.raises(SampleError, match=r"a text has 9 tokens.*'use_dynamic_ntk' to false in the model's config"):
        family.positions(np.full(9, -1), shapes)
    ids = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match=r"a text has 9 tokens.*longer than 8 outside training"):
        model.eval()(ids)
    model.train()(ids)
    model.config.use_dynamic_ntk = False
    assert family.positions(np.full(9, -1), shapes).tolist() == list(range(9))
    model.eval()(ids)
