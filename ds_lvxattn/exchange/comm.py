"""Collectives of one sequence-parallel group, counted.

Every byte that an attention exchange receives passes here, so that traffic is tested against the formulas.
Data moves as raw bytes: gloo and NCCL then carry every dtype, and nothing is converted on the way.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ds_lvxattn.kernels.torch_internals import start

# torch 2.13 renamed the collective and warns at the old name, the only one that older releases have.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class AllToAllTensor(NamedTuple):
    """One tensor of an all-to-all.

    Slices of ``send`` and ``receive`` along dimension 0 go to and come from the ranks; both are contiguous.
    ``sizes`` are ``(rows sent to, rows received from)`` each rank; None divides evenly. ``what`` names the contents
    for the count.
    """

    what: str
    send: Tensor
    receive: Tensor
    sizes: tuple[Sequence[int], Sequence[int]] | None = None


class Message(NamedTuple):
    """One tensor sent to a group rank while another arrives from a group rank.

    ``send`` and ``receive`` are contiguous; ``what`` names the contents for the count.
    """

    what: str
    send: Tensor
    to: int
    receive: Tensor
    source: int


class Communicator:
    """One sequence-parallel group: its collectives and the bytes that this rank received through them.

    Args:
        group: process group, or None for a single rank (then nothing is ever sent).
        whole: the communicator whose group this one divides; what arrives here is counted there.

    Attributes:
        ranks: ranks in the group.
        rank: this process's rank in the group.
        node_size: ranks of a node: ``r`` and ``s`` share one where ``r // node_size == s // node_size``.
        host_ranks: ranks of a node by their hosts; None: not asked yet, see ``exchange.grid.node_size``.
        received: bytes received from *other* ranks, by what they carry (``queries``, ``outputs``, ...).
        between: of these, bytes received from ranks on other nodes.
        levels: the communicators of both levels of a grid, by its inner size; see ``exchange.grid``.
        made: what strategies make once a group, by its name.
    """

    def __init__(self, group: dist.ProcessGroup | None, whole: Communicator | None = None) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self.name = group.group_name if group is not None else ""
        self.node_size = self.ranks
        self.host_ranks: int | None = None
        self.levels: dict[int, tuple[Communicator, Communicator]] = {}
        self.made: dict[str, Any] = {}
        self.received: Counter[str] = Counter() if whole is None else whole.received
        self.between: Counter[str] = Counter() if whole is None else whole.between

    @property
    def bytes_received(self) -> int:
        """Bytes received from other ranks since the last reset."""
        return sum(self.received.values())

    @property
    def bytes_between_nodes(self) -> int:
        """Of ``bytes_received``, those from other nodes."""
        return sum(self.between.values())

    def reset(self) -> None:
        """Start counting from zero."""
        self.received.clear()
        self.between.clear()

    def _far(self, rank: int) -> bool:
        """Whether a rank of the group is on another node."""
        return rank // self.node_size != self.rank // self.node_size

    def _count(self, what: str, from_each: int) -> None:
        """Count as many bytes from each other rank."""
        self.received[what] += (self.ranks - 1) * from_each
        self.between[what] += (self.ranks - self.node_size) * from_each

    def all_gather(self, x: Tensor, what: str) -> Tensor:
        """Gather equal-shaped tensors of all ranks: ``[...]`` to ``[n, ...]``."""
        x = x.contiguous()
        gathered = x.new_empty((self.ranks, *x.shape))
        if x.numel():
            all_gather_single(_raw(gathered), _raw(x.unsqueeze(0)), group=self.group)
        self._count(what, x.nbytes)
        return gathered

    def start_all_gather(self, buffers: Sequence[tuple[str, Tensor]]) -> Transfer:
        """Start gathering in place: ``[n * rows, ...]`` contiguous, of which the rows of this rank are filled.

        Several buffers (each with the name of its contents) travel in one launch where the backend can.
        """
        calls, sent = [], []
        for what, gathered in buffers:
            self._count(what, gathered.nbytes // self.ranks)
            if gathered.numel():
                whole, rows = _raw(gathered), gathered.shape[0] // self.ranks
                own = whole[self.rank * rows : (self.rank + 1) * rows]
                calls.append(functools.partial(all_gather_single, whole, own, group=self.group, async_op=True))
                sent.append(whole)
        together = len(calls) > 1 and sent[0].is_cuda
        return Transfer(start(calls, self.group, together), sent)

    def start_all_to_all(self, parts: Sequence[AllToAllTensor]) -> Transfer:
        """Start sending slice ``j`` of each part to rank ``j``; slice ``i`` of what arrives comes from rank ``i``.

        Several parts travel in one launch where the backend can. Whether an evenly divided part is empty is the same
        on every rank; a part with sizes of its own is exchanged even if this rank has no row in it.
        """
        calls = []
        run = functools.partial(dist.all_to_all_single, group=self.group, async_op=True)
        for what, send, receive, sizes in parts:
            if sizes is None:
                self._count(what, receive.nbytes // self.ranks)
                if send.numel():
                    calls.append(functools.partial(run, _raw(receive), _raw(send)))
            else:
                leaving, arriving = sizes
                width = math.prod(send.shape[1:]) * send.element_size()
                self.received[what] += width * (sum(arriving) - arriving[self.rank])
                if self.node_size < self.ranks:
                    self.between[what] += width * sum(n for rank, n in enumerate(arriving) if self._far(rank))
                unit = send.element_size() if send.dim() == 1 else 1  # bytes are counted along the last dimension
                divided = [n * unit for n in arriving], [n * unit for n in leaving]
                calls.append(functools.partial(run, _raw(receive), _raw(send), *divided))
        sent = [part.send for part in parts]
        together = len(calls) > 1 and sent[0].is_cuda
        return Transfer(start(calls, self.group, together, sent[0].device if together else None), sent)

    def all_reduce(self, x: Tensor, what: str) -> Tensor:
        """Sum over the ranks, in place. Counted as a ring: each element comes twice less its own part."""
        if x.numel():
            dist.all_reduce(x, group=self.group)
        self.received[what] += 2 * x.nbytes * (self.ranks - 1) // self.ranks
        if self._far((self.rank - 1) % self.ranks):
            self.between[what] += 2 * x.nbytes * (self.ranks - 1) // self.ranks
        return x

    def broadcast(self, x: Tensor, what: str) -> Tensor:
        """``x`` of the first rank on every rank, in place; contiguous."""
        if self.ranks > 1 and x.numel():
            dist.broadcast(_raw(x), group=self.group, group_src=0)
            self.received[what] += x.nbytes * (self.rank > 0)
            self.between[what] += x.nbytes * self._far(0)
        return x

    def exchange(self, messages: Sequence[Message]) -> Transfer:
        """Start point-to-point messages together; empty tensors are not sent, so both ends know the lengths.

        Returns:
            A handle; see ``Transfer.wait``.
        """
        calls = []
        for what, send, to, receive, source in messages:
            if send.numel():
                calls.append(functools.partial(dist.isend, _raw(send), group=self.group, group_dst=to))
            if receive.numel():
                calls.append(functools.partial(dist.irecv, _raw(receive), group=self.group, group_src=source))
            self.received[what] += receive.nbytes
            self.between[what] += receive.nbytes * self._far(source)
        # What ``batch_isend_irecv`` comes to, whose objects and checks of every message take the host longer.
        sent = [message.send for message in messages]
        together = bool(calls) and sent[0].is_cuda
        return Transfer(start(calls, self.group, together, sent[0].device if together else None), sent)

    def account(self, x: Tensor, what: str) -> Tensor:
        """Count an evenly divided all-to-all that a library ran: ``x`` is what this rank got out of it.

        The gradient of ``x`` goes back through the same exchange, which counts the same bytes again.
        """
        return _Account.apply(x, self, what)

    def count_all_to_all(self, x: Tensor, what: str) -> None:
        self._count(what, x.nbytes // self.ranks)


class Transfer:
    """Messages in flight. On CUDA they travel on the communication stream of the process group."""

    def __init__(self, works: Sequence[dist.Work], sent: list[Tensor]) -> None:
        self._works = works
        self._sent = sent  # keeps the buffers alive until they have left

    def wait(self) -> None:
        """Order what follows on the current stream after the messages; does not block the host on CUDA."""
        for work in self._works:
            work.wait()
        self._works = ()
        self._sent.clear()


class _Account(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, comm: Communicator, what: str) -> Tensor:
        ctx.comm, ctx.what = comm, what
        comm.count_all_to_all(x, what)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.comm.count_all_to_all(grad, ctx.what)
        return grad, None, None


def _raw(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, along its last dimension."""
    if x.dim() and x.stride(-1) == 1:
        return x.view(torch.uint8)
    # A dimension of one element may have any stride, and a number has none.
    shape = x.shape[:-1] if x.dim() else ()
    row = x.as_strided((x.numel(),), (1,)).view(torch.uint8)
    return row.view(*shape, x.numel() // max(math.prod(shape), 1) * x.element_size())


# An operator schema cannot hold a process group, so operators name it and find it here, as torch.distributed
# itself resolves groups by name. Written once a group; holds no setting.
_communicators: dict[str, Communicator] = {}


def communicator(group: dist.ProcessGroup | None) -> Communicator:
    """The one ``Communicator`` of ``group``, made at its first use."""
    name = "" if group is None else group.group_name
    known = _communicators.get(name)
    if known is None or known.group is not group:
        known = _communicators[name] = Communicator(group)
    return known


def communicator_of_level(group: dist.ProcessGroup, whole: Communicator) -> Communicator:
    """The ``Communicator`` of a group that is a part of ``whole``'s, made anew and known by its name from then on."""
    _communicators[group.group_name] = Communicator(group, whole)
    return _communicators[group.group_name]


def close_levels(comm: Communicator) -> None:
    """End the groups of the levels of ``comm`` and forget it; after its last use, on every rank."""
    for level in {level for levels in comm.levels.values() for level in levels if level is not comm}:
        if level.group is not None:
            dist.destroy_process_group(level.group)
            _communicators.pop(level.name, None)
    comm.levels.clear()
    _communicators.pop(comm.name, None)


def communicator_by_name(name: str) -> Communicator:
    """The ``Communicator`` of the group called ``name``; ``communicator`` must have been called for it."""
    return _communicators[name]
