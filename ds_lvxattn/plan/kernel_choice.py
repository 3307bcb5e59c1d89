"""The local kernels of one layer: the fastest for each pass, its mask and its shape, of those that were measured."""

from __future__ import annotations

from collections.abc import Collection

from ds_lvxattn.plan.cost import Layer
from ds_lvxattn.plan.modes import Mode
from ds_lvxattn.plan.profile import Profile

AUTO = "auto"
FUSED = ("fa4", "cudnn", "triton")  # what calibration measures on a GPU: the others are never the fastest there


def kernel_choice(layer: Layer, profile: Profile, mode: Mode, usable: Collection[str] | None = None) -> tuple[str, str]:
    """The kernels that ``auto`` is to prefer, and why.

    Args:
        layer: the layer.
        profile: the machine.
        mode: what it runs with.
        usable: kernels that this run can use; None: all of the profile.

    Returns:
        ``FORWARD/BACKWARD``, or ``auto`` where fewer than two kernels were measured that could do the layer: then there
        is nothing to compare, and the kernels' own order holds.
    """
    names = sorted({kernel.name for kernel in profile.kernels_for(layer.shape.head_dim, layer.mask.masked)})
    names = [name for name in names if usable is None or name in usable]
    known = {kernel.name for kernel in profile.kernels}
    missing = [name for name in FUSED if usable is not None and name in usable and name not in known]
    unmeasured = f"{', '.join(missing)} can run here, but {profile.name} has no measurement of it" if missing else ""
    if len(names) < 2:
        return AUTO, unmeasured
    passes = {name: mode.passes(layer, profile.limited_to([name])) for name in names}
    forward = sorted(names, key=lambda name: passes[name].forward.kernel)
    backward = sorted(names, key=lambda name: passes[name].backward.kernel)
    times = (
        "forward " + ", ".join(f"{name} {passes[name].forward.kernel * 1e3:.3g} ms" for name in forward),
        "backward " + ", ".join(f"{name} {passes[name].backward.kernel * 1e3:.3g} ms" for name in backward),
    )
    why = f"kernels by what {profile.name} measured: {'; '.join(times)}"
    return f"{forward[0]}/{backward[0]}", f"{why}; {unmeasured}" if unmeasured else why
