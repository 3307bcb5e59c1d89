"""A whole training step on a cluster: time, traffic and memory by parts. No torch.

Coarser than the cost of a layer: matrix products run at the profile's rate or at the speed at which weights are read,
whichever is slower; ZeRO-3's transfers hide behind the rest as far as they are shorter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_lvxattn.plan import memory, network
from ds_lvxattn.plan.choice import Candidate, best_of_each, candidates, choose
from ds_lvxattn.plan.cluster.model_sizes import ModelSizes
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.memory import ModelStates
from ds_lvxattn.plan.modes import LOCAL, Mode
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape
from ds_lvxattn.plan.visibility import of_mask

ELEMENT = 2  # bytes of bf16
USABLE = 0.92  # share of the memory that tensors can have; the rest is the driver's, NCCL's and fragments
ENCODER_RATE = 0.35  # rate of a vision encoder over that of a matrix product: Llama 3.2 Vision's on an H200


@dataclass(frozen=True)
class ClusterJob:
    """One training job: all GPUs are one sequence-parallel group, and work on one sample at a time.

    Attributes:
        model: its sizes.
        text: text tokens of the sample, image tokens included.
        frames: frames of the sample.
        gpus: GPUs.
        recompute: ``none``, ``kv`` or ``layer``.
        features_train: whether the visual features need gradients, as with a projector that trains.
        gpus_per_node: GPUs of a node; None: all are on one.
    """

    model: ModelSizes
    text: int
    frames: int
    gpus: int
    recompute: str = "kv"
    features_train: bool = True
    gpus_per_node: int | None = None

    @property
    def inner_size(self) -> int | None:
        """Ranks of a node, where nodes are equally full."""
        size = self.gpus_per_node
        return size if size and self.gpus > size and self.gpus % size == 0 else None

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return self.frames * self.model.frame_tokens

    @property
    def rows(self) -> int:
        """Rows of text of a rank, visual tokens among them where they stand there; at least one a rank."""
        total = self.text + (self.visual if self.model.keys_in_text else 0)
        return max(-(-total // self.gpus), 1)

    @property
    def keys(self) -> int:
        """Visual tokens of a rank: whole frames, one at least."""
        return max(-(-self.frames // self.gpus), 1) * self.model.frame_tokens

    def cross(self) -> Layer:
        """A cross-attention layer."""
        m = self.model
        shape = self._shape(m.cross_heads, m.cross_kv_heads, m.cross_head_dim, self.keys, self.recompute)
        mask = of_mask(m.mask, self.rows * self.gpus, self.keys * self.gpus, self.gpus, m.frame_tokens)
        return Layer(shape, mask, m.features)

    def compared(self) -> Layer:
        """The layer whose strategies are compared: the one that attends to visual tokens."""
        return self.self_attention() if self.model.keys_in_text else self.cross()

    def self_attention(self) -> Layer:
        """A self-attention layer: causal, text over text; balanced (``striped``) if visual tokens are part of it."""
        m = self.model
        policy = "layer" if self.recompute == "layer" else "none"
        shape = self._shape(m.heads, m.kv_heads, m.head_dim, self.rows, policy)
        mask = of_mask("growing", self.rows * self.gpus, self.rows * self.gpus, self.gpus, 1)
        return Layer(shape, replace(mask, busiest_keys=1.0, busiest_step=1.0) if m.keys_in_text else mask)

    def _shape(self, heads: int, kv_heads: int, head_dim: int, keys: int, recompute: str) -> LayerShape:
        lengths = (self.rows,) * self.gpus, (keys,) * self.gpus
        return LayerShape(
            1, heads, kv_heads, head_dim, *lengths, ELEMENT, recompute=recompute, inner_size=self.inner_size
        )


@dataclass(frozen=True)
class Step:
    """One training step on one strategy for cross-attention; seconds and bytes of a rank.

    Attributes:
        cross, self_attention: attention of all layers of the kind, the projection of K and V included.
        text: feed-forward parts, query and output projections, and the vocabulary.
        vision: the encoder, forward only.
        zero: ZeRO-3's transfers that do not hide behind the rest.
        optimizer: AdamW.
        received: bytes received in attention.
        memory: peak bytes.
    """

    cross: float
    self_attention: float
    text: float
    vision: float
    zero: float
    optimizer: float
    received: int
    memory: float

    @property
    def total(self) -> float:
        return self.cross + self.self_attention + self.text + self.vision + self.zero + self.optimizer


def layer_candidates(layer: Layer, profile: Profile) -> list[Candidate]:
    """Candidates of a layer; on one rank its own attention."""
    if layer.shape.ranks == 1:
        return [Candidate(LOCAL, LOCAL.cost(layer, profile), 0, 0.0, between=0)]
    return candidates(layer, profile)


def step_of(job: ClusterJob, compared: Candidate, profile: Profile) -> Step:
    """The step when every layer that attends to visual tokens runs as ``compared``."""
    m, cross = job.model, compared
    own = compared if m.keys_in_text else choose(layer_candidates(job.self_attention(), profile))
    assert own is not None and own.cost is not None and cross.cost is not None
    cross_seconds = m.cross_layers * cross.cost.total
    self_seconds = m.self_layers * own.cost.total
    text, vision = _text_seconds(job, profile), vision_seconds(job, profile)
    work = cross_seconds + self_seconds + text + vision
    optimizer = 20 * m.trainable / job.gpus / profile.memory_bandwidth
    received = m.cross_layers * (cross.received or 0) + m.self_layers * (own.received or 0)
    zero = max(_zero_seconds(job, profile) - work, 0.0)
    used = memory_bytes(job, cross.mode, own.mode, profile)
    return Step(cross_seconds, self_seconds, text, vision, zero, optimizer, received, used)


def steps(job: ClusterJob, profile: Profile) -> dict[str, tuple[Candidate, Step | None]]:
    """For every strategy its best schedule and the step with it (None where it cannot run)."""
    every = layer_candidates(job.compared(), profile)
    found = best_of_each(every)
    return {
        name: (candidate, step_of(job, candidate, profile) if candidate.cost is not None else None)
        for name, candidate in found.items()
    }


def _product(profile: Profile, rows: float, parameters: float) -> float:
    """Seconds of a matrix product of ``rows`` rows with ``parameters`` weights."""
    return max(2 * rows * parameters / profile.matmul, parameters * ELEMENT / profile.memory_bandwidth)


def _text_seconds(job: ClusterJob, profile: Profile) -> float:
    m = job.model
    keys = 2 * m.features * m.cross_kv_heads * m.cross_head_dim  # counted with cross-attention
    own = _product(profile, job.rows, m.self_parameters)
    across = _product(profile, job.rows, m.cross_parameters - keys)
    words = _product(profile, job.rows, m.vocabulary * m.width)
    # Backward: gradients of rows everywhere, of weights where they train.
    passes_self = 2 + m.keys_in_text + (job.recompute == "layer")
    passes_cross = 3 + (job.recompute == "layer")
    return m.self_layers * passes_self * own + m.cross_layers * passes_cross * across + 2 * words


def vision_seconds(job: ClusterJob, profile: Profile) -> float:
    """The frozen encoder's forward pass, and the projector's three."""
    m, frames = job.model, job.keys / job.model.frame_tokens
    tokens = frames * m.vision_tokens
    attention = 4.0 * m.vision_width * m.vision_tokens * tokens * m.vision_layers
    projector = 3 * _product(profile, frames * m.frame_tokens, m.vision_width * m.features)
    encoder = (2.0 * tokens * m.vision_parameters + attention) / (ENCODER_RATE * profile.matmul)
    return encoder + (projector if job.features_train else projector / 3)


def _zero_seconds(job: ClusterJob, profile: Profile) -> float:
    """ZeRO-3: parameters gathered forward and backward, gradients of what trains reduced."""
    gathered = network.all_gather(profile, job.gpus, job.model.parameters * ELEMENT / job.gpus)
    reduced = network.all_gather(profile, job.gpus, job.model.trainable * ELEMENT / job.gpus)
    return 2 * gathered + reduced


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
    states = ModelStates(m.parameters, m.trainable, ELEMENT, 3, job.gpus)
    shared = job.keys * (m.features + m.vision_width) * ELEMENT
    layers = [sizes] * m.cross_layers + [text] * m.self_layers
    kept = memory.step_bytes(layers, job.recompute, states, shared, job.features_train)
    # A layer's parameters are gathered while it runs, and those of the next one ahead of it.
    gathered = 2 * max(m.self_parameters, m.cross_parameters, m.vocabulary * m.width) * ELEMENT
    logits = 6 * job.rows * m.vocabulary  # in bf16 and float32
    return kept + gathered + logits + cross.workspace(job.compared(), profile)


def frames_that_fit(job: ClusterJob, cross: Mode, own: Mode, profile: Profile) -> int:
    """The largest number of frames whose step fits the memory."""

    def step(frames: int) -> int:
        return int(memory_bytes(replace(job, frames=frames), cross, own, profile))

    return memory.frames_that_fit(step, int(USABLE * profile.memory), most=1 << 26)
