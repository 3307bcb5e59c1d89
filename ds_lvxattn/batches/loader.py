"""Micro-batches in a fixed order, loaded ahead, with one verdict on broken samples for all ranks of a group.

A rank decodes only its own frames, so only it may notice that a video is broken. Before a micro-batch is used, the
ranks of the group compare what they found; a sample that failed anywhere is dropped everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ds_lvxattn.batches.layout import BatchLayout
from ds_lvxattn.batches.prepare import Batches, Loaded
from ds_lvxattn.data.sample import IGNORE, Sample, SampleError, SampleSource
from ds_lvxattn.groups import SequenceParallelGroups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControlGroups:
    """gloo groups for host messages, so that the device is never waited for.

    A pair serves one loader: loaders run side by side in threads, and their messages must not cross.

    Attributes:
        sequence: the ranks of the sequence-parallel group.
        everyone: all ranks.
    """

    sequence: dist.ProcessGroup
    everyone: dist.ProcessGroup

    @classmethod
    def beside(cls, groups: SequenceParallelGroups) -> ControlGroups:
        """New groups of the same ranks; all ranks call it."""
        world = dist.get_world_size()
        own = dist.get_process_group_ranks(groups.get_sequence_parallel_group())
        partition = [list(range(i, i + len(own))) for i in range(0, world, len(own))]
        twins = [dist.new_group(ranks, backend="gloo") for ranks in partition]
        return cls(twins[partition.index(own)], dist.new_group(list(range(world)), backend="gloo"))


class Loader:
    """Loads the micro-batches of one rank.

    Args:
        source: the dataset.
        batches: knows the layout.
        control: groups over which the verdicts travel.
        skip_bad: whether a broken sample is skipped with a warning (and counted) or fatal.
    """

    def __init__(self, source: SampleSource, batches: Batches, control: ControlGroups, skip_bad: bool) -> None:
        self.source, self.batches, self.control, self.skip_bad = source, batches, control, skip_bad

    def load(self, rows: Sequence[int | None]) -> Loaded:
        """The micro-batch of dataset ``rows``; None is a sample without content.

        A skipped sample is replaced by one token without label or frame, so that every rank still runs the same
        modules and collectives.

        Raises:
            SampleError: on every rank, when a sample is broken and broken samples are fatal.
        """
        nothing = Sample([self.batches.collator.pad_token], [IGNORE])
        found = [nothing if row is None else _attempt(self._sample, row) for row in rows]
        failures = self._compare([f if isinstance(f, SampleError) else _digest(f) for f in found])
        samples = [nothing if bad or isinstance(f, SampleError) else f for f, bad in zip(found, failures, strict=True)]
        skipped = sum(failures)
        while True:
            layout = self.batches.layout(samples)
            own = [layout.own_frames(i, self.batches.collator.rank_in(layout)) for i in range(len(samples))]
            images = [_attempt(s.load_frames, frames) for s, frames in zip(samples, own, strict=True)]
            broken = self._compare([i if isinstance(i, SampleError) else "" for i in images])
            if not any(broken):
                return Loaded(layout, self.batches.collator.pixels(layout, images), skipped, self._most_frames(layout))
            # Without them other frames lie on this rank, which may be broken too.
            samples = [nothing if bad else s for s, bad in zip(samples, broken, strict=True)]
            skipped += sum(broken)

    def _sample(self, row: int) -> Sample:
        return self.batches.collator.check(self.source.sample(row))

    def _compare(self, findings: Sequence[SampleError | str]) -> list[bool]:
        """Which samples failed on any rank. ``findings`` hold an error, or a digest equal on all ranks."""
        mine = [f"!{f}" if isinstance(f, SampleError) else f for f in findings]
        problems = [_problem(verdicts) for verdicts in zip(*_gather(mine, self.control.sequence), strict=True)]
        if not self.skip_bad:
            # The ranks of every group must stop, or those of another would wait for these in a collective.
            first = next(filter(None, problems), "")
            fatal = next(filter(None, _gather(first, self.control.everyone)), "")
            if fatal:
                raise SampleError(f"{fatal} (set 'finetuning.on_bad_sample' to 'skip' to go on without it)")
        for problem in filter(None, problems):
            if dist.get_rank(self.control.sequence) == 0:
                logger.warning("skipped a sample: %s", problem)
        return [bool(problem) for problem in problems]

    def _most_frames(self, layout: BatchLayout) -> int:
        if dist.get_world_size(self.control.everyone) == dist.get_world_size(self.control.sequence):
            return layout.most_frames
        return max(_gather(layout.most_frames, self.control.everyone))

    def stream(self, rows: Callable[[int], Sequence[int | None]], first: int, last: int) -> Iterator[Loaded]:
        """Micro-batches ``first`` to ``last - 1``; the next one loads while the present one is used.

        Args:
            rows: number of a micro-batch to its dataset rows.
        """
        with ThreadPoolExecutor(max_workers=1) as ahead:
            future = ahead.submit(self.load, rows(first)) if first < last else None
            for number in range(first, last):
                assert future is not None
                loaded = future.result()
                future = ahead.submit(self.load, rows(number + 1)) if number + 1 < last else None
                yield loaded


def _gather(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    """``mine`` of every rank of ``group``."""
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _problem(verdicts: Sequence[str]) -> str:
    """What is wrong with a sample by the verdicts of all ranks; empty when nothing is."""
    errors = sorted({verdict[1:] for verdict in verdicts if verdict.startswith("!")})
    if errors:
        return errors[0]
    if len(set(verdicts)) > 1:
        return f"the ranks of the group read different data: {sorted(set(verdicts))}"
    return ""


def _attempt(make: Callable[..., Any], argument: Any) -> Any:
    try:
        return make(argument)
    except SampleError as error:
        return error


def _digest(sample: Sample) -> str:
    return f"{sample.name}: {len(sample.input_ids)} tokens, {sample.num_frames} frames"
