"""The choice for one layer: every strategy's predicted time, bytes and memory, and which is taken. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ds_lvxattn.plan.cost import Cost, Layer
from ds_lvxattn.plan.head_shards import divides_heads
from ds_lvxattn.plan.modes import Mode, ModeKey, eligible_modes
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape

# Predictions closer than this are a tie, which fewer bytes decide: they are exact, and what is shared with others.
TIE = 0.01
# The same where the host issues the layer more slowly than the device runs it: its time is far less certain.
HOST_TIE = 0.15
# A layer changes its strategy only for a gain above this, so that batches near a boundary do not make it swing.
HYSTERESIS = 0.05

ShapeClass = tuple[int, int, int]  # sequences; bits of the text and the visual length


@dataclass(frozen=True)
class Candidate:
    """What is expected of one strategy and schedule.

    Attributes:
        mode: the strategy and schedule.
        cost: predicted seconds; None where it cannot run.
        received: bytes that the rank that receives most receives, forward and backward; exact. None as ``cost``.
        workspace: bytes that the exchange needs while it runs. None as ``cost``.
        obstacle: why it cannot run, or None.
        between: of ``received``, bytes that come from other nodes. None as ``cost``.
    """

    mode: Mode
    cost: Cost | None
    received: int | None
    workspace: float | None
    obstacle: str | None = None
    between: int | None = None

    @property
    def seconds(self) -> float:
        return self.cost.total if self.cost is not None else float("inf")


def candidates(
    layer: Layer,
    profile: Profile,
    schedules: Mapping[str, Collection[str]] | None = None,
    room: float | None = None,
    forced: str | None = None,
) -> list[Candidate]:
    """Every strategy and schedule with what is expected of it.

    Args:
        layer: the layer.
        profile: the machine.
        schedules: for a strategy, the schedules to look at; all for those not named.
        room: bytes that an exchange may need while it runs; None: no limit.
        forced: a strategy of which all schedules count, even where they are those of another one.
    """
    found = []
    shape = layer.shape
    for mode in eligible_modes():
        wanted = (schedules or {}).get(mode.strategy)
        if wanted is not None and mode.schedule not in wanted:
            continue
        if mode.strategy != forced and wanted is None and not mode.adds(layer):
            continue
        why = mode.why_not(shape)
        need = mode.workspace(layer, profile) if why is None else 0.0
        if why is None and room is not None and need > room:
            why = f"needs {need / 1e9:.1f} GB while it runs, and {room / 1e9:.1f} GB are there"
        if why is not None:
            found.append(Candidate(mode, None, None, None, why))
            continue
        most = max((mode.traffic(shape, rank) for rank in _ranks_that_differ(shape, mode)), key=lambda each: each.total)
        received, between = most.total, most.between
        if mode.routes_by_mask and shape.routed_rows is None:  # no batch at hand: as the mask's summary says
            received, between = (round(size * layer.mask.rows_seen) for size in (received, between))
        found.append(Candidate(mode, mode.cost(layer, profile), received, need, between=between))
    return found


def _ranks_that_differ(shape: LayerShape, mode: Mode) -> Collection[int]:
    """One rank for all that have the same heads, and the same shards around them."""
    if len(set(shape.q_lengths)) > 1 or len(set(shape.kv_lengths)) > 1 or shape.routed_rows is not None:
        return range(shape.ranks)
    shared_by = mode.head_ranks(shape)
    return (0,) if divides_heads(shape.heads, shape.kv_heads, shared_by) else range(shared_by)


def choose(found: Sequence[Candidate], before: ModeKey | None = None) -> Candidate | None:
    """The fastest by prediction; ties go to fewer bytes, first of those between nodes.

    ``before`` is kept unless the gain is worth a change.

    Returns:
        None when none can run.
    """
    possible = [candidate for candidate in found if candidate.cost is not None]
    if not possible:
        return None
    least = min(candidate.seconds for candidate in possible)
    for candidate in possible:
        if candidate.mode.key == before and candidate.seconds <= least * (1 + HYSTERESIS):
            return candidate
    tied = [candidate for candidate in possible if candidate.seconds <= least * (1 + tie(possible))]
    return min(tied, key=lambda candidate: (candidate.between or 0, candidate.received or 0))


def tie(possible: Sequence[Candidate]) -> float:
    """Up to which share more than the fastest takes candidates count as equally fast."""
    fastest = min(possible, key=lambda candidate: candidate.seconds)
    return HOST_TIE if fastest.cost is not None and fastest.cost.host_bound else TIE


def best_of_each(found: Sequence[Candidate]) -> dict[str, Candidate]:
    """For every strategy its best schedule, or one that says why it cannot run."""
    own: dict[str, list[Candidate]] = {}
    for candidate in found:
        own.setdefault(candidate.mode.strategy, []).append(candidate)
    return {strategy: choose(some) or some[0] for strategy, some in own.items()}


def reason(chosen: Candidate, found: Sequence[Candidate], layer: Layer, profile: Profile, kept: bool) -> str:
    """Why ``chosen`` was taken, with the times that decided it.

    Args:
        kept: it ran before, and nothing was enough faster.
    """
    shape = layer.shape
    times = sorted((c for c in best_of_each(found).values() if c.cost is not None), key=lambda c: c.seconds)
    compared = ", ".join(f"{c.mode.name} {c.seconds * 1e3:.3g} ms" for c in times)
    cost = chosen.cost
    assert cost is not None
    kernels = cost.forward.kernel + cost.backward.kernel
    exchange = cost.forward.exchange + cost.backward.exchange + cost.repeated.exchange
    if kept:
        why = f"kept: no other is predicted more than {HYSTERESIS:.0%} faster"
    elif times[0].mode != chosen.mode:
        why = f"fewest bytes of those predicted within {tie(times):.0%} of the fastest"
    else:
        why = "predicted fastest"
    text = (
        f"{why}, forward and backward, at {sum(shape.q_lengths)} queries and {sum(shape.kv_lengths)} keys on "
        f"{shape.ranks} ranks ({profile.name}): {compared}; of its time kernels {kernels * 1e3:.3g} ms, "
        f"exchange not hidden {exchange * 1e3:.3g} ms"
    )
    if cost.host_bound:
        text += f", less than the host takes to issue it ({cost.host * 1e3:.3g} ms)"
    barred = [f"{c.mode.name} not possible: {c.obstacle}" for c in found if c.obstacle is not None]
    return "; ".join([text, *barred])


def shape_class(batch: int, queries: int, keys: int) -> ShapeClass:
    """Batches of one class share a plan: sequences, and text and visual tokens to the next power of two."""
    return batch, max(queries - 1, 0).bit_length(), max(keys - 1, 0).bit_length()
