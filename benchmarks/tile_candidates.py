"""What ``tiles.py`` tries for each case and pass, the present choice first."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from attention_cases import CASES, Case
from fa4_forms import CUDNN, FA4, in_shares, packed_forward, unpacked_backward, unpacked_forward
from torch import Tensor

from ds_lvxattn.kernels.base import Call
from ds_lvxattn.kernels.triton.backward import interval_backward
from ds_lvxattn.kernels.triton.backward_plan import WORKSPACE_BYTES
from ds_lvxattn.kernels.triton.forward import interval_forward
from ds_lvxattn.kernels.triton.tiles import BackwardConfig, ForwardConfig, backward_config, forward_config

# How much faster than in docs/kernels_h100.json a pass would have to be to reach its target.
WANTED = {
    ("growing", 4096, False): 1.65 / 1.64, ("sliding", 4096, False): 1.5 / 1.4, ("encoder", 6432, True): 350 / 286,
}  # fmt: skip


class Tiles(NamedTuple):
    """A form of the Triton kernels."""

    config: ForwardConfig | BackwardConfig
    workspace: int = WORKSPACE_BYTES

    @property
    def name(self) -> str:
        space = "" if self.workspace == WORKSPACE_BYTES else f", {self.workspace >> 20} MiB"
        return f"triton {tuple(self.config)}{space}"


@dataclass
class Inputs:
    """Tensors of a case; ``out`` and what follows are those of the forward pass."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    start: Tensor | None
    stop: Tensor | None
    scale: float
    out: Tensor
    lse: Tensor
    delta: Tensor

    @property
    def ranges(self) -> tuple[Tensor | None, Tensor | None]:
        return self.start, self.stop


def wanted(case: Case, backward: bool) -> float | None:
    return WANTED.get((case.mask, case.rows, backward))


def tuned(case: Case, backward: bool) -> Tiles:
    pattern = None if case.mask == "visible" else case.pattern
    return Tiles((backward_config if backward else forward_config)(case.head_dims, 2, pattern, True))


def tiles(case: Case, backward: bool) -> list[Tiles]:
    """Forms of the Triton kernels, the present one first."""
    first = tuned(case, backward)
    if not backward:
        found = [Tiles(ForwardConfig(*x)) for x in _forward(case)]
    elif case.mask == "frame":
        found = [Tiles(x) for x in _backward_of_frames()]
    else:
        found = list(_backward_by_workspace(case))
    return [first, *dict.fromkeys(x for x in found if x != first)]


