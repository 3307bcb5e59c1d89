"""Micro-batches in a fixed order, loaded ahead, with one verdict on broken samples for all ranks of a group.

A rank decodes only its own frames, so only it may notice that a video is broken. Before a micro-batch is used, the
ranks of the group compare what they found; a sample that failed anywhere is dropped everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch.distributed as dist

from ds_lvxattn.data.collate import Collator, Images
from ds_lvxattn.data.layout import BatchLayout
from ds_lvxattn.data.sample import IGNORE, Sample, SampleError, SampleSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """Samples, their layout and the frames that this rank decoded; ``skipped`` of them were replaced."""

    layout: BatchLayout
    images: Images
    skipped: int


class Loader:
    """Loads the micro-batches of one rank.

    Args:
        source: the dataset.
        collator: knows the layout and loads the frames.
        control: gloo group over which the verdicts travel: host messages only, so the device is never waited for.
        skip_bad: whether a broken sample is skipped with a warning (and counted) or fatal.
    """

    def __init__(
        self, source: SampleSource, collator: Collator, control: dist.ProcessGroup, skip_bad: bool
    ) -> None:
        self.source, self.collator, self.control, self.skip_bad = source, collator, control, skip_bad

    def load(self, rows: Sequence[int | None]) -> Loaded:
        """The micro-batch of dataset ``rows``; None is a sample without content.

        A skipped sample is replaced by one token without label or frame, so that every rank still runs the same
        modules and collectives.

        Raises:
            SampleError: on every rank, when a sample is broken and broken samples are fatal.
        """
        nothing = Sample([self.collator.pad_token], [IGNORE])
        found = [
            nothing if row is None else _attempt(lambda row=row: self.source.sample(row)) for row in rows
        ]
        failures = self._compare([f if isinstance(f, SampleError) else _digest(f) for f in found])
        samples = [
            nothing if bad or isinstance(f, SampleError) else f
            for f, bad in zip(found, failures, strict=True)
        ]
        layout = self.collator.layout(samples)
        images = [
            _attempt(lambda i=i, s=s: s.load_frames(layout.own_frames(i, self.collator.rank)))
            for i, s in enumerate(samples)
        ]
        broken = self._compare([i if isinstance(i, SampleError) else "" for i in images])
        if any(broken):
            samples = [nothing if bad else s for s, bad in zip(samples, broken, strict=True)]
            layout = self.collator.layout(samples)
            images = self.collator.load(samples, layout)
        return Loaded(layout, images, sum(failures) + sum(broken))

    def _compare(self, findings: Sequence[SampleError | str]) -> list[bool]:
        """Which samples failed on any rank. ``findings`` hold an error, or a digest equal on all ranks."""
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size(self.control))]
        mine = [f"!{f}" if isinstance(f, SampleError) else f for f in findings]
        dist.all_gather_object(everyone, mine, group=self.control)
        failed = []
        for verdicts in zip(*everyone, strict=True):
            errors = sorted({v[1:] for v in verdicts if v.startswith("!")})
            if not errors and len(set(verdicts)) > 1:
                errors = [f"the ranks of the group read different data: {sorted(set(verdicts))}"]
            if errors and not self.skip_bad:
                raise SampleError(
                    f"{errors[0]} (set 'finetuning.on_bad_sample' to 'skip' to go on without it)"
                )
            if errors and dist.get_rank(self.control) == 0:
                logger.warning("skipped a sample: %s", errors[0])
            failed.append(bool(errors))
        return failed

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


def _attempt(make: Callable[[], Sample] | Callable[[], list]):
    try:
        return make()
    except SampleError as error:
        return error


def _digest(sample: Sample) -> str:
    return f"{sample.name}: {len(sample.input_ids)} tokens, {sample.num_frames} frames"
