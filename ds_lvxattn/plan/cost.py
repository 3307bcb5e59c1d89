"""Time of one attention layer, forward and backward: its parts, of which each mode (``plan/modes``) makes its sum.

Pure functions of sizes and a machine profile; no torch. A layer's time is that of its slowest rank. The modes' sums
follow what they do, in their order: a transfer on the critical path counts in full, one that overlaps a kernel only as
far as it is longer (``overlapped``). ``simulate.py`` runs the same steps event by event, and tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ds_lvxattn.plan import network
from ds_lvxattn.plan.kernel_time import AttentionCall, kernel_seconds
from ds_lvxattn.plan.pipeline import NVLINK, head_groups
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape
from ds_lvxattn.plan.visibility import FULL, Visibility


@dataclass(frozen=True)
class Layer:
    """One attention layer, as far as its time depends on it.

    Attributes:
        shape: sizes, shards, element size and recompute policy.
        mask: what the rows see.
        features: width of the features that K and V are projected from; 0 leaves the projection out.
        groups: groups of key heads that the schedule ``gather`` pipelines, forward and backward; None: as it chooses.
    """

    shape: LayerShape
    mask: Visibility = FULL
    features: int = 0
    groups: tuple[int, int] | None = None

    def head_groups(self, profile: Profile) -> tuple[int, int]:
        """Groups of the forward and of the backward pass, given how fast the machine's links carry the queries."""
        if self.groups is not None:
            return self.groups
        shape = self.shape
        sent = shape.query_bytes(max(shape.q_lengths))
        seconds = network.all_gather(profile, shape.ranks, sent)
        link = (shape.ranks - 1) * sent / seconds if seconds else NVLINK
        return head_groups(
            shape.batch, shape.heads, shape.kv_heads, shape.mean_head_dim, shape.element,
            shape.q_lengths, shape.kv_lengths, link, self.mask.masked,
        )  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """Seconds of a forward or backward pass on the device.

    Attributes:
        kernel: attention kernels.
        passes: elementwise work over memory: packing, merging, summing, converting.
        exchange: time that transfers add, because nothing runs beside them or they outlast it.
    """

    kernel: float = 0.0
    passes: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        return self.kernel + self.passes + self.exchange


@dataclass(frozen=True)
class Cost:
    """Seconds of one layer in one training step.

    Attributes:
        forward, backward: attention and its exchange.
        repeated: exchange that recomputation repeats in the backward pass.
        projection: projecting K and V, forward and backward.
        projection_repeated: projecting K and V once more where they are recomputed.
        host: time that the host takes to issue the layer, forward and backward.
        host_forward: of ``host``, the forward pass.
    """

    forward: Pass
    backward: Pass
    repeated: Pass = Pass()
    projection: float = 0.0
    projection_repeated: float = 0.0
    host: float = 0.0
    host_forward: float = 0.0

    @property
    def attention(self) -> float:
        """Attention and exchange, forward and backward; where the host is slower than the device, its time."""
        return max(self.device, self.host)

    @property
    def device(self) -> float:
        return self.forward.total + self.backward.total + self.repeated.total

    @property
    def total(self) -> float:
        """The layer: attention, exchange and the projection of K and V."""
        return max(self.device + self.projection + self.projection_repeated, self.host)

    @property
    def host_bound(self) -> bool:
        """Whether the host takes longer to issue the layer than the device to run it."""
        return self.host >= self.total


class Passes(NamedTuple):
    """What a mode says of a layer: both passes, and what is sent again where K and V are recomputed."""

    forward: Pass
    backward: Pass
    repeated: Pass = Pass()


def overlapped(profile: Profile, work: float, transfer: float) -> float:
    """Seconds of ``work`` and ``transfer`` that start together on their own streams."""
    return max(work, transfer) + (1 - profile.overlap) * min(work, transfer)


# The parts that the modes are made of


def moved(profile: Profile, size: float, kernels: int = 1) -> float:
    """Seconds of elementwise kernels that read and write ``size`` bytes in all."""
    return size / profile.memory_bandwidth + kernels * profile.launch if size else 0.0


@dataclass(frozen=True)
class KernelTimes:
    """Both kernel passes of one call, in seconds."""

    forward: float
    backward: float
    takes_out: bool


def kernel_times(
    layer: Layer, profile: Profile, rows: float, keys: float, seen: float, drift: float, divide: int = 1
) -> KernelTimes:
    """The fastest kernels on ``rows`` and ``keys`` with ``1/divide`` of the heads, of those measured."""
    shape = layer.shape
    kernels = profile.kernels_for(shape.head_dim, layer.mask.masked)
    heads, kv_heads = max(shape.heads // divide, 1), max(shape.kv_heads // divide, 1)
    call = AttentionCall(
        shape.batch, heads, kv_heads, shape.mean_head_dim, rows, keys, min(seen, keys), drift, shape.element
    )
    forward = min(kernel_seconds(profile, kernel, call, False) for kernel in kernels)
    backward, name = min((kernel_seconds(profile, kernel, call, True), kernel.name) for kernel in kernels)
    return KernelTimes(forward, backward, name in ("cudnn", "flash"))


def seen_on_a_rank(layer: Layer) -> tuple[float, float]:
    """Keys that a row sees on the rank where most is seen, and the drift there."""
    keys = max(layer.shape.kv_lengths)
    return layer.mask.share * layer.mask.busiest_keys * keys, layer.mask.drift / layer.shape.ranks


def projection_seconds(profile: Profile, tokens: float, features: int, width: int, element: int) -> tuple[float, float]:
    """Projecting K and V of ``width`` from ``tokens`` features, by formula: forward, and backward."""
    product = 4.0 * tokens * features * width / profile.matmul + 2 * profile.launch
    # Transposing to heads and the norm of K read and write K and V about twice; gradients as often again. The features'
    # gradients of K and of V are added up.
    rest = moved(profile, 4 * 2 * tokens * width * element, 3)
    return product + rest, 2 * product + rest + moved(profile, 3 * tokens * features * element)


def projection_passes(layer: Layer, profile: Profile) -> tuple[float, float, float]:
    """K and V from the rank's features: forward, backward, and once more where they are recomputed."""
    shape = layer.shape
    tokens, width = shape.batch * max(shape.kv_lengths), shape.kv_heads * sum(shape.head_dims) // 2
    if not layer.features or not tokens:
        return 0.0, 0.0, 0.0
    measured = profile.projection(width, shape.head_dim)
    forward, backward = projection_seconds(profile, tokens, layer.features, width, shape.element)
    forward *= measured.forward
    return forward, backward * measured.backward, forward if shape.recompute != "none" else 0.0
