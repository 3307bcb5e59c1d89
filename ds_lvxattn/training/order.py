"""Which dataset rows make which micro-batch: a function of the position alone, so runs can resume."""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvxattn.data.sample import SampleSource


@dataclass(frozen=True)
class Order:
    """Rows of the micro-batches of one data-parallel rank.

    Micro-batch ``m`` of all data-parallel ranks together takes the next ``micro_batch * data_ranks`` rows, in the
    source's own order of that epoch. The ranks of a sequence-parallel group take the same rows.
    """

    source: SampleSource
    micro_batch: int
    data_rank: int
    data_ranks: int

    def rows(self, number: int) -> list[int]:
        """Rows of micro-batch ``number``, counted from the start of the run."""
        first = (number * self.data_ranks + self.data_rank) * self.micro_batch
        size = len(self.source)
        return [self.source.order(at // size)[at % size] for at in range(first, first + self.micro_batch)]
