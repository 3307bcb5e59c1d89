"""Micro-batches in a fixed order, loaded ahead, with one verdict on broken samples for all ranks of a group.

A rank decodes only its own frames, so only it may notice that a video is broken. Before a micro-batch is used, the
ranks of the group compare what they found; a sample that failed anywhere is dropped everywhere.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from ds_lvxattn.batches.collate import Pixels
from ds_lvxattn.batches.layout import BatchLayout
from ds_lvxattn.batches.prepare import Batches, Loaded
from ds_lvxattn.batches.processors import processors_of_rank
from ds_lvxattn.data.sample import IGNORE, Sample, SampleError, SampleSource, without_labels
from ds_lvxattn.groups import SequenceParallelGroups

logger = logging.getLogger(__name__)

MakeSample = Callable[[], Sample | SampleError]  # a sample, or why it cannot be used


def made_already(sample: Sample | SampleError) -> MakeSample:
    """What a loader takes, for a sample that is made already."""
    return lambda: sample


class ControlGroups(NamedTuple):
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

    def close(self) -> None:
        """End the groups and their threads; after the last message, on every rank."""
        for group in self:
            dist.destroy_process_group(group)


@dataclass
class _Begun:
    """A micro-batch whose frames are being decoded.

    Attributes:
        layout: of the samples.
        own: of each sample, the pictures of the frames that lie on this rank.
        jobs: of each sample, frames that are loaded together, and when they are, a picture of each or an error.
        skipped: samples that were replaced.
    """

    samples: list[Sample]
    layout: BatchLayout
    own: list[list[int]]
    jobs: list[list[tuple[Sequence[int], Future[Any]]]]
    skipped: int


class SampleLoader:
    """Loads micro-batches of samples on one rank, ahead of their use.

    Threads decode: over samples, and over the groups of pictures of each. As many read rows and the indices of their
    films, and as many make pixels, over frames, beside them, so that neither waits for what decodes ahead. One thread
    more lays out, compares verdicts and puts pixels together, batch after batch, so that the ranks' messages come in
    one order.

    Args:
        batches: knows the layout.
        control: groups over which the verdicts travel; None: this rank is alone.
        skip_bad: whether a broken sample is skipped with a warning (and counted) or fatal.
        look_ahead: micro-batches that are loaded while one is used; as many are kept in memory.
        workers: threads that decode, and as many for rows and for pixels; None: those of the host, divided over its
            ranks.
        remedy: what to do about a fatal sample, in words.
    """

    def __init__(
        self,
        batches: Batches,
        control: ControlGroups | None,
        skip_bad: bool,
        look_ahead: int = 1,
        workers: int | None = None,
        remedy: str = "set 'finetuning.on_bad_sample' to 'skip' to go on without it",
    ) -> None:
        self.batches, self.control, self.skip_bad = batches, control, skip_bad
        self.look_ahead, self.remedy = look_ahead, remedy
        self._nothing = Sample([batches.collator.pad_token], [IGNORE])
        workers = workers or processors_of_rank()
        self._pool = ThreadPoolExecutor(workers, "decode")
        # Not behind what decodes already: its threads would stand still until every rank has emptied its queue.
        self._makers = ThreadPoolExecutor(workers, "samples")
        self._pixel_threads = ThreadPoolExecutor(workers, "pixels") if workers > 1 else None

    def load_samples(self, samples: Sequence[MakeSample | None]) -> Loaded:
        """The micro-batch of the samples that are made; None is a sample without content.

        Every rank of the group gives the same, and all groups load in the same order. A skipped sample is replaced by
        one token without label or frame, so that every rank still runs the same modules and collectives.

        Raises:
            SampleError: on every rank, when a sample is broken and broken samples are fatal.
        """
        return self._finish(self._begin(samples))

    def _begin(self, samples: Sequence[MakeSample | None]) -> _Begun:
        """Make the samples, and start to decode their frames."""
        made = [None if make is None else self._makers.submit(self._made, make) for make in samples]
        found = [self._nothing if future is None else future.result() for future in made]
        failures = self._compare([f if isinstance(f, SampleError) else _digest(f) for f in found])
        usable = [
            f if isinstance(f, Sample) and not bad else self._nothing for f, bad in zip(found, failures, strict=True)
        ]
        return self._decode(usable, sum(failures))

    def _decode(self, samples: list[Sample], skipped: int) -> _Begun:
        layout = self.batches.layout(samples)
        rank = self.batches.collator.rank_in(layout)
        own = [list(layout.own_pictures(i, rank)) for i in range(len(samples))]
        jobs = [
            [(group, self._pool.submit(attempt, sample.pictures, group, sample.name)) for group in groups]
            for sample, groups in zip(samples, map(_groups, samples, own), strict=True)
        ]
        return _Begun(samples, layout, own, jobs, skipped)

    def _finish(self, begun: _Begun) -> Loaded:
        """Wait for the frames of a micro-batch and make the model's arguments of them."""
        while True:
            images = [_gathered(own, jobs) for own, jobs in zip(begun.own, begun.jobs, strict=True)]
            pixels = self._pixels(begun, images)
            broken = self._compare([i if isinstance(i, SampleError) else "" for i in images])
            if not any(broken):
                portions, mixed = self._of_all_groups(begun.layout)
                return Loaded(begun.layout, pixels, begun.skipped, portions, mixed=mixed)
            # Without them other frames lie on this rank, which may be broken too.
            samples = [self._nothing if bad else s for s, bad in zip(begun.samples, broken, strict=True)]
            begun = self._decode(samples, begun.skipped + sum(broken))

    def _pixels(self, begun: _Begun, images: list[Any]) -> Pixels:
        """What the image processor makes of the frames. Those that it does not take become errors in ``images``."""
        if any(isinstance(i, SampleError) for i in images):
            return {}
        make = functools.partial(self.batches.collator.pixels, begun.layout, threads=self._pixel_threads)
        try:
            return make(images)
        except Exception:
            for at, sample in enumerate(begun.samples):
                others = [image if number == at else [] for number, image in enumerate(images)]
                images[at] = attempt(make, others, sample.name)
                if not isinstance(images[at], SampleError):
                    images[at] = []
            if not any(isinstance(i, SampleError) for i in images):
                raise
            return {}

    def _made(self, make: MakeSample) -> Sample | SampleError:
        sample = make()
        return sample if isinstance(sample, SampleError) else attempt(self.batches.collator.check, sample, sample.name)

    def _compare(self, findings: Sequence[SampleError | str]) -> list[bool]:
        """Which samples failed on any rank. ``findings`` hold an error, or a digest equal on all ranks."""
        mine = [f"!{f}" if isinstance(f, SampleError) else f for f in findings]
        problems = [_problem(verdicts) for verdicts in zip(*self._gather(mine, "sequence"), strict=True)]
        if not self.skip_bad:
            # The ranks of every group must stop, or those of another would wait for these in a collective.
            first = next(filter(None, problems), "")
            fatal = next(filter(None, self._gather(first, "everyone")), "")
            if fatal:
                raise SampleError(f"{fatal} ({self.remedy})")
        for problem in filter(None, problems):
            if self.control is None or dist.get_rank(self.control.sequence) == 0:
                logger.warning("skipped a sample: %s", problem)
        return [bool(problem) for problem in problems]

    def _of_all_groups(self, layout: BatchLayout) -> tuple[int, bool]:
        """The most portions that a group has, and whether some groups have images and others have none."""
        control, mine = self.control, (layout.portions, any(layout.frames))
        if control is None or dist.get_world_size(control.everyone) == dist.get_world_size(control.sequence):
            return layout.portions, False
        portions, with_images = zip(*self._gather(mine, "everyone"), strict=True)
        return max(portions), any(with_images) and not all(with_images)

    def _gather(self, mine: Any, ranks: Literal["sequence", "everyone"]) -> list[Any]:
        """``mine`` of every rank of a group of ``control``."""
        if self.control is None:
            return [mine]
        group: dist.ProcessGroup = getattr(self.control, ranks)
        everyone = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        return everyone

    def ahead(self, batches: Iterator[Sequence[MakeSample | None]]) -> Iterator[Loaded]:
        """The micro-batches of ``batches``; the next ``look_ahead`` ones load while the present one is used."""
        begun: deque[_Begun] = deque()

        def advance() -> Loaded | None:
            while len(begun) < self.look_ahead and (samples := next(batches, None)) is not None:
                begun.append(self._begin(samples))
            return self._finish(begun.popleft()) if begun else None

        ahead, reader = ThreadPoolExecutor(1, "load"), threading.get_ident()
        future = ahead.submit(advance)
        try:
            while (loaded := future.result()) is not None:
                future = ahead.submit(advance)
                yield loaded
        finally:
            # It takes part in what the other ranks compare. The garbage collector may end an abandoned stream on any
            # thread, one that this would wait for too.
            if threading.get_ident() == reader:
                wait([future])
            for batch in begun:
                for _, job in itertools.chain(*batch.jobs):
                    job.cancel()
            ahead.shutdown(wait=False)


