"""Seconds of the device for what a step computes besides attention: encoder, projector, text layers, vocabulary.

Products by ``plan/dense.py``; passes over memory by the bytes that transformers' modules read and write. No torch.
"""

from __future__ import annotations

from typing import NamedTuple

from ds_lvxattn.plan.cluster.model_sizes import ModelSizes
from ds_lvxattn.plan.cost import moved
from ds_lvxattn.plan.dense import product_seconds
from ds_lvxattn.plan.kernel_time import AttentionCall, kernel_seconds
from ds_lvxattn.plan.profile import Profile

ELEMENT = 2  # bytes of bf16
BROADCAST = 0.5  # of the memory's rate, what a pass reaches that adds a bias to rows: fitted, see docs/planner.md
TOKENS_AT_ONCE = 1 << 15  # of the vision encoder, as ``families/family.py`` takes frames in portions

# Bytes an element and kernels, forward and backward, of bf16 modules that compute in float32 between.
RMS_NORM = (36, 8), (60, 14)
KEY_NORM = (32, 7), (52, 13)  # as much of it as the fused norm of ``calibration/layers.py`` does not have
ROTARY = (24, 10), (24, 10)
RESIDUAL = (6, 1), (6, 1)
GATED = (10, 2), (20, 4)  # activation and product, of the inner width
LAYER_NORM = (4, 1), (8, 2)
ACTIVATION = (4, 1), (6, 1)


class Both(NamedTuple):
    """Seconds of both passes."""

    forward: float
    backward: float

    def plus(self, *others: Both) -> Both:
        return Both(*(sum(parts) for parts in zip(self, *others, strict=True)))


def product(profile: Profile, rows: float, inputs: float, outputs: float, trains: bool, needs: bool = True) -> Both:
    """A linear layer; its weight's gradient where it ``trains``, its input's where that ``needs`` one."""
    seconds = product_seconds(profile, rows, inputs, outputs, ELEMENT)
    return Both(seconds, seconds * (trains + needs))


def passed(profile: Profile, elements: float, kind: tuple[tuple[int, int], tuple[int, int]], times: int = 1) -> Both:
    """Elementwise work on ``elements``, ``times`` over."""
    return Both(*(times * moved(profile, size * elements, kernels) for size, kernels in kind))


def feed_forward(profile: Profile, m: ModelSizes, rows: float, inner: int, trains: bool) -> Both:
    """The feed-forward part of a text layer."""
    if not inner:
        return Both(0.0, 0.0)
    into, out = (product(profile, rows, *sizes, trains) for sizes in ((m.width, inner), (inner, m.width)))
    kind = GATED if m.gated else ACTIVATION
    return into.plus(out, passed(profile, rows * inner, kind), *([into] if m.gated else ()))


def self_layer(profile: Profile, m: ModelSizes, rows: float, trains: bool) -> Both:
    """A self-attention layer besides attention."""
    queries, keys = m.heads * m.head_dim, m.kv_heads * m.head_dim
    linear = [
        product(profile, rows, *sizes, trains)
        for sizes in ((m.width, queries), (m.width, keys), (m.width, keys), (queries, m.width))
    ]
    return feed_forward(profile, m, rows, m.intermediate, trains).plus(
        *linear, passed(profile, rows * m.width, RMS_NORM, 2), passed(profile, rows * m.width, RESIDUAL, 2),
        passed(profile, rows * (queries + keys), ROTARY),
    )  # fmt: skip


def cross_layer(profile: Profile, m: ModelSizes, rows: float) -> tuple[Both, Both]:
    """A cross-attention layer besides attention and its keys and values: in its attention module, and around it."""
    width = m.cross_heads * m.cross_head_dim
    inside = product(profile, rows, m.width, width, True).plus(
        product(profile, rows, width, m.width, True), passed(profile, rows * width, RMS_NORM)
    )
    norms = 2 if m.cross_intermediate else 1
    around = feed_forward(profile, m, rows, m.cross_intermediate, True).plus(
        passed(profile, rows * m.width, RMS_NORM, norms), passed(profile, rows * m.width, RESIDUAL, 2 * norms)
    )
    return inside, around