def _forward(case: Case) -> list[tuple[int, ...]]:
    if case.mask == "frame":  # bound by memory: few rows compute less that is hidden
        small = itertools.product((16, 32), (64, 128), (1, 2, 4), (2, 3, 4), (2,))
        found = [x for x in small if x[:3:2] != (32, 1)]  # which spills
        found += itertools.product((64,), (64, 128), (4,), (2, 3, 4), (2,))
        return [*found, (16, 256, 2, 2, 2), (16, 256, 4, 2, 2)]
    if case.mask == "sliding":
        sizes = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 3), (64, 32, 4, 4), (64, 128, 4, 2)]
        sizes += [(128, 32, 4, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (32, 64, 4, 3), (32, 64, 2, 3)]
        return [(*x, 2) for x in sizes]
    sizes = [(128, 64, 4, 2), (128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (256, 64, 8, 2)]
    return [(*x, resident) for x in sizes for resident in ((1, 2, 3) if case.mask == "visible" else (2,))]


def _backward_of_frames() -> list[BackwardConfig]:
    """Both kernels apart, and as one."""
    found = []
    for warps, stages, query in itertools.product((4, 2), (2, 3), ((4, 3), (2, 3))):
        found.append(BackwardConfig(16, 16, 64, warps, stages, 3, *query, keep_ds=False))
    for (tile, warps), block_n, stages in itertools.product(((16, 4), (16, 2), (32, 4)), (32, 64, 128), (2, 3)):
        config = BackwardConfig(tile, tile, block_n, warps, stages, 3, warps, stages, keep_ds=False, together=True)
        found.append(config)
    return found


def _backward_by_workspace(case: Case) -> list[Tiles]:
    """The kernel that owns keys, the one that owns rows, and workspaces."""
    small = case.head_dim <= 96
    keys = [(64, 64, 4, 2, 2), (32, 64, 4, 2, 2), (64, 128, 8, 2, 1), (32, 128, 8, 2, 1), (64, 64, 4, 3, 2)]
    # None of 8 warps over 64 keys: with a second block of columns that may end in an illegal memory access.
    keys += [(64, 128, 8, 3, 1), (128, 128, 8, 2, 1), (64, 64, 4, 1, 2)] if small else []
    tile = (128, 64) if case.rows < 1024 or small else (128,)
    queries = ((8, 4), (8, 3), (4, 3)) if small or case.rows < 1024 else ((8, 4),)
    found = []
    for rows, (block_m, block_n, warps, stages, resident), query in itertools.product(tile, keys, queries):
        if block_m > rows:
            continue
        registers = 128 if query[0] == 8 else None
        config = BackwardConfig(rows, block_m, block_n, warps, stages, resident, *query, query_registers=registers)
        shares = (1, 2, 4) if small or case.rows < 1024 else (1, 2)
        found += [Tiles(config, WORKSPACE_BYTES // share) for share in shares]
    return found


def kernels_of(forms: list[Tiles]) -> list[tuple[str, Tiles]]:
    """Kernels to compile for ``forms``, each with one form that launches it; an empty name is all of a form's."""
    found: dict[tuple[object, ...], tuple[str, Tiles]] = {}
    for form in forms:
        config = form.config
        if isinstance(config, ForwardConfig):
            found.setdefault(tuple(config), ("", form))
            continue
        of_keys = config._replace(resident=0, query_warps=0, query_stages=0, query_registers=None)
        if config.together:
            found.setdefault(tuple(of_keys), ("grads_together_kernel", form))
            continue
        name = "query_grads_kernel" if config.keep_ds else "query_grads_again_kernel"
        of_queries = (name, config.tile, config.block_n, *config[6:8], config.query_registers)
        found.setdefault(tuple(of_keys), ("key_grads_kernel", form))
        found.setdefault(of_queries, (name, form))
    return list(found.values())


def triton_call(x: Inputs, form: Tiles, backward: bool) -> tuple[Tensor, ...]:
    if backward:
        return interval_backward(
            x.dout, x.q, x.k, x.v, x.lse, x.delta, *x.ranges, x.scale, form.workspace, form.config
        )  # fmt: skip
    return interval_forward(x.q, x.k, x.v, *x.ranges, x.scale, config=form.config)


def other_calls(case: Case, x: Inputs, backward: bool) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Forms of other kernels, the one that ``auto`` takes at present first."""
    if not x.q.is_cuda:
        return {}
    masked = x.start is not None
    call = (Call.backward if backward else Call.forward)(x.q, x.k, x.v, masked, pattern=case.pattern)
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    if CUDNN.unsupported(call) is None and case.rows < 1024:
        if backward:
            calls["cudnn"] = partial(CUDNN.backward, x.dout, x.q, x.k, x.v, x.out, x.lse, None, None, None, x.scale)
        else:
            calls["cudnn"] = partial(CUDNN.forward, x.q, x.k, x.v, None, None, x.scale)
            for shares in (4, 8):
                calls[f"cudnn, {shares} shares"] = partial(in_shares, CUDNN, shares, x.q, x.k, x.v, x.scale)
    if FA4.unsupported(call) is not None:
        return calls
    given = (x.q, x.k, x.v, *x.ranges, x.scale)
    if backward:
        terms = (x.lse, x.delta, *x.ranges, x.scale)
        calls["fa4"] = partial(FA4.backward, x.dout, x.q, x.k, x.v, None, *terms)
        if case.heads != case.kv_heads:
            calls["fa4, heads apart"] = partial(unpacked_backward, x.dout, x.q, x.k, x.v, *terms)
        return calls
    calls["fa4"] = partial(FA4.forward, *given, None, case.pattern)
    if case.heads != case.kv_heads and masked:
        calls["fa4, heads apart"] = partial(unpacked_forward, *given)
        calls["fa4, heads packed"] = partial(packed_forward, *given)
    return calls


def present(case: Case, backward: bool) -> str:
    """Start of the name of what ``auto`` takes."""
    if case.mask == "visible":
        return "fa4"
    if backward and case.heads != case.kv_heads:
        return "fa4"
    return "fa4" if case.mask in ("growing", "encoder") else "triton"


def worth_trying() -> list[tuple[Case, bool]]:
    """Cases and passes, those far from their targets first."""
    of = {(case.mask, case.rows, case.heads, case.head_dim): case for case in CASES}
    few, many = of["visible", 384, 32, 128], of["visible", 4096, 32, 128]
    growing, sliding = of["growing", 4096, 32, 128], of["sliding", 4096, 32, 128]
    frame, encoder = of["frame", 4096, 8, 64], of["encoder", 6432, 16, 80]
    return [
        (sliding, False), (frame, True), (encoder, True), (growing, False), (growing, True), (frame, False),
        (sliding, True), (few, False), (few, True), (many, True),
    ]  # fmt: skip


def smaller(case: Case, divisor: int) -> Case:
    """``case`` with so many times fewer rows and keys."""
    return replace(case, rows=max(case.rows // divisor, 1), keys=max(case.keys // divisor, 64))


def compile_form(case: Case, backward: bool, form: Tiles) -> None:
    """The kernels of a form, in a process whose launches only compile."""
    q, k, v, dout = (torch.empty(shape, dtype=torch.bfloat16) for shape in case.shapes)
    rows = torch.empty(q.shape[:3])
    x = Inputs(q, k, v, dout, *case.interval(), case.scale, dout, rows, rows)
    triton_call(x, form, backward)