class Loader(SampleLoader):
    """Loads micro-batches of the rows of a dataset; see ``SampleLoader``.

    Args:
        source: the dataset.
    """

    def __init__(self, source: SampleSource, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.source = source

    def load(self, rows: Sequence[int | None]) -> Loaded:
        """The micro-batch of dataset ``rows``; None is a sample whose answers no rank is to count.

        It has no content, or where the model skips its vision encoder for text alone that of the last row, since other
        ranks may have images.
        """
        return self.load_samples(self._samples(rows))

    def _samples(self, rows: Sequence[int | None]) -> list[MakeSample | None]:
        return [self._make(row) for row in rows]

    def _make(self, row: int | None) -> MakeSample | None:
        if row is not None:
            return functools.partial(attempt, self.source.sample, row, f"sample {row}")
        if not self.batches.skips_encoder:
            return None
        last = len(self.source) - 1
        return functools.partial(attempt, lambda row: without_labels(self.source.sample(row)), last, f"sample {last}")

    def stream(self, rows: Callable[[int], Sequence[int | None]], first: int, last: int) -> Iterator[Loaded]:
        """Micro-batches ``first`` to ``last - 1``, loaded ahead.

        Args:
            rows: number of a micro-batch to its dataset rows.
        """
        return self.ahead(self._samples(rows(number)) for number in range(first, last))


def _problem(verdicts: Sequence[str]) -> str:
    """What is wrong with a sample by the verdicts of all ranks; empty when nothing is."""
    errors = sorted({verdict[1:] for verdict in verdicts if verdict.startswith("!")})
    if errors:
        return errors[0]
    if len(set(verdicts)) > 1:
        return f"the ranks of the group read different data: {sorted(set(verdicts))}"
    return ""


def attempt(make: Callable[..., Any], argument: Any, name: str) -> Any:
    """``make(argument)``, or what is wrong with the sample: whatever is raised while one is made is its fault."""
    try:
        return make(argument)
    except SampleError as error:
        return error if not name or name in str(error) else SampleError(f"{name}: {error}")
    except Exception as error:
        logger.debug("while %s was made:", name, exc_info=error)
        return SampleError(f"{name}: {type(error).__name__}: {error}")


def _groups(sample: Sample, frames: list[int]) -> Sequence[Sequence[int]]:
    if not frames:
        return []
    groups = attempt(sample.frame_groups, frames, sample.name)
    return [frames] if isinstance(groups, SampleError) else groups  # loading says what is wrong


def _gathered(frames: list[int], jobs: Sequence[tuple[Sequence[int], Future[Any]]]) -> Any:
    """The pictures of ``frames`` in their order, or the first error of those that loaded them."""
    found: dict[int, Any] = {}
    for group, job in jobs:
        images = job.result()
        if isinstance(images, SampleError):
            return images
        found.update(zip(group, images, strict=True))
    return [found[frame] for frame in frames]


def _digest(sample: Sample) -> str:
    return f"{sample.name}: {len(sample.input_ids)} tokens, {sample.num_frames} frames"
