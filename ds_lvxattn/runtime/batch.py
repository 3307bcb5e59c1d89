"""One micro-batch of a sequence-parallel group: which rank holds which tokens, and what each token sees.

Made once a step on the host from the collator's metadata, which every rank has, and shared by all layers: no
collective is needed to know another rank's shard or intervals.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from torch import Tensor, nn

from ds_lvxattn.data.sample import FrameShape
from ds_lvxattn.exchange.attention import sp_attention
from ds_lvxattn.exchange.comm import Communicator
from ds_lvxattn.exchange.interval import KVInterval
from ds_lvxattn.exchange.routes import Routes
from ds_lvxattn.exchange.sequence_mixing import Document, MixedRows
from ds_lvxattn.exchange.shards import ShardLayout
from ds_lvxattn.plan.layer_plan import LayerPlan
from ds_lvxattn.plan.modes import REPLICATED
from ds_lvxattn.runtime.decoding import KeyCache, MixerStates
from ds_lvxattn.runtime.layer_times import LayerTimes
from ds_lvxattn.runtime.one_sequence import as_one_sequence, by_sample
from ds_lvxattn.runtime.visual_rows import VisualRows


@dataclass(frozen=True)
class AttentionInputs:
    """What the layers of one kind (``LayerPlan.kind``) have in common.

    Attributes:
        layout: shards of queries and keys.
        interval: key ranges of the rows of every rank, ``[n, B, s_max]``; None where every row sees all keys.
        routes: where this rank's rows travel; None when no layer of the kind is routed.
        routes_between: where the rows of its node travel, as ``hybrid`` routes them; None likewise.
        copied: every rank has all queries, and counts its part of the loss. Where ``layout`` has one rank, it has all
            keys too.
    """

    layout: ShardLayout
    interval: KVInterval | None
    routes: Routes | None = None
    routes_between: Routes | None = None
    copied: bool = False


class Exchanging(Protocol):
    """The argument ``sequence_parallel`` of the model's forward, as families see it.

    A ``SequenceParallelBatch``, or a ``DecodingStep`` while text is generated.

    Attributes:
        brings_frames: whether the forward encodes frames; otherwise the keys and values of an earlier one are used.
    """

    brings_frames: ClassVar[bool]

    @property
    def plans(self) -> Mapping[nn.Module, LayerPlan]:
        """What each attention module runs with."""

    @property
    def sees_frame(self) -> Tensor:
        """``[B, 1, s_q, 1]`` in the model's dtype, 1 for the rows that see a frame."""

    @property
    def position_ids(self) -> Tensor | None:
        """int64 ``[..., B, s_q]``, the argument of the model's forward that belongs to the rows."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of ``module``: ``out [B, H_q, s_q, D]`` and its log-sum-exp ``[B, H_q, s_q]``."""


