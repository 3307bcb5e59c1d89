"""Time of one attention layer, forward and backward, under each strategy and schedule: closed formulas.

Pure functions of sizes and a machine profile; no torch. A layer's time is that of its slowest rank. Sums follow what
the strategies do, in their order: a transfer on the critical path counts in full, one beside a kernel only as far as it
is longer than the kernel (``beside``). ``simulate.py`` runs the same steps event by event, and tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ds_lvxattn.plan import network
from ds_lvxattn.plan.kernel_time import AttentionCall, kernel_seconds
from ds_lvxattn.plan.pipeline import NVLINK, head_groups, keeps_queries
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape
from ds_lvxattn.plan.visibility import FULL, Visibility

Mode = tuple[str, str]  # strategy, schedule


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
            shape.batch, shape.heads, shape.kv_heads, shape.head_dim, shape.element,
            shape.q_lengths, shape.kv_lengths, link,
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
        again: exchange that recomputation repeats in the backward pass.
        projection: projecting K and V, forward and backward.
        projection_again: projecting K and V once more where they are recomputed.
        host: time that the host takes to issue the layer, forward and backward.
    """

    forward: Pass
    backward: Pass
    again: Pass = Pass()
    projection: float = 0.0
    projection_again: float = 0.0
    host: float = 0.0

    @property
    def attention(self) -> float:
        """Attention and exchange, forward and backward; where the host is slower than the device, its time."""
        return max(self.device, self.host)

    @property
    def device(self) -> float:
        return self.forward.total + self.backward.total + self.again.total

    @property
    def total(self) -> float:
        """The layer: attention, exchange and the projection of K and V."""
        return max(self.device + self.projection + self.projection_again, self.host)

    @property
    def host_bound(self) -> bool:
        """Whether the host takes longer to issue the layer than the device to run it."""
        return self.host >= self.total


def layer_cost(layer: Layer, mode: Mode, profile: Profile) -> Cost:
    """Time of ``layer`` with the strategy and schedule ``mode``; ``("local", "auto")`` is one rank's own attention.

    Raises:
        KeyError: there is no such mode.
    """
    forward, backward, again = COSTS[mode](layer, profile)
    first, later, repeated = _projection(layer, profile)
    host = profile.host.get("/".join(mode) + (" masked" if layer.mask.masked else ""))
    host_time = 0.0
    if host is not None:
        # A ring issues a step for every rank; the other schedules issue the same calls on any number of ranks.
        scale = layer.shape.ranks / profile.host_ranks if mode[1] == "ring" else 1.0
        repeated_issue = host.again if layer.shape.recompute != "none" else 0.0
        host_time = (host.forward + host.backward + repeated_issue) * scale
    again = again if layer.shape.recompute != "none" else Pass()
    return Cost(forward, backward, again, first + later, repeated, host_time)


def beside(profile: Profile, work: float, transfer: float) -> float:
    """Seconds of ``work`` and ``transfer`` that start together on their own streams."""
    return max(work, transfer) + (1 - profile.overlap) * min(work, transfer)


# The parts that the strategies are made of


def _key_bytes(shape: LayerShape, keys: float, element: int | None = None) -> float:
    """Bytes of K and V of ``keys`` keys."""
    return 2 * shape.batch * keys * shape.kv_heads * shape.head_dim * (element or shape.element)


def _moved(profile: Profile, size: float, kernels: int = 1) -> float:
    """Seconds of elementwise kernels that read and write ``size`` bytes in all."""
    return size / profile.memory_bandwidth + kernels * profile.launch if size else 0.0


@dataclass(frozen=True)
class _Kernels:
    """Both kernel passes of one call, in seconds."""

    forward: float
    backward: float
    takes_out: bool


