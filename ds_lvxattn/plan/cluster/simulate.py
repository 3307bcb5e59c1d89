"""The exchanges step by step: a discrete-event simulation of the ranks' streams and of the links between them.

It knows what the closed formulas of ``cost.py`` and ``network.py`` sum up: which transfer waits for which kernel,
links that transfers share, slower links between nodes, ranks that are slower than others. Tests hold the formulas to
it. Equal nodes do the same at the same time, so unless ranks differ only one node is simulated, whose messages from the
node before are those that it sends itself.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ds_lvxattn.plan.network import inner_level, node_bandwidth, nodes_of, outer_level
from ds_lvxattn.plan.profile import Profile


@dataclass(eq=False)
class Task:
    """Something that holds a stream.

    Attributes:
        stream: tasks of one stream run one after another, in the order in which they were added.
        seconds: computation, or what a message takes besides its bytes; holds the stream.
        size: bytes to transfer after ``seconds``; holds the stream too.
        links: links that the bytes share with other transfers.
        delay: seconds after the stream is free until those that wait for this task see it done.
    """

    stream: object
    seconds: float = 0.0
    size: float = 0.0
    links: tuple[object, ...] = ()
    delay: float = 0.0
    waiting: int = 0
    followers: list[Task] = field(default_factory=list)
    done: float | None = None
    left: float = 0.0
    rate: float = 0.0
    since: float = 0.0
    version: int = 0


class Simulation:
    """Tasks, their order and the links that they share.

    Args:
        capacity: bytes a second of each link; transfers on it share it evenly.
    """

    def __init__(self, capacity: Callable[[object], float]) -> None:
        self._capacity = capacity
        self._queues: dict[object, list[Task]] = defaultdict(list)
        self._flows: dict[object, set[Task]] = defaultdict(set)
        self._events: list[tuple[float, int, str, Task, int]] = []
        self._count = 0

    def add(self, task: Task, after: Iterable[Task] = ()) -> Task:
        """Add ``task`` at the end of its stream; it starts when its stream is free and all ``after`` are done."""
        self._queues[task.stream].append(task)
        for other in after:
            task.waiting += 1
            other.followers.append(task)
        return task

    def run(self) -> float:
        """Seconds until everything is done.

        Raises:
            RuntimeError: tasks wait for each other in a circle.
        """
        heads = {stream: 0 for stream in self._queues}
        total = sum(len(queue) for queue in self._queues.values())
        finished, now = 0, 0.0

        def start(stream: object) -> None:
            queue, head = self._queues[stream], heads[stream]
            if head < len(queue) and queue[head].waiting == 0:
                heads[stream] = -head - 1  # busy
                self._push(now + queue[head].seconds, "bytes", queue[head])

        for stream in list(self._queues):
            start(stream)
        while self._events:
            now, _, what, task, version = heapq.heappop(self._events)
            if what == "bytes" and task.size > 0:
                task.left, task.since = task.size, now
                self._change(task, now, arriving=True)
            elif what == "flow" and version != task.version:
                continue
            elif what in ("bytes", "flow"):
                if task.size > 0:
                    self._change(task, now, arriving=False)
                heads[task.stream] = -heads[task.stream]
                start(task.stream)
                self._push(now + task.delay, "done", task)
            else:
                task.done = now
                finished += 1
                for follower in task.followers:
                    follower.waiting -= 1
                    head = heads[follower.stream]
                    if follower.waiting == 0 and head >= 0 and self._queues[follower.stream][head] is follower:
                        start(follower.stream)
        if finished < total:
            raise RuntimeError(f"{total - finished} of {total} tasks wait for each other")
        return now

    def _push(self, when: float, what: str, task: Task) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what, task, task.version))

    def _change(self, task: Task, now: float, arriving: bool) -> None:
        """A transfer starts or ends; those that share a link with it go on at other rates."""
        touched = {task} if arriving else set()
        for link in task.links:
            flows = self._flows[link]
            (flows.add if arriving else flows.discard)(task)
            touched |= flows
        for flow in touched:
            flow.left -= flow.rate * (now - flow.since) if flow is not task else 0.0
            flow.since = now
            flow.rate = min(self._capacity(link) / len(self._flows[link]) for link in flow.links)
            flow.version += 1
            self._push(now + max(flow.left, 0.0) / flow.rate, "flow", flow)


@dataclass(frozen=True)
class Cluster:
    """Ranks on nodes.

    Attributes:
        profile: the machines.
        ranks: ranks of the group.
        slowness: factor on the computation of every rank; None: all are alike, and one node stands for all.
        level: of a grid, where a simulation has both: names the streams and links of this one.
    """

    profile: Profile
    ranks: int
    slowness: tuple[float, ...] | None = None
    level: str = ""

    @property
    def node(self) -> int:
        return nodes_of(self.profile, self.ranks)[0]

    @property
    def nodes(self) -> int:
        return nodes_of(self.profile, self.ranks)[1]

    @property
    def simulated(self) -> int:
        """Ranks that are simulated; the others are images of these."""
        return self.ranks if self.slowness is not None else self.node

    def compute(self, rank: int, seconds: float) -> Task:
        """Computation on ``rank``."""
        factor = self.slowness[rank] if self.slowness is not None else 1.0
        return Task(("compute", self.level, rank), seconds * factor)

    def capacity(self, link: object) -> float:
        kind = link[0]  # type: ignore[index]
        if kind == "in":
            return self.profile.intra.bandwidth
        if kind == "adapter":
            return self.profile.inter.bandwidth
        return node_bandwidth(self.profile.inter, self.node)

    def run(self, build: Callable[[Simulation], None]) -> float:
        """Seconds of what ``build`` adds to a simulation."""
        simulation = Simulation(self.capacity)
        build(simulation)
        return simulation.run()

    def first_message(self) -> float:
        """Seconds before the first byte of a collective or message."""
        link = self.profile.intra if self.nodes == 1 else self.profile.inter
        return link.latency

    def crosses(self, rank: int) -> bool:
        """Whether what comes to ``rank`` from the rank before comes from another node."""
        return self.nodes > 1 and rank % self.node == 0

    def message(self, rank: int, size: float) -> Task:
        """``size`` bytes from the rank before ``rank`` to it, by themselves."""
        if self.crosses(rank):
            links = (("adapter", self.level, rank), ("node", self.level, rank // self.node))
            return Task(("comm", self.level, rank), self.profile.inter.latency, size, links)
        return Task(("comm", self.level, rank), self.profile.intra.latency, size, (("in", self.level, rank),))

    def all_gather(self, simulation: Simulation, own: float, after: Sequence[Task]) -> list[Task]:
        """A ring: every rank passes on what it has received. Returns the last task of every rank."""
        ranks, count = range(self.simulated), self.simulated
        starts = [simulation.add(Task(("comm", self.level, r), self.first_message()), [after[r]]) for r in ranks]
        # Where nodes have an adapter a GPU there is a ring for each, and all of them leave the node side by side.
        before, last = starts, starts
        for step in range(self.ranks - 1):
            here = []
            for r in ranks:
                crossing = self.crosses(r)
                link = self.profile.inter if crossing else self.profile.intra
                links: tuple[object, ...] = (
                    ("node", self.level, r // self.node) if crossing else ("in", self.level, r),
                )
                arrival = Task(("ring", self.level, r), 0.0, own, links, link.message if step else 0.0)
                here.append(simulation.add(arrival, [before[(r - 1) % count], starts[r]]))
            before = last = here
        # The stream of communication is free for the next collective when this one has ended.
        return [simulation.add(Task(("comm", self.level, r)), [last[r]]) for r in ranks]

    def all_to_all(self, simulation: Simulation, own: float, after: Sequence[Task]) -> list[Task]:
        """``1/ranks`` of ``own`` bytes to every rank; those for the GPUs of another node travel as one."""
        part = own / self.ranks
        ends = []
        for r in range(self.simulated):
            begin = simulation.add(Task(("comm", self.level, r), self.first_message()), [after[r]])
            tasks = [begin]
            for _ in range(self.node - 1):
                near = Task(("near", self.level, r), self.profile.intra.message, part, (("in", self.level, r),))
                tasks.append(simulation.add(near, [begin]))
            far_links = (("adapter", self.level, r), ("node", self.level, r // self.node))
            for _ in range(self.nodes - 1):
                far = Task(("far", self.level, r), self.node * self.profile.inter.message, self.node * part, far_links)
                tasks.append(simulation.add(far, [begin]))
            ends.append(simulation.add(Task(("comm", self.level, r)), tasks))
        return ends


def pipeline(cluster: Cluster, groups: int, kernel: float, sent: float, returned: float) -> float:
    """Seconds of a pass of ``gather``, of queries or of keys and values.

    Args:
        groups: groups of heads.
        kernel: seconds of one group's kernel on every rank.
        sent: bytes that a rank sends to each other rank, over all groups; 0 where what it sent before was kept.
        returned: bytes of results that a rank computes, over all groups and for all ranks; 0 where they stay.
    """

    def build(simulation: Simulation) -> None:
        ranks = range(cluster.simulated)
        begin = [simulation.add(Task(("begin", r))) for r in ranks]

        def gather() -> list[Task]:
            return cluster.all_gather(simulation, sent / groups, begin) if sent else begin

        arriving = gather()
        for i in range(groups):
            here = arriving
            if i + 1 < groups:
                arriving = gather()
            computed = [simulation.add(cluster.compute(r, kernel), [here[r]]) for r in ranks]
            if returned:
                cluster.all_to_all(simulation, returned / groups, computed)

    return cluster.run(build)


def two_level(
    profile: Profile, ranks: int, size: int, groups: int, kernel: float, sent: float, returned: float
) -> float:
    """Seconds of a pass of schedule ``two_level`` on ``ranks / size`` nodes, all of which do the same.

    Rows cross and wait for the kernel before; then they are spread inside, computed, and what the ranks of a node have
    for the same rows is merged, before one result crosses back beside the next kernel.

    Args:
        groups, kernel, sent, returned: see ``pipeline``.
    """
    inner = Cluster(inner_level(profile, size), size, level="inner")
    outer = Cluster(outer_level(profile, size), ranks // size, level="outer")  # one rank stands for those of its node

    def build(simulation: Simulation) -> None:
        begin = [simulation.add(Task(("begin", "outer", 0)))]
        arriving = outer.all_gather(simulation, sent / groups, begin)
        for i in range(groups):
            here = arriving
            if i + 1 < groups:
                arriving = outer.all_gather(simulation, sent / groups, begin)
            arrived = [simulation.add(inner.compute(r, 0.0), here) for r in range(size)]
            spread = inner.all_gather(simulation, outer.ranks * sent / groups, arrived)
            computed = [simulation.add(inner.compute(r, kernel), [spread[r]]) for r in range(size)]
            merged = inner.all_to_all(simulation, returned / groups, computed)
            waited = [simulation.add(inner.compute(r, 0.0), [merged[r]]) for r in range(size)]
            outer.all_to_all(simulation, returned / size / groups, waited)

    simulation = Simulation(lambda link: (inner if link[1] == "inner" else outer).capacity(link))  # type: ignore[index]
    build(simulation)
    return simulation.run()


def ring(cluster: Cluster, kernel: float, sent: float, returned: float = 0.0) -> float:
    """Seconds of a pass of a ring: ``sent`` bytes go to the next rank at each step, beside the kernel on the last ones.

    Args:
        kernel: seconds of a step's kernel on every rank.
        sent: bytes of a step.
        returned: bytes of results that go straight to their owner after a step, for query exchange.
    """

    def build(simulation: Simulation) -> None:
        ranks, count = range(cluster.simulated), cluster.simulated
        held = [simulation.add(Task(("begin", r))) for r in ranks]
        for step in range(cluster.ranks):
            arriving = held
            if step < cluster.ranks - 1:
                arriving = [simulation.add(cluster.message(r, sent), [held[(r - 1) % count], held[r]]) for r in ranks]
            computed = [simulation.add(cluster.compute(r, kernel), [held[r]]) for r in ranks]
            if returned and step:
                for r in ranks:
                    simulation.add(cluster.message(r, returned), [computed[r]])
            held = [simulation.add(Task(("both", r)), [arriving[r], computed[r]]) for r in ranks]

    return cluster.run(build)


def head_all_to_all(cluster: Cluster, kernel: float, before: Sequence[float], behind: Sequence[float]) -> float:
    """Seconds of a pass of Ulysses: exchanges of ``before`` bytes, the kernel, exchanges of ``behind`` bytes."""

    def build(simulation: Simulation) -> None:
        ranks = range(cluster.simulated)
        last = [simulation.add(Task(("begin", r))) for r in ranks]
        for size in before:
            last = cluster.all_to_all(simulation, size, last)
        last = [simulation.add(cluster.compute(r, kernel), [last[r]]) for r in ranks]
        for size in behind:
            last = cluster.all_to_all(simulation, size, last)

    return cluster.run(build)
