"""All-gathers of parameters that ZeRO-3 has partitioned, many under way at a time.

DeepSpeed's own gathers put the parameters of a module into one buffer and copy them out of it, and where the caller
waits for them, wait for the device too. Here a large parameter arrives where it stays, small ones come by one
collective, and the device's stream alone waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from torch import Tensor

from ds_lvxattn.exchange.comm import all_gather_single

LARGE = 1 << 22  # elements of a parameter that is gathered by itself


class Gathers:
    """Those of one model; every rank starts the same ones in the same order."""

    def __init__(self) -> None:
        self._arrive: dict[Any, Callable[[], None]] = {}  # of a parameter under way: waits, and says that it is there

    @torch.no_grad()
    def start(self, parameters: Iterable[Any]) -> None:
        """Gather those that are partitioned; large ones arrive in this order, behind all small ones."""
        missing = [p for p in parameters if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        together: dict[Any, list[Any]] = {}
        alone = []
        for parameter in missing:
            group, part = parameter.ds_process_group, parameter.ds_tensor
            parameter.ds_status = ZeroParamStatus.INFLIGHT
            if dist.get_world_size(group) == 1:  # a partition is all of it
                self._is_there(parameter, part.data)
            elif parameter.ds_numel < LARGE:
                together.setdefault((group, part.dtype), []).append(parameter)
            else:
                alone.append(parameter)
        for (group, _), small in together.items():
            self._start_together(group, small)
        for parameter in alone:
            self._start_alone(parameter)

    def wait(self, parameters: Iterable[Any]) -> None:
        """The stream that is current waits for those of ``parameters`` that are under way."""
        if self._arrive:
            for parameter in parameters:
                if parameter in self._arrive:
                    self._arrive[parameter]()

    def finish(self) -> None:
        """Wait for all."""
        self.wait([*self._arrive])

    def _start_alone(self, parameter: Any) -> None:
        part, group = parameter.ds_tensor, parameter.ds_process_group
        whole = part.new_empty(part.ds_numel * dist.get_world_size(group))
        work = all_gather_single(whole, part, group=group, async_op=True)

        def arrive() -> None:
            work.wait()
            self._is_there(parameter, whole)

        self._arrive[parameter] = arrive

    def _start_together(self, group: Any, parameters: list[Any]) -> None:
        ranks, sizes = dist.get_world_size(group), [p.ds_tensor.ds_numel for p in parameters]
        parts = torch.cat([p.ds_tensor for p in parameters])
        of_ranks = parts.new_empty(ranks, parts.numel())
        work = all_gather_single(of_ranks.view(-1), parts, group=group, async_op=True)

        def arrive() -> None:
            work.wait()
            wholes = [parts.new_empty(ranks, size) for size in sizes]
            torch.split_with_sizes_copy(of_ranks, sizes, dim=1, out=wholes)
            for parameter, whole in zip(parameters, wholes, strict=True):
                self._is_there(parameter, whole.view(-1))

        self._arrive.update(dict.fromkeys(parameters, arrive))

    def _is_there(self, parameter: Any, whole: Tensor) -> None:
        parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)  # behind it is padding
        parameter.ds_status = ZeroParamStatus.AVAILABLE
        self._arrive.pop(parameter, None)


def free(parameters: Iterable[Any]) -> None:
    """Leave the partitions of those of ``parameters`` that are whole."""
    for parameter in parameters:
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:
            parameter.ds_active_sub_modules.clear()
            free_param(parameter)
