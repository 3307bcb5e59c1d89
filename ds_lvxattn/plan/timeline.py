"""When a step's parts run: the host issues them, the device follows, ZeRO's transfers go beside both. No torch.

The host runs ahead of the device, by as many launches as the driver queues. So what it issues slowly is hidden behind
what the device computes slowly before it, but only that far: a long encoder hides few of the text layers behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

QUEUE = 1024  # launches that CUDA's driver holds; the host waits for room in it

EXCHANGE = "exchange"
TRANSFERS = "parameters and gradients"
IDLE = "idle"


@dataclass(frozen=True)
class Segment:
    """Something that the device does in one go, a layer's pass mostly.

    Attributes:
        part: what its compute counts as.
        device: seconds of kernels.
        host: seconds that the host needs to issue it.
        launches: kernels in it.
        exchange: seconds of its exchange that no kernel hides.
        gather: seconds of a transfer of its parameters, which may begin with the segment before it.
        fetched: whether DeepSpeed's hooks gather them: the host then waits until they are there, which the device
            copies behind what it has to do, and so does not run ahead of the ``fetched`` segment before.
        reduce: seconds of a transfer of gradients, which begins at its end, when the one before it is done; what
            ``waits`` comes after it.
        waits: whether the host issues it only when the device and all transfers are done.
    """

    part: str
    device: float
    host: float = 0.0
    launches: int = 0
    exchange: float = 0.0
    gather: float = 0.0
    fetched: bool = False
    reduce: float = 0.0
    waits: bool = False


def seconds_by_part(segments: Sequence[Segment]) -> dict[str, float]:
    """Seconds of the parts, and of ``EXCHANGE``, ``TRANSFERS`` and ``IDLE``; together they are those of the step."""
    found = dict.fromkeys((*(segment.part for segment in segments), EXCHANGE, TRANSFERS, IDLE), 0.0)
    host = device = link = begun = fetched = 0.0
    issued, queued = 0, 0
    ends: list[tuple[int, float]] = []  # launches up to the end of a segment, and when the device has done them
    for segment in segments:
        if segment.waits:
            found[TRANSFERS] += max(link - device, 0.0)
            host = device = max(host, device, link)
        while queued < len(ends) and ends[queued][0] <= issued - QUEUE:
            host = max(host, ends[queued][1])
            queued += 1
        if segment.fetched:
            host = max(host, fetched)
        if segment.gather:
            link = max(link, begun) + segment.gather
        ready = max(device, host)
        begun = max(ready, link) if segment.gather else ready
        host += segment.host
        work = segment.device + segment.exchange
        end = max(begun + work, host)
        found[segment.part] += segment.device
        found[EXCHANGE] += segment.exchange
        found[TRANSFERS] += begun - ready
        found[IDLE] += ready - device + end - begun - work
        device = end
        fetched = end if segment.fetched else fetched
        issued += segment.launches
        ends.append((issued, end))
        if segment.reduce:
            found[TRANSFERS] += max(link - device, 0.0)
            device = max(link, device)
            link = device + segment.reduce
    found[TRANSFERS] += max(link - device, 0.0)
    return found
