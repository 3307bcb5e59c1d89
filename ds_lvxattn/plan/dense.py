"""Time of what a step does besides attention: matrix products, passes over memory, a layer's host time. No torch.

A product runs at the profile's rate or at the speed at which its operands are read, whichever is slower, corrected by
measured products of like sizes.
"""

from __future__ import annotations

import math
from functools import lru_cache

from ds_lvxattn.plan.kernel_time import interpolated
from ds_lvxattn.plan.profile import HostTime, Profile

# Names in ``Profile.host`` of what takes the host's time besides attention and the projection of K and V.
TEXT_LAYER = "text layer"  # norms, query and output projection, feed-forward part
ENCODER_LAYER = "encoder layer"  # the same, queries, keys and values projected
# ZeRO-3's, of DeepSpeed's Python: a module whose parameters it gathers and releases by hooks; each further parameter
# gathered with them, and (backward) each that it looks at when it releases all at the end of a step; a linear layer by
# its own product.
GATHER = "gather of ZeRO-3"
PARAMETER = "parameter of ZeRO-3"
LINEAR = "linear layer of ZeRO-3"

NO_TIME = HostTime(0.0, 0.0, 0.0)


def host_time(profile: Profile, name: str) -> HostTime:
    """The host's seconds of ``name``; none where the profile does not say."""
    return profile.host.get(name, NO_TIME)


def product_seconds(profile: Profile, rows: float, inputs: float, outputs: float, element: int = 2) -> float:
    """Seconds of ``[rows, inputs]`` by ``[inputs, outputs]``."""
    if min(rows, inputs, outputs) <= 0:
        return 0.0
    ratio = interpolated(_ratios(profile, element), _place(rows, inputs, outputs))
    return profile.launch + ratio * _computed(profile, rows, inputs, outputs, element)


def _computed(profile: Profile, rows: float, inputs: float, outputs: float, element: int) -> float:
    operands = rows * inputs + inputs * outputs + rows * outputs
    return max(2.0 * rows * inputs * outputs / profile.matmul, operands * element / profile.memory_bandwidth)


def _place(rows: float, inputs: float, outputs: float) -> tuple[float, float, float]:
    return math.log2(rows), math.log2(inputs), math.log2(outputs)


@lru_cache(maxsize=64)
def _ratios(profile: Profile, element: int) -> tuple[tuple[tuple[float, float, float], float], ...]:
    """For each measured product its place and the logarithm of measured over computed."""
    found = []
    for p in profile.products:
        computed = _computed(profile, p.rows, p.inputs, p.outputs, element)
        measured = max(p.seconds - profile.launch, 1e-7)
        found.append((_place(p.rows, p.inputs, p.outputs), math.log(measured / computed)))
    return tuple(found)