def visual_keys(profile: Profile, m: ModelSizes, keys: int, again: bool, features_train: bool) -> Both:
    """What a cross-attention layer does for its keys besides their projection, as calibrated: a norm in pieces, and the
    gradient of the features, which is added to that of other layers.

    Args:
        again: whether the backward pass computes them again.
    """
    norm = passed(profile, keys * m.cross_kv_heads * m.cross_head_dim, KEY_NORM) if m.key_norm else Both(0.0, 0.0)
    added = moved(profile, RESIDUAL[1][0] * keys * m.features) if features_train else 0.0
    return Both(norm.forward, norm.backward + norm.forward * again + added)


def vocabulary(profile: Profile, m: ModelSizes, rows: float, trains: bool) -> Both:
    """Output projection and loss, in float32."""
    logits = rows * m.vocabulary
    loss = Both(moved(profile, 26 * logits, 6), moved(profile, 14 * logits, 4))
    return product(profile, rows, m.width, m.vocabulary, trains).plus(loss)


def projector(profile: Profile, m: ModelSizes, tokens: float, trains: bool) -> Both:
    """The projector of the frames' features, whose input needs no gradient."""
    both = product(profile, tokens, m.projected, m.features, trains, needs=False)
    return both.plus(Both(0.0, moved(profile, 2 * tokens * m.features) if trains else 0.0))


def encoder_portions(m: ModelSizes, frames: float) -> int:
    """Calls of the encoder for a rank's frames."""
    at_once = max(TOKENS_AT_ONCE // m.vision_tokens, 1)
    return max(-(-int(frames * m.encoded) // at_once), 1)


def encoder_layer(profile: Profile, m: ModelSizes, frames: float) -> float:
    """A layer of the frozen encoder, forward only, for all frames of a rank."""
    pictures, portions = frames * m.encoded, encoder_portions(m, frames)
    tokens, width = pictures * m.vision_tokens, m.vision_width
    rows = tokens / portions
    linear = [(width, width)] * 4 + [(width, m.vision_intermediate), (m.vision_intermediate, width)]
    dense = portions * sum(product_seconds(profile, rows, *sizes, ELEMENT) for sizes in linear)
    passes = passed(profile, tokens * width, LAYER_NORM, 2).plus(
        passed(profile, tokens * width, RESIDUAL, 2), passed(profile, tokens * m.vision_intermediate, ACTIVATION)
    )
    return dense + passes.forward + portions * _encoder_attention(profile, m, pictures / portions)


def encoder_biases(profile: Profile, m: ModelSizes, frames: float) -> float:
    """The biases of an encoder layer's feed-forward part, each added in a pass of its own."""
    elements = frames * m.encoded * m.vision_tokens * (m.vision_intermediate + m.vision_width)
    return moved(profile, 2 * ELEMENT * elements / BROADCAST, 2 * encoder_portions(m, frames))


def _encoder_attention(profile: Profile, m: ModelSizes, frames: float) -> float:
    """Attention inside each of ``frames``, or tiles that are encoded apart; blank tiles, and what pads them, do not see
    each other."""
    every, masked = m.vision_tokens, m.most_tiles > 1 and not m.tiles_apart
    blank = every - m.frame_tokens if masked else 0
    seen = every - blank * blank / every
    heads = max(m.vision_width // m.vision_head_dim, 1)
    # A kernel that was not measured at this head size fills its tiles up to the next power of two.
    measured = any(kernel.head_dim == m.vision_head_dim for kernel in profile.kernels)
    size = m.vision_head_dim if measured else 1 << (m.vision_head_dim - 1).bit_length()
    batch = max(int(frames), 1)
    call = AttentionCall(batch, heads, heads, size, every, every, seen, 0.0, ELEMENT)
    fastest = min(kernel_seconds(profile, kernel, call, False) for kernel in profile.kernels_for(size, masked))
    return fastest * frames / batch
