"""The watchdog: which rank is named, and that a rank that is late is not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from ds_lvxattn.groups import set_timeouts
from ds_lvxattn.training import watchdog
from ds_lvxattn.training.watchdog import Watchdog


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Watchdog, Watchdog]]:
    """The watchdogs of two ranks with one store; their threads are stepped by hand."""
    store = dist.HashStore()
    ranks = []
    for rank in range(2):
        made = Watchdog()
        made.rank, made.ranks, made.timeout, made.life, made.apart = rank, 2, 100.0, 30.0, 5.0
        made._store, made._answered, made._ended, made._lost, made._others = store, time.monotonic(), None, False, {}
        ranks.append(made)
    clock = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    for made in ranks:
        made.clock = clock  # type: ignore[attr-defined]
        made.tick()
    yield ranks[0], ranks[1]


def verdict(rank: Watchdog) -> str | None:
    """What this rank finds now; None: nothing is wrong."""
    found: list[str] = []
    rank._leave = lambda why, code=1, found_here=False: found.append(why)  # type: ignore[method-assign]
    rank._answered = rank.clock[0]  # type: ignore[attr-defined]
    rank._look()
    return found[0] if found else None


def pass_time(seconds: float, *alive: Watchdog) -> None:
    """Seconds in which some ranks give signs of life."""
    for _ in range(int(seconds)):
        alive[0].clock[0] += 1.0  # type: ignore[attr-defined]
        for rank in alive:
            rank._beat += 1
            rank._exchange()


def test_a_stopped_rank_is_named_with_its_phase(pair: tuple[Watchdog, Watchdog]) -> None:
    first, second = pair
    second.enter("step 3")
    pass_time(2, first, second)
    first.tick()
    pass_time(28, first)
    assert verdict(first) is None
    pass_time(5, first)
    assert re.match("rank 1 gives no sign of life since 3[0-9] s: .*; its phase was 'step 3'", str(verdict(first)))


def test_a_rank_that_does_not_get_on_is_named_though_it_lives(pair: tuple[Watchdog, Watchdog]) -> None:
    first, second = pair
    second.enter("loading the model")
    first.enter("step 1")
    pass_time(99, first, second)
    assert verdict(first) is None and verdict(second) is None
    pass_time(2, first, second)
    for rank in pair:
        assert re.search("rank 1 is in the phase 'loading the model' since 10[01] s", str(verdict(rank)))


def test_what_was_seen_of_the_others_long_ago_does_not_count(pair: tuple[Watchdog, Watchdog]) -> None:
    first, second = pair
    pass_time(60, first, second)  # the second looks at the others, since it does not get on
    second.tick()
    first.tick()
    pass_time(45, first, second)
    assert verdict(second) is None


def test_an_error_of_another_rank_is_told(pair: tuple[Watchdog, Watchdog]) -> None:
    first, second = pair
    first._threads = [watchdog.threading.current_thread()]
    first.enter("step 7")
    first.failed(ValueError("a fault"))
    pass_time(1, first, second)
    assert verdict(second) == "rank 0 ended in the phase 'step 7': ValueError: a fault"


def test_the_echo_of_another_ranks_end_is_told_from_an_error_of_this_rank(pair: tuple[Watchdog, Watchdog]) -> None:
    first, second = pair
    assert Watchdog().end_of_others() is None  # without a process group
    for rank in pair:
        rank._threads = [watchdog.threading.current_thread()]
    assert second.end_of_others() is None
    first.failed(ValueError("a mistake"), 2)
    assert second.end_of_others() == (2, "rank 0 ended in the phase 'starting': ValueError: a mistake")
    second._ended, second._lost = None, True
    second._store = None  # type: ignore[assignment]
    assert second.end_of_others() == (1, "rank 0 has ended")


def test_a_torch_that_lacks_what_is_used_inside_it_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("_get_default_store", "_set_pg_timeout"):
        monkeypatch.delattr(dist.distributed_c10d, name)
    watching = Watchdog()
    watching.start(10.0)
    watching.enter("step 1")
    watching.failed(ValueError("a fault"))
    assert watching.end_of_others() is None
    set_timeouts(timedelta(seconds=10))
    first, second = (record.getMessage() for record in caplog.records)
    assert "what ranks do is not watched" in first and "cannot change the timeout" in second