def _kernels(
    layer: Layer, profile: Profile, rows: float, keys: float, seen: float, drift: float, divide: int = 1
) -> _Kernels:
    """The kernels on ``rows`` and ``keys`` with ``1/divide`` of the heads."""
    shape = layer.shape
    kernel = profile.kernel(shape.head_dim, layer.mask.masked)
    heads, kv_heads = max(shape.heads // divide, 1), max(shape.kv_heads // divide, 1)
    call = AttentionCall(
        shape.batch, heads, kv_heads, shape.head_dim, rows, keys, min(seen, keys), drift, shape.element
    )
    forward, backward = (kernel_seconds(profile, kernel, call, is_backward) for is_backward in (False, True))
    return _Kernels(forward, backward, kernel.name in ("cudnn", "flash"))


def _seen_on_a_rank(layer: Layer) -> tuple[float, float]:
    """Keys that a row sees on the rank where most is seen, and the drift there."""
    keys = max(layer.shape.kv_lengths)
    return layer.mask.share * layer.mask.busiest_keys * keys, layer.mask.drift / layer.shape.ranks


def _keeps_queries(shape: LayerShape) -> bool:
    return keeps_queries(shape.heads, shape.kv_heads, shape.q_lengths, shape.kv_lengths)


# The modes: each gives forward, backward, and what is sent again where K and V are recomputed


def _local(layer: Layer, profile: Profile) -> tuple[Pass, Pass, Pass]:
    """All queries over the rank's own keys, nothing sent: the floor of query exchange, and a single rank's layer."""
    shape = layer.shape
    kernels = _kernels(layer, profile, sum(shape.q_lengths), max(shape.kv_lengths), *_seen_on_a_rank(layer))
    delta = 0.0 if kernels.takes_out else _moved(profile, 2 * shape.query_bytes(max(shape.q_lengths)))
    return Pass(kernels.forward), Pass(kernels.backward, delta), Pass()


def _gather(layer: Layer, profile: Profile) -> tuple[Pass, Pass, Pass]:
    """All-gather the queries, attend, all-to-all the results; groups of heads follow each other in a pipeline."""
    shape = layer.shape
    n, own, keys = shape.ranks, max(shape.q_lengths), max(shape.kv_lengths)
    rows = n * own
    query, all_queries = shape.query_bytes(own), shape.query_bytes(rows)

    def pipeline(groups: int, kernel: float, passes: float, sent: float, returned: float) -> Pass:
        come = network.all_gather(profile, n, sent / groups)
        go = network.all_to_all(profile, n, returned / groups)
        work = groups * kernel + passes
        total = come + go + beside(profile, work, (groups - 1) * (come + go))
        return Pass(groups * kernel, passes, total - work)

    groups, later = layer.head_groups(profile)
    kernels = _kernels(layer, profile, rows, keys, *_seen_on_a_rank(layer), divide=groups)
    passes = _moved(profile, 2 * query, groups)
    passes += _moved(profile, (n + 1) * query + n * shape.statistic_bytes(own), groups)  # the merge
    forward = pipeline(groups, kernels.forward, passes, query, all_queries + shape.statistic_bytes(rows))

    kernels = _kernels(layer, profile, rows, keys, *_seen_on_a_rank(layer), divide=later)
    sent = query + 2 * shape.statistic_bytes(own)
    if not _keeps_queries(shape):
        sent += query
    passes = _moved(profile, 2 * query) + _moved(profile, 2 * query, later)  # delta; what is sent, into its place
    passes += _moved(profile, (n + 1) * query, later)  # the sum of the parts of dQ
    if kernels.takes_out:
        passes += _moved(profile, 2 * all_queries, later)  # the output that stands in for delta
    if later > 1:
        passes += _moved(profile, 2 * _key_bytes(shape, keys), 2 * later)  # dK and dV of a group into their place
    backward = pipeline(later, kernels.backward, passes, sent, all_queries)
    return forward, backward, Pass()


def _routed(layer: Layer, profile: Profile) -> tuple[Pass, Pass, Pass]:
    """Rows travel only to ranks on which they see something; one exchange each way, nothing beside it."""
    shape = layer.shape
    n, own = shape.ranks, max(shape.q_lengths)
    rows = layer.mask.rows_seen * n * own
    seen, drift = _seen_on_a_rank(layer)
    seen_by_those = seen / layer.mask.rows_seen if layer.mask.rows_seen else 0.0
    kernels = _kernels(layer, profile, rows, max(shape.kv_lengths), seen_by_those, drift)
    travelling = shape.query_bytes(round(rows))
    statistic = shape.statistic_bytes(round(rows))
    again = 0 if _keeps_queries(shape) else travelling
    # Each own row comes back from as many ranks as it was sent to: on average the rows that a rank computes.
    forward = Pass(
        kernels.forward,
        _moved(profile, 2 * travelling) + _moved(profile, travelling + statistic + shape.query_bytes(own)),
        network.all_to_all(profile, n, travelling) + network.all_to_all(profile, n, travelling + statistic),
    )
    backward = Pass(
        kernels.backward,
        _moved(profile, 4 * travelling) + _moved(profile, travelling + shape.query_bytes(own)),
        network.all_to_all(profile, n, travelling + 2 * statistic + again) + network.all_to_all(profile, n, travelling),
    )
    return forward, backward, Pass()


def _query_ring(layer: Layer, profile: Profile) -> tuple[Pass, Pass, Pass]:
    """Queries visit the ranks; the next ones and the last results travel beside the kernel."""
    shape, mask = layer.shape, layer.mask
    n, own, keys = shape.ranks, max(shape.q_lengths), max(shape.kv_lengths)
    query, statistic = shape.query_bytes(own), shape.statistic_bytes(own)
    seen = mask.share * mask.busiest_step * keys
    kernels = _kernels(layer, profile, own, keys, seen, mask.drift / n)

    def ring(kernel: float, step_pass: float, end_pass: float, sent: float, returned: float) -> Pass:
        come, go = (network.send(profile, n, size) for size in (sent, returned))
        work = kernel + step_pass
        # First step: queries only. The last step's results have nothing to hide behind.
        total = beside(profile, work, come) + (n - 2) * beside(profile, work, come + go) if n > 1 else 0.0
        total += (beside(profile, work, go) if n > 2 else work) + go if n > 1 else work
        return Pass(n * kernel, n * step_pass + end_pass, total - n * work)

    forward = ring(kernels.forward, 0.0, _moved(profile, (n + 1) * query + n * statistic, 2), query, query + statistic)
    wide = _moved(profile, 5 * _key_bytes(shape, keys), 4)  # a 2-byte part read, a float32 sum read and written
    summed = _moved(profile, 2 * query) + _moved(profile, (n + 1) * query)
    backward = ring(kernels.backward, wide, summed, 2 * query + 2 * statistic, query)
    return forward, backward, Pass()


def _ulysses(layer: Layer, profile: Profile) -> tuple[Pass, Pass, Pass]:
    """DeepSpeed's exchange: all-to-all of q, k and v, all rows and keys with ``1/n`` of the heads, and back."""
    shape, mask = layer.shape, layer.mask
    n = shape.ranks
    rows, keys = n * max(shape.q_lengths), n * max(shape.kv_lengths)
    kernels = _kernels(layer, profile, rows, keys, mask.share * keys, mask.drift, divide=n)
    query = shape.query_bytes(max(shape.q_lengths))
    copies = max(n // shape.kv_heads, 1)  # key heads fewer than ranks are repeated
    one_key = copies * _key_bytes(shape, max(shape.kv_lengths)) / 2
    statistic = shape.statistic_bytes(max(shape.q_lengths))

    def exchange(sizes: tuple[float, ...]) -> tuple[float, float]:
        """Transposed into parts, sent, transposed back: a copy on either side."""
        passes = sum(_moved(profile, 4 * size, 2) for size in sizes)
        return passes, sum(network.all_to_all(profile, n, size) for size in sizes)

    repeat = _moved(profile, 2 * (one_key / copies + one_key), 2) if copies > 1 else 0.0
    passes, sent = exchange((query, one_key, one_key, query, statistic))
    forward = Pass(kernels.forward, passes + repeat + _moved(profile, 2 * query), sent)
    passes, sent = exchange((query, one_key, one_key, query))
    delta = 0.0 if kernels.takes_out else _moved(profile, 2 * query)
    backward = Pass(kernels.backward, passes + repeat + delta, sent)
    return forward, backward, replace(forward, kernel=0.0)  # the kernel's results are kept, the exchange is repeated


def _kv_ring(layer: Layer, profile: Profile) -> tuple[Pass, Pass, Pass]:
    """Keys and values visit the ranks; in the backward pass their float32 gradients follow a step later."""
    shape, mask = layer.shape, layer.mask
    n, own, keys = shape.ranks, max(shape.q_lengths), max(shape.kv_lengths)
    seen = mask.share * mask.busiest_step * keys
    kernels = _kernels(layer, profile, own, keys, seen, mask.drift / n)
    query = shape.query_bytes(own)
    key = network.send(profile, n, _key_bytes(shape, keys))
    gradient = network.send(profile, n, _key_bytes(shape, keys, shape.statistic))

    work = kernels.forward + _moved(profile, 3 * query)
    total = (n - 1) * beside(profile, work, key) + work
    forward = Pass(n * kernels.forward, n * (work - kernels.forward), total - n * work)

    # Parts to float32 and added to what arrived: 2 bytes read and 4 written, then 8 read and 4 written.
    wide = _moved(profile, 9 * _key_bytes(shape, keys), 4) + _moved(profile, 5 * query)
    work = kernels.backward + wide
    if n == 1:
        total = work
    elif n == 2:
        total = beside(profile, work, key) + work + gradient
    else:
        total = 2 * beside(profile, work, key) + (n - 3) * beside(profile, work, key + gradient)
        total += beside(profile, work, gradient) + gradient
    return forward, Pass(n * kernels.backward, n * wide, total - n * work), Pass()


def projection_seconds(profile: Profile, tokens: float, features: int, width: int, element: int) -> tuple[float, float]:
    """Projecting K and V of ``width`` from ``tokens`` features, by formula: forward, and backward."""
    product = 4.0 * tokens * features * width / profile.matmul + 2 * profile.launch
    # Transposing to heads and the norm of K read and write K and V about twice; gradients as often again. The features'
    # gradients of K and of V are added up.
    rest = _moved(profile, 4 * 2 * tokens * width * element, 3)
    return product + rest, 2 * product + rest + _moved(profile, 3 * tokens * features * element)


def _projection(layer: Layer, profile: Profile) -> tuple[float, float, float]:
    """K and V from the rank's features: forward, backward, and once more where they are recomputed."""
    shape = layer.shape
    tokens, width = shape.batch * max(shape.kv_lengths), shape.kv_heads * shape.head_dim
    if not layer.features or not tokens:
        return 0.0, 0.0, 0.0
    measured = profile.projection(width, shape.head_dim)
    forward, backward = projection_seconds(profile, tokens, layer.features, width, shape.element)
    forward *= measured.forward
    return forward, backward * measured.backward, forward if shape.recompute != "none" else 0.0


COSTS: dict[Mode, Callable[[Layer, Profile], tuple[Pass, Pass, Pass]]] = {
    ("local", "auto"): _local,
    ("lv_xattn", "gather"): _gather,
    ("lv_xattn", "routed"): _routed,
    ("lv_xattn", "ring"): _query_ring,
    ("ulysses", "auto"): _ulysses,
    ("ring", "ring"): _kv_ring,
}


def workspace_bytes(layer: Layer, mode: Mode, profile: Profile) -> float:
    """Most bytes that a layer's exchange needs on a rank, besides q, k, v, out and their gradients."""
    shape = layer.shape
    n, own, keys = shape.ranks, max(shape.q_lengths), max(shape.kv_lengths)
    query, key = shape.query_bytes(own), _key_bytes(shape, keys)
    if mode == ("lv_xattn", "gather"):
        # Backward: all queries, and of two groups in flight dO, its stand-in and the parts of dQ, out and back.
        groups = layer.head_groups(profile)[1]
        return n * query * (1 + 4 * min(2, groups) / groups)
    if mode == ("lv_xattn", "routed"):
        return 5 * layer.mask.rows_seen * n * query
    if mode == ("lv_xattn", "ring"):
        return (2 * 3 + n) * query + 2 * key
    if mode == ("ulysses", "auto"):
        copies = max(n // shape.kv_heads, 1)
        return 3 * (2 * query + copies * key)
    if mode == ("ring", "ring"):
        return 2 * key + 3 * _key_bytes(shape, keys, shape.statistic)
    return 0.0


def obstacle(strategy: str, heads: int, kv_heads: int, ranks: int) -> str | None:
    """Why a strategy cannot run these heads on so many ranks; ``Strategy.unsupported`` without torch."""
    if strategy == "ulysses":
        if heads % ranks:
            return f"{heads} query heads do not divide over {ranks} ranks; use lv_xattn, which has no such limit"
        if kv_heads % ranks and ranks % kv_heads:
            return f"{kv_heads} key heads do not fit {ranks} ranks; use lv_xattn, which has no such limit"
    return None
