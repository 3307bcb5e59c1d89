"""The rebuttal's measurements of LV-XAttn and Ring Attention, recomputed from a profile of its cluster.

    python benchmarks/rebuttal.py

Llama-3.2-11B-Vision on six A100-40GB in two nodes (profile ``a100-2x3``), seconds a training step. What the rebuttal
does not say is assumed below; ``docs/planner.md`` has what each assumption contributes. No GPU is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvxattn.plan import network
from ds_lvxattn.plan.cluster.job import ClusterJob
from ds_lvxattn.plan.cluster.model_sizes import SHIPPED
from ds_lvxattn.plan.cluster.work import ELEMENT
from ds_lvxattn.plan.cost import Cost, Layer
from ds_lvxattn.plan.modes import Mode, mode_named
from ds_lvxattn.plan.profile import Profile, load_profile
from ds_lvxattn.plan.traffic import LayerShape

GPUS = 6
# A frame has four tiles: 120 frames are 768,480 tokens, which the rebuttal writes as 750K (of 1,024).
MODEL = SHIPPED["Llama-3.2-11B-Vision"].with_tiles(4)
# The published code repeats K and V for every query head before it uses or sends them.
REPEATED_HEADS = 32
# Rate of the encoder of transformers, with its dense mask, over that of a matrix product; measured on an H200.
ENCODER_RATE = 0.35
# Parameters are gathered for the forward and the backward pass and gradients reduced, all in 16 bits, all trained.
PARAMETER_PASSES = 3
# The rest of a step that does not depend on text or frames, fitted to the first row's total with LV-XAttn: optimizer
# states of 10.6 billion parameters leave 40 GB GPUs little room, so an update on the CPU is likely.
FIXED_SECONDS = 6.0


@dataclass(frozen=True)
class Row:
    """One line of the rebuttal's table: seconds a step in cross-attention and in all."""

    text: int
    frames: int
    ring_attention: float
    ring_total: float
    lv_attention: float
    lv_total: float


ROWS = (Row(384, 120, 23.30, 37.54, 0.43, 14.45), Row(192, 60, 11.69, 22.92, 0.22, 11.61))


def attention_seconds(row: Row, mode: Mode, profile: Profile) -> float:
    """Cross-attention of a step, all layers.

    The published kernels add dK and dV up themselves, so the float32 passes of this package's rings are left out.
    """
    model = MODEL
    keys = row.frames // GPUS * model.frame_tokens
    shape = LayerShape(
        1, model.cross_heads, REPEATED_HEADS, model.cross_head_dim, (row.text // GPUS,) * GPUS, (keys,) * GPUS, ELEMENT
    )
    cost: Cost = mode.cost(Layer(shape), profile)
    return model.cross_layers * sum(part.kernel + part.exchange for part in (cost.forward, cost.backward))


def encoder_seconds(job: ClusterJob, profile: Profile) -> float:
    """The frozen encoder and its projector, forward."""
    m, frames = job.model, job.keys / job.model.frame_tokens
    tokens = frames * m.vision_tokens
    attention = 4.0 * m.vision_width * m.vision_tokens * tokens * m.vision_layers
    encoder = (2.0 * tokens * m.vision_parameters + attention) / (ENCODER_RATE * profile.matmul)
    return encoder + 2.0 * frames * m.frame_tokens * m.projected * m.features / profile.matmul


def other_seconds(row: Row, profile: Profile) -> dict[str, float]:
    """The rest of a step, by parts."""
    model = MODEL
    job = ClusterJob(model, row.text, row.frames, GPUS, features_train=False)
    projection = Layer(job.cross().shape, features=model.features)
    gathered = network.all_gather(profile, GPUS, model.parameters * ELEMENT / GPUS)
    cost = mode_named("lv_xattn", "ring").cost(projection, profile)
    return {
        "vision encoder": encoder_seconds(job, profile),
        "K and V projected": model.cross_layers * (cost.projection + cost.projection_repeated),
        "parameters and gradients": PARAMETER_PASSES * gathered,
        "fixed": FIXED_SECONDS,
    }


def recomputed(row: Row, profile: Profile) -> Row:
    """``row`` as predicted."""
    ring = attention_seconds(row, mode_named("ring", "ring"), profile)
    lv = attention_seconds(row, mode_named("lv_xattn", "ring"), profile)
    others = sum(other_seconds(row, profile).values())
    return Row(row.text, row.frames, ring, ring + others, lv, lv + others)


def main() -> None:
    profile = load_profile("a100-2x3")
    print("text frames  ring attention  of total       LV-XAttn attention  of total      speed-up: attention, total")
    for row in ROWS:
        ours = recomputed(row, profile)
        for name, r in (("rebuttal", row), ("predicted", ours)):
            print(
                f"{r.text:4} {r.frames:5}  {r.ring_attention:10.2f} {r.ring_total:14.2f} {r.lv_attention:20.2f} "
                f"{r.lv_total:14.2f} {r.ring_attention / r.lv_attention:14.1f} {r.ring_total / r.lv_total:8.2f}  {name}"
            )
        print("    ", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in other_seconds(row, profile).items()))


if __name__ == "__main__":
    main()
