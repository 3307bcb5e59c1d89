"""Nothing travels: a rank attends to its own keys. One rank's attention, and the floor of query exchange."""

from __future__ import annotations

from ds_lvxattn.plan.cost import Layer, Pass, Passes, kernel_times, moved, seen_on_a_rank
from ds_lvxattn.plan.modes.mode import LOCAL_OPERATOR, Mode, own_inputs, own_results
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic


def traffic(shape: LayerShape, rank: int) -> Traffic:
    return Traffic(0, 0)


def passes(layer: Layer, profile: Profile) -> Passes:
    """All queries over the rank's own keys."""
    shape = layer.shape
    kernels = kernel_times(layer, profile, sum(shape.q_lengths), max(shape.kv_lengths), *seen_on_a_rank(layer))
    delta = 0.0 if kernels.takes_out else moved(profile, 2 * shape.output_bytes(max(shape.q_lengths)))
    return Passes(Pass(kernels.forward), Pass(kernels.backward, delta))


def workspace(layer: Layer, profile: Profile) -> float:
    return 0.0


LOCAL = Mode(
    strategy="local",
    schedule="auto",
    implementation="ds_lvxattn.exchange.strategies.local:attend_locally",
    operators=(LOCAL_OPERATOR,),
    traffic=traffic,
    passes=passes,
    workspace=workspace,
    returned=own_results,
    inputs=own_inputs,
    colour="#555555",
    eligible=False,
)
