"""A training job on a cluster, and the sizes of its attention layers. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_lvxattn.plan.cluster.model_sizes import ModelSizes
from ds_lvxattn.plan.cluster.work import ELEMENT
from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.memory import FLOAT32, ModelStates
from ds_lvxattn.plan.traffic import LayerShape
from ds_lvxattn.plan.visibility import of_mask


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
        stage: of ZeRO.
        keeps_frozen: whether stage 3 may keep parameters gathered, see ``kept``.
        kept: whether it does: what does not train is gathered once a run, and what trains once a step.
        gradient: bytes of an element of the gradients that travel between ranks.
    """

    model: ModelSizes
    text: int
    frames: int
    gpus: int
    recompute: str = "kv"
    features_train: bool = True
    gpus_per_node: int | None = None
    stage: int = 3
    keeps_frozen: bool = True
    kept: bool = False
    gradient: int = FLOAT32

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

    @property
    def states(self) -> ModelStates:
        """What ZeRO keeps."""
        m = self.model
        return ModelStates(
            m.parameters, m.trainable, ELEMENT, self.stage, self.gpus, gathered=m.parameters if self.kept else 0,
            gradient=self.gradient,
        )  # fmt: skip

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
