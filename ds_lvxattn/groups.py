"""Process groups of sequence-parallel training, as the ``mpu`` object that ``deepspeed.initialize`` takes.

DeepSpeed 0.19.8 takes the groups from an ``mpu`` or from a device mesh. The mesh is no choice here: with it, ZeRO
partitions and reduces over the data-parallel dimension alone, so gradients would not be summed over the ranks of
a sequence-parallel group. With an ``mpu`` that has ``get_sequence_data_parallel_group``, ZeRO stages 1 to 3 work
over all ranks and divide by ``ranks / sequence_parallel_size``; stage 3 only for parameters that are partitioned
over all ranks beforehand, which ``training.loading.partition_over_all_ranks`` sees to.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import deepspeed
import torch.distributed as dist
from deepspeed import comm as ds_comm
from deepspeed.utils import groups as deepspeed_groups

from ds_lvxattn.errors import ConfigError, RunError

logger = logging.getLogger(__name__)

# Where launchers say how many ranks there are: those of DeepSpeed and torch, and of MPI.
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# And where how many of them are on this host: torch's, DeepSpeed's, those of MPI.
HOST_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


class SequenceParallelGroups:
    """Sequence-parallel groups of consecutive ranks; data parallelism across them.

    Rank ``r`` is rank ``r % size`` of sequence-parallel group ``r // size``. Consecutive ranks share a node, where
    links are fastest. The method names are those that DeepSpeed asks an ``mpu`` for.

    Args:
        size: ranks of a sequence-parallel group; divides the world size.

    Raises:
        ConfigError: ``size`` does not divide the world size.
    """

    def __init__(self, size: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        if size < 1 or world % size:
            raise ConfigError(f"sequence_parallel_size is {size}, which does not divide {world} ranks")
        self.size = size
        self._all = ds_comm.new_group(list(range(world)))
        # Every rank takes part in making every group, in the same order, as torch.distributed asks.
        self._sequence = _own_group([range(i, i + size) for i in range(0, world, size)], rank)
        self._data = _own_group([range(i, world, size) for i in range(size)], rank)
        self._model = _own_group([range(i, i + 1) for i in range(world)], rank)

    def close(self) -> None:
        """End the groups and their threads; after their last use, on every rank.

        DeepSpeed keeps the ``mpu`` of its last engine for engines without one: it forgets this one.
        """
        if deepspeed_groups.mpu is self:
            deepspeed_groups.mpu = None
        for group in (self._sequence, self._data, self._model, self._all):
            dist.destroy_process_group(group)

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self._sequence

    def get_sequence_parallel_world_size(self) -> int:
        return self.size

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank(self._sequence)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """All ranks: what ZeRO partitions over and reduces gradients over."""
        return self._all

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._all)

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank(self._all)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """One rank: no tensor parallelism. DeepSpeed sums gradient norms over it."""
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def leave_out_shared_memory() -> None:
    """DeepSpeed's shared-memory all-reduce is not compiled when it starts ``torch.distributed``.

    It serves inference on CPUs, and it would be compiled at the first start on a machine, under a lock on which a
    later run waits for ever if this one is killed.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def start_distributed(backend: str | None = None, timeout: timedelta | None = None) -> None:
    """Start ``torch.distributed`` and DeepSpeed's front end to it, from the launcher's environment.

    Without a launcher this process is the one rank of the run.

    Args:
        timeout: of the waiting for the other ranks; None: DeepSpeed's.

    Raises:
        RunError: the ranks do not find each other.
    """
    leave_out_shared_memory()
    if not dist.is_initialized() and not any(name in os.environ for name in WORLD_SIZES):
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any
    limit = {} if timeout is None else {"timeout": timeout}
    try:
        deepspeed.init_distributed(backend, verbose=False, **limit)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = next(iter(str(error).splitlines()), "")
        raise RunError(f"the ranks do not find each other at {where} (MASTER_ADDR, MASTER_PORT): {why}") from error


def launched_ranks() -> int:
    """Ranks of this run, before a process group exists: as the launcher says, and 1 without one."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(next(filter(None, map(os.environ.get, WORLD_SIZES)), 1))


def launched_ranks_of_host() -> int | None:
    """Ranks on this host, as the launcher says; None where it does not."""
    found = next(filter(None, map(os.environ.get, HOST_SIZES)), None)
    return None if found is None else int(found)


def set_timeouts(timeout: timedelta) -> None:
    """Give every process group of this rank one timeout, also those that DeepSpeed made with torch's default.

    torch has no public way to do so. Where it has lost this one, a warning says that those groups keep theirs.
    """
    world = getattr(dist.distributed_c10d, "_world", None)
    change = getattr(dist.distributed_c10d, "_set_pg_timeout", None)
    groups = getattr(world, "pg_map", None)
    if groups is None or change is None:
        logger.warning(
            "this torch cannot change the timeout of a process group: those that DeepSpeed made keep torch's, and a "
            "rank that waits in one of them may end later than 'finetuning.timeout_s' says"
        )
        return
    for group in list(groups):
        change(timeout, group)


def _own_group(partition: list[range], rank: int) -> dist.ProcessGroup:
    """Make the groups of a partition of the ranks; return the one that ``rank`` is in."""
    made = {members: ds_comm.new_group(list(members)) for members in partition}
    return next(group for members, group in made.items() if rank in members)
