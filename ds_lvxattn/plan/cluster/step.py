"""A whole training step on a cluster: time, traffic and memory by parts. No torch.

Every layer's pass is a segment of the timeline: kernels, exchange, the host's time to issue it, ZeRO's transfers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_lvxattn.plan import memory
from ds_lvxattn.plan.choice import Candidate, best_of_each, candidates, choose
from ds_lvxattn.plan.cluster.job import ClusterJob
from ds_lvxattn.plan.cluster.segments import ENCODER_SHARE, segments
from ds_lvxattn.plan.cluster.work import ELEMENT
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.modes import LOCAL, Mode
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.timeline import EXCHANGE, IDLE, TRANSFERS, seconds_by_part
from ds_lvxattn.plan.zero import BUCKET, STAGES, StageTime, gradient_bucket

LIVE = 1_000_000_000  # parameters that stage 3 lets stay gathered, DeepSpeed's default
USABLE = 0.92  # share of the memory that tensors can have; the rest is the driver's, NCCL's and fragments


@dataclass(frozen=True)
class Step:
    """One training step on one strategy for cross-attention; seconds and bytes of a rank.

    Attributes:
        encoder: the frozen encoder, forward.
        projection: the projector of its features.
        cross_attention: the attention modules of cross-attention layers, the projection of K and V included.
        text: the rest of the language model, self-attention and vocabulary included.
        optimizer: AdamW.
        exchange: of attention, where no kernel hides it.
        transfers: ZeRO's, of parameters and gradients, where nothing hides them.
        idle: the device waits for the host.
        received: bytes received in attention.
        memory: peak bytes.
    """

    encoder: float
    projection: float
    cross_attention: float
    text: float
    optimizer: float
    exchange: float
    transfers: float
    idle: float
    received: int
    memory: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by the names of ``benchmarks/step.py``; together they are ``total``."""
        return {
            "encoder": self.encoder, "projection": self.projection, "cross-attention": self.cross_attention,
            "text": self.text, "optimizer": self.optimizer, EXCHANGE: self.exchange, TRANSFERS: self.transfers,
            IDLE: self.idle,
        }  # fmt: skip

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def layer_candidates(layer: Layer, profile: Profile) -> list[Candidate]:
    """Candidates of a layer; on one rank its own attention."""
    if layer.shape.ranks == 1:
        return [Candidate(LOCAL, LOCAL.cost(layer, profile), 0, 0.0, between=0)]
    return candidates(layer, profile)


def step_of(job: ClusterJob, compared: Candidate, profile: Profile, own: Candidate | None = None) -> Step:
    """The step when every layer that attends to visual tokens runs as ``compared``.

    Args:
        own: what self-attention runs as, where it is another kind of layers; None: the fastest.
    """
    m = job.model
    if m.keys_in_text or own is None:
        own = compared if m.keys_in_text else choose(layer_candidates(job.self_attention(), profile))
    assert own is not None and own.cost is not None and compared.cost is not None
    job = kept_where_it_fits(job, compared.mode, own.mode, profile)
    seconds = seconds_by_part(segments(job, compared, own, profile))
    received = m.cross_layers * (compared.received or 0) + m.self_layers * (own.received or 0)
    return Step(
        seconds["encoder"], seconds["projection"], seconds.get("cross-attention", 0.0), seconds["text"],
        seconds["optimizer"], seconds[EXCHANGE], seconds[TRANSFERS], seconds[IDLE], received,
        memory_bytes(job, compared.mode, own.mode, profile),
    )  # fmt: skip


def kept_where_it_fits(job: ClusterJob, cross: Mode, own: Mode, profile: Profile) -> ClusterJob:
    """``job`` with what stage 3 keeps gathered, as a run decides it (``training/memory_plan.py``)."""
    if job.stage != 3 or not job.keeps_frozen or job.model.trainable >= job.model.parameters:
        return job
    kept = replace(job, kept=True)
    return kept if memory_bytes(kept, cross, own, profile) <= memory.FITS * profile.memory else job


def steps(job: ClusterJob, profile: Profile) -> dict[str, tuple[Candidate, Step | None]]:
    """For every strategy its best schedule and the step with it (None where it cannot run)."""
    every = layer_candidates(job.compared(), profile)
    found = best_of_each(every)
    return {
        name: (candidate, step_of(job, candidate, profile) if candidate.cost is not None else None)
        for name, candidate in found.items()
    }


def stages(job: ClusterJob, compared: Candidate, profile: Profile) -> list[StageTime]:
    """The step in every ZeRO stage."""
    found = []
    for stage in STAGES:
        step = step_of(replace(job, stage=stage), compared, profile)
        found.append(StageTime(stage, step.total, step.memory, step.memory <= USABLE * profile.memory))
    return found


def memory_bytes(job: ClusterJob, cross: Mode, own: Mode, profile: Profile) -> float:
    """Peak bytes of a rank; ``cross`` is the mode of all layers where visual tokens stand in the text."""
    m = job.model
    own = cross if m.keys_in_text else own
    sizes = LayerSizes(
        "cross", *cross.key, 1, job.gpus, job.rows, job.rows, job.rows * job.gpus, job.keys, job.keys * job.gpus,
        m.cross_heads, m.cross_kv_heads, m.cross_head_dim, m.width, max(m.cross_intermediate, 1), ELEMENT,
        inner_size=job.inner_size,
    )  # fmt: skip
    text = replace(
        sizes, role="self", strategy=own.strategy, schedule=own.schedule, keys=job.rows, total_keys=job.rows * job.gpus,
        heads=m.heads, kv_heads=m.kv_heads, head_dim=m.head_dim, intermediate=m.intermediate,
    )  # fmt: skip
    states = job.states
    shared = job.keys * (m.features + m.projected) * ELEMENT
    layers = [sizes] * m.cross_layers + [text] * m.self_layers
    kept = memory.step_bytes(layers, job.recompute, states, shared, job.features_train)
    largest = m.self_parameters if m.keys_in_text else m.cross_parameters
    # Gradients on their way, in two buckets.
    gathered = 2 * (min(BUCKET, m.trainable) if job.stage != 3 else gradient_bucket(largest, m.trainable)) * ELEMENT
    if job.stage == 3 and not job.kept:
        # What is used again within DeepSpeed's limit stays; ``training/zero3.py`` sets the limit.
        once = m.vision_parameters * ELEMENT <= ENCODER_SHARE * profile.memory
        live = LIVE + max(m.self_parameters, m.cross_parameters) + m.vision_parameters * once
        gathered += min(live, m.parameters) * ELEMENT
    logits = 6 * job.rows * m.vocabulary  # in bf16 and float32
    return kept + gathered + logits + cross.workspace(job.compared(), profile)


def frames_that_fit(job: ClusterJob, cross: Mode, own: Mode, profile: Profile) -> int:
    """The largest number of frames whose step fits the memory."""

    def step(frames: int) -> int:
        return int(memory_bytes(replace(job, frames=frames), cross, own, profile))

    return memory.largest_that_fits(step, int(USABLE * profile.memory), most=1 << 26)