@dataclass(frozen=True)
class SequenceParallelBatch:
    """A batch that is divided over the ranks: the argument ``sequence_parallel`` of the model's forward.

    Attributes:
        comm: communicator of the sequence-parallel group.
        roles: inputs of each exchanged role; of layers with a sliding window, by the name of their kind.
        plans: what each attention module runs with.
        kernel: local attention kernel.
        times: measures the attention layers; None in the steps in which nothing is measured.
        shapes: of the frames that this rank encodes, sample by sample, in the order of its keys; at least one, which
            may be blank.
        key_order: int64 ``[keys]``, where each key of this rank is among the tokens of these frames; None: in their
            order.
        places: int64 ``[1, frames]``, the first token of its sample that sees each of these frames; 0 for a blank one.
        portions: how often the vision encoder is called; the same on all ranks of the run.
        sees_frame: ``[B, 1, s_q, 1]`` in the model's dtype, 1 for the rank's text rows that see a frame.
        visual_rows: how visual tokens come to their rows, where all keys are in the text; None elsewhere.
        position_ids: the argument of the model's forward that belongs to the batch; None: not looked at.
        block_arguments: arguments of the model's forward that say which of the batch's rows are of blocks, by name.
        checked: whether the model has looked at what it was called with beside the batch: what its forward hands to a
            model inside is its own.
        kept: collects the rank's keys and values of each module of ``kept_role``, as it attends to them, in the prefill
            of a generation; None in training.
        kept_role: role of the modules whose keys then stay divided.
        documents: those that share rows, as ``MixedRows`` has them; None: each row is one.
        states: collects those of modules that mix tokens outside attention, behind each document, in such a prefill.
    """

    comm: Communicator
    roles: Mapping[str, AttentionInputs]
    plans: Mapping[nn.Module, LayerPlan]
    kernel: str
    times: LayerTimes | None
    shapes: tuple[FrameShape, ...]
    key_order: Tensor | None
    places: Tensor
    portions: int
    sees_frame: Tensor
    visual_rows: VisualRows | None = None
    position_ids: Tensor | None = None
    block_arguments: Mapping[str, Tensor] = field(default_factory=dict)
    checked: bool = False
    kept: KeyCache | None = None
    kept_role: str = "cross"
    documents: tuple[Document, ...] | None = None
    states: MixerStates | None = None

    brings_frames: ClassVar[bool] = True

    @property
    def mixes_at_once(self) -> bool:
        """Whether what mixes tokens outside attention may run as it is: this rank has all of the text, rows are of one
        sample each, and nobody asks for states."""
        return self.comm.ranks == 1 and self.documents is None and self.states is None

    @property
    def mixed_rows(self) -> MixedRows:
        """The rows of text, for what mixes them outside attention."""
        return MixedRows(self.comm, self.roles["self"].layout.q, self.documents)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``sp_attention`` as ``module`` is planned, for the rank's own ``query [B, H_q, s_q, D]``, keys and values.

        Args:
            key, value: ``[B, H_kv, s_kv, D]``; of the role ``cross`` also ``[1, H_kv, B * s_kv, D]``, since these are
                the keys of all samples one after another, with what fills them up, and a blank frame, behind.

        Returns:
            ``out [B, H_q, s_q, D]`` and its log-sum-exp ``[B, H_q, s_q]``.
        """
        plan = self.plans[module]
        inputs = self.roles[plan.kind]
        samples, alone = query.shape[0], inputs.layout.kv.ranks == 1
        shared = inputs.copied and not alone
        if plan.role == "cross":
            keys = inputs.layout.kv.lengths[0 if alone else self.comm.rank]
            query, key, value = (
                as_one_sequence(query),
                as_one_sequence(key)[:, :, :keys],
                as_one_sequence(value)[:, :, :keys],
            )
        if self.kept is not None and plan.role == self.kept_role:
            if module in self.kept:
                raise ValueError(
                    f"{type(module).__name__} attends twice in a forward, and generation over divided keys keeps one "
                    "pair of keys and values of it; generate on one rank"
                )
            self.kept[module] = key, value
        attend = functools.partial(
            sp_attention,
            query,
            key,
            value,
            group=None if alone else self.comm.group,
            strategy=REPLICATED.strategy if shared else plan.strategy,
            interval=inputs.interval,
            scale=scale,
            softcap=softcap,
            schedule="auto" if shared else plan.schedule,
            queries="replicated" if shared else "sharded",
            gradients="parts" if shared else "whole",
            kernel=plan.kernel if self.kernel == "auto" else self.kernel,
            shards=inputs.layout,
            routes=inputs.routes_between if plan.mode.two_levels else inputs.routes,
            head_groups=plan.head_groups,
            inner_size=plan.inner_size,
        )
        out, lse = attend() if self.times is None else self.times.measure(module, (query, key, value), attend)
        return (by_sample(out, samples), by_sample(lse, samples)) if plan.role == "cross" else (out, lse)
