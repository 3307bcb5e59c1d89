"""Runs hurt at random: faults of ranks, damaged files, full disks, mistaken configs. A table at the end.

    python -m benchmarks.campaign --trials 1000 --configs 1000 --seed 0 --output campaign.jsonl
    python -m benchmarks.campaign --gpu --output faults.jsonl

The first form runs on CPU, with gloo. A run is hurt several times in a row, resumed after each, and must give in the
end what an unbroken one gives: the same losses, bit for bit, and the same model. Every fault and every damage is a
trial. Each is written to the output at once; started again with the same seed and output, the campaign goes on where
it was stopped. ``--gpu`` goes through a fixed list of faults on 2 GPUs with NCCL, by the DeepSpeed launcher, several
at a time. The exit code is 1 when a trial shows a fault.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.faults.configs import bases, mistake, verdict
from benchmarks.faults.damage import DAMAGES, hurt
from benchmarks.faults.disk import SmallDisk, can_mount
from benchmarks.faults.gpu import gpu_trials
from benchmarks.faults.ranks import (
    HURT,
    LIMIT,
    PATIENCE,
    TIMEOUT,
    Ended,
    Fault,
    Left,
    ds_config,
    left_in,
    nursery,
    run,
    write_config,
)

PHASES = (
    "reading the data", "starting DeepSpeed", "loading the checkpoint", "planning", "step 1", "step 2", "step 3",
    "step 4", "saving the checkpoint of step 2", "saving the checkpoint of step 4", "evaluating", "exporting",
)  # fmt: skip
# Of the faults, stopped ranks take longest: the timeout of the run.
KINDS = {
    "kill": 24, "kill all": 8, "terminate": 6, "raise": 12, "stop": 4, "ENOSPC": 6, "EDQUOT": 4, "EROFS": 4, "EIO": 4,
    "EFBIG": 6,
}  # fmt: skip
STAGES = (1, 2, 3)
STOP_TIMEOUT = 2 * TIMEOUT  # longer than what a busy machine makes a rank that is well wait
LANES = 4  # runs side by side, one of which may be waiting for a timeout


@dataclass(frozen=True)
class Trial:
    """What was done, and what came of it.

    Attributes:
        part: of the campaign: ``fault``, ``damage``, ``disk`` or ``config``.
        kind: what was done.
        problem: what was wrong with the outcome; empty when nothing was.
        seconds: that the survivors took to leave.
        chain: number of the run that was hurt; with the seed, it repeats the trial.
    """

    part: str
    kind: str
    problem: str = ""
    seconds: float = 0.0
    chain: int = -1


class Campaign:
    """Runs in folders of their own, against unbroken ones.

    Args:
        folder: for everything.
        seed: of what is drawn.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.mounts = folder, seed, can_mount(folder)
        self.whole: dict[int, Path] = {}

    def prepare(self) -> None:
        """The unbroken runs."""
        for stage in STAGES:
            self.whole[stage] = self.folder / f"whole-{stage}"
            ended = self.train(self.whole[stage], stage)
            if ended.codes != (0, 0):
                raise RuntimeError(ended.text)

    def train(
        self, folder: Path, stage: int, resume: bool = False, fault: Fault | None = None, logs: str = "-logs"
    ) -> Ended:
        timeout = STOP_TIMEOUT if fault is not None and fault.kind == "stop" else PATIENCE
        config = self.folder / f"zero{stage}-{timeout}" / "ds_config.json"
        if not config.exists():
            write_config(config.parent, ds_config(stage, timeout_s=timeout))
        words = ["--ds_config", config, "--output_dir", folder, *(["--resume"] if resume else [])]
        return run(words, folder.with_name(folder.name + logs), fault)

    def chain(self, number: int) -> list[Trial]:
        """One run, hurt several times."""
        draw = random.Random(f"{self.seed}-{number}")
        stage, folder = draw.choice(STAGES), self.folder / f"chain-{number}"
        chain = Chain(self, number, stage, folder, left_in(self.whole[stage]))
        if self.mounts and draw.random() < 0.1:
            self._fill_disk(draw, chain)
        else:
            if draw.random() < 0.6:
                shutil.copytree(self.whole[stage], folder)
            hurts = draw.randrange(3, 7)
            while len(chain.trials) < hurts and not chain.over:
                chain.hurt_and_run(draw)
            if not (chain.over or chain.done):
                chain.run(None)
        if not chain.problem:  # otherwise there is something to look at
            shutil.rmtree(folder, ignore_errors=True)
            for logs in folder.parent.glob(f"{folder.name}-logs*"):
                shutil.rmtree(logs, ignore_errors=True)
        return chain.trials

    def _fill_disk(self, draw: random.Random, chain: Chain) -> None:
        """A run on a disk that is full at some point, and resumed when there is room."""
        kibibytes = draw.choice([draw.randrange(16, 3_000), draw.randrange(3_000, 26_000)])
        with SmallDisk(chain.folder, kibibytes) as disk:
            chain.note("disk", "full")
            chain.run(None, full=True)
            if not (chain.over or chain.done):
                disk.grow()
                chain.run(None)
            if chain.problem:
                shutil.copytree(chain.folder, chain.folder.with_name(chain.folder.name + "-kept"))

    def configs(self, count: int) -> Iterator[Trial]:
        """Mistakes in the configs that come along."""
        draw = random.Random(self.seed)
        right = bases()
        for _ in range(count):
            mistaken = mistake(draw, draw.choice(right))
            found = verdict(mistaken, self.folder)
            yield Trial("config", mistaken.kind, "" if found in ("refused", "accepted") else found)


@dataclass
class Chain:
    """A run and what has happened to it.

    Attributes:
        expected: what an unbroken run leaves.
        trials: so far.
        pending: what was done to the run that comes next.
        torn: whether metrics may have been damaged on purpose.
        told: whether a run has said so.
        done: the last run came to its end.
        over: nothing more can be done: there is a problem, or no whole checkpoint.
    """

    campaign: Campaign
    number: int
    stage: int
    folder: Path
    expected: Left
    trials: list[Trial] = field(default_factory=list)
    pending: list[tuple[str, str]] = field(default_factory=list)
    torn: bool = False
    told: bool = False
    done: bool = False
    over: bool = False

    @property
    def problem(self) -> str:
        return next((trial.problem for trial in self.trials if trial.problem), "")

    def note(self, part: str, kind: str) -> None:
        """Something is done to the run."""
        self.pending.append((part, kind))

    def hurt_and_run(self, draw: random.Random) -> None:
        """Damage the files, or hurt the ranks, or both."""
        if draw.random() < 0.04 and (not has_checkpoints(self.folder) or left_in(self.folder, torn=True).checkpoints):
            self.two_runs()
            return
        what = draw.random()
        if what < 0.65 and self.folder.exists():
            name = draw.choice(sorted(DAMAGES))
            if hurt(name, draw, self.folder):
                self.torn |= name.startswith(("metrics", "any"))
                self.note("damage", name)
        self.run(draw_fault(draw) if what > 0.35 else None)

    def run(self, fault: Fault | None, full: bool = False) -> None:
        """Start the run, or resume it, and judge what comes of it.

        Args:
            full: whether its disk may be full.
        """
        before, resume = left_in(self.folder, torn=True), has_checkpoints(self.folder)
        ended = self.campaign.train(self.folder, self.stage, resume, fault)
        after = left_in(self.folder, torn=True)
        if fault is not None and HURT in ended.text:
            self.note("fault", f"{fault_name(fault)} in {fault.phase.rstrip(' 1234')}")
        self.told |= "is not what it was at step" in ended.text or "breaks off" in ended.text
        self.done = ended.codes == (0, 0)
        refused = resume and not before.checkpoints and set(ended.codes) == {2}
        problem = self._judge(fault, full, refused, ended, before, after)
        self.over = bool(problem) or refused
        names = [kind for _, kind in self.pending]
        for at, (part, kind) in enumerate(self.pending or [("fault", "none")] * bool(problem), 1):
            text = f"{names}: {problem}" if problem and at >= len(self.pending) else ""
            self.trials.append(Trial(part, kind, text, ended.seconds, self.number))
        self.pending = []

    def two_runs(self) -> None:
        """Two runs are started in the folder at once."""
        resume = has_checkpoints(self.folder)
        with ThreadPoolExecutor(2) as pool:
            train = functools.partial(self.campaign.train, self.folder, self.stage, resume)
            runs = [job.result() for job in [pool.submit(train, logs=f"-logs-{name}") for name in ("one", "other")]]
        self.told |= any("is not what it was at step" in ended.text or "breaks off" in ended.text for ended in runs)
        first, second = sorted(runs, key=lambda ended: ended.codes != (0, 0))
        after = left_in(self.folder, torn=True)
        problem = judge_whole(first, after, self._expected(after))
        if not problem and second.codes != (0, 0):
            told = "in use by another run" in second.text or "holds checkpoints of an earlier run" in second.text
            if second.codes != (2, 2) or not told or "Traceback" in second.text:
                problem = f"the other run: {second.codes} {second.text[-800:]}"
        self.done, self.over = not problem, bool(problem)
        self.trials.append(Trial("fault", "two runs", problem, first.seconds, self.number))

    def _expected(self, after: Left) -> Left:
        """What an unbroken run leaves, but for metrics that were damaged, of which a run has told."""
        return replace(self.expected, losses=after.losses) if self.torn and self.told else self.expected

    def _judge(self, fault: Fault | None, full: bool, refused: bool, ended: Ended, before: Left, after: Left) -> str:
        """What is wrong with a run."""
        hurt_here = HURT in ended.text
        if None in ended.codes and not (fault is not None and hurt_here and fault.kind == "stop"):
            return f"ranks are left after {ended.seconds:.0f} s: {ended.codes}"
        if "Traceback" in ended.text and (fault is None or not hurt_here or fault.kind.startswith("E")):
            return f"a traceback: {ended.text[-1500:]}"
        expected = self._expected(after)
        if self.done:
            problem = judge_whole(ended, after, expected)
            newest = next(iter(before.checkpoints), None)
            if not problem and newest is not None and f"/{newest}\n" not in ended.text.partition("resuming from")[2]:
                problem = f"not resumed from {newest}, the newest whole checkpoint: {ended.text[-500:]}"
        elif refused:
            problem = "" if before == after else f"a refused run changed its folder: {before} {after}"
            if "holds no checkpoint that is whole" not in ended.text:
                problem = f"refused without a reason: {ended.text[-500:]}"
        elif fault is not None and hurt_here:
            problem = judge_end(fault, ended, after, expected if self.told or not self.torn else None)
        elif full:
            problem = "" if "cannot be written" in ended.text else f"a full disk is not named: {ended.text[-800:]}"
        else:
            problem = f"exit codes {ended.codes}: {ended.text[-800:]}"
        return problem or self._lost(before, after)

    def _lost(self, before: Left, after: Left) -> str:
        """What was there before a run and is not after it."""
        gone = set(before.checkpoints) - set(after.checkpoints)
        if gone:
            return f"checkpoints {sorted(gone)} are lost"
        reached = max((int(name.split("-")[1]) for name in after.checkpoints), default=0)
        missing = [step for step in before.losses if step <= reached and step not in after.losses]
        if missing and not (self.torn and self.told):
            return f"metrics of steps {missing} are lost"
        old = self.folder / "model.old" / "model.safetensors"
        if before.model == self.expected.model != after.model and not old.exists():
            return "the model is lost"
        return ""


def fault_name(fault: Fault) -> str:
    return fault.kind if fault.rank is not None or fault.kind.startswith("E") else f"{fault.kind} all"


def has_checkpoints(folder: Path) -> bool:
    """Whether a run in this folder has to be resumed, as its user sees it."""
    paths = (folder / "checkpoints").glob("step-*")
    return any(path.is_dir() and path.name[5:].isdecimal() for path in paths)


def draw_fault(draw: random.Random) -> Fault:
    """A fault of one rank, or of all."""
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    phase = draw.choice(PHASES)
    if kind.startswith("E"):
        writes = [name for name in PHASES if name.startswith(("saving", "planning", "step", "evaluating", "exporting"))]
        amounts = [0, 10_000, draw.randrange(4_000_000)]
        return Fault(kind, draw.choice([0, 1, None]), draw.choice(writes), draw.choice(amounts))
    delay = draw.choice([0, draw.uniform(0, 0.3)])
    if kind == "kill all":
        return Fault("kill", None, phase, delay)
    return Fault(kind, draw.randrange(2), phase, 0 if kind == "raise" else delay)


def judge_end(fault: Fault, ended: Ended, left: Left, expected: Left | None) -> str:
    """What is wrong with the end of a run that was hurt.

    Args:
        expected: None: metrics were damaged, and are not compared.
    """
    stopped = [fault.kind == "stop" and fault.hurts(rank) for rank in range(len(ended.codes))]
    if any(code is None and not ill for code, ill in zip(ended.codes, stopped, strict=True)):
        return f"ranks are left after {ended.seconds:.0f} s: {ended.codes}"
    if fault.kind == "stop" and ended.codes != (0, 0):
        named = f"rank {fault.rank} gives no sign of life" in ended.text or f"rank {fault.rank} is in" in ended.text
        if not named and 1 in ended.codes:
            return f"the stopped rank {fault.rank} is not named: {ended.text[-300:]}"
    if fault.kind.startswith("E"):
        name = "cannot be written" if fault.kind == "EFBIG" else f"({fault.kind})"
        if name not in ended.text:
            return f"{fault.kind} is not named: {ended.text[-600:]}"
        if "Traceback" in ended.text:
            return f"{fault.kind} gives a traceback"
    if expected is None:
        return ""
    wrong = [step for step, loss in left.losses.items() if loss != expected.losses[step]]
    return f"losses of steps {wrong} differ before the fault" if wrong else ""


def judge_whole(ended: Ended, left: Left, expected: Left) -> str:
    """What is wrong with a run that came to its end after all."""
    if ended.codes != (0, 0):
        return f"exit codes {ended.codes} at resumption: {ended.text[-600:]}"
    if left.losses != expected.losses:
        return f"losses {left.losses} instead of {expected.losses}"
    if left.model != expected.model:
        return "the model differs"
    return "" if left.checkpoints[:1] == expected.checkpoints[:1] else f"checkpoints {left.checkpoints}"


def in_table(trial: Trial) -> str:
    """The kind of a trial, of a fault without its phase."""
    return trial.kind.partition(" in ")[0] if trial.part == "fault" else trial.kind


def table(trials: Sequence[Trial]) -> str:
    """Markdown: kinds of each part with their trials, problems and the longest end."""
    lines = ["| part | what | trials | problems | longest, s |", "| --- | --- | ---: | ---: | ---: |"]
    for part in dict.fromkeys(trial.part for trial in trials):
        some = [trial for trial in trials if trial.part == part]
        for kind, count in sorted(Counter(map(in_table, some)).items()):
            of_kind = [trial for trial in some if in_table(trial) == kind]
            problems = sum(bool(trial.problem) for trial in of_kind)
            seconds = max(trial.seconds for trial in of_kind)
            lines.append(f"| {part} | {kind} | {count} | {problems} | {f'{seconds:.0f}' if seconds else ''} |")
    problems = sum(bool(trial.problem) for trial in trials)
    return "\n".join([*lines, f"| all | | {len(trials)} | {problems} | |"])


class Record:
    """Trials in a file, one a line, so that a campaign which is stopped goes on where it was.

    Args:
        path: None: they are kept in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.trials = [Trial(**json.loads(line)) for line in lines]

    def add(self, trials: Sequence[Trial]) -> None:
        """Those of one chain, all at once."""
        self.trials += trials
        if self.path is not None:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(asdict(trial)) + "\n" for trial in trials))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="faults and damage (default: %(default)s)")
    parser.add_argument("--configs", type=int, default=1000, help="mistaken configs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", type=int, help="this run alone, and keep its folder")
    parser.add_argument("--gpu", action="store_true", help="the fixed list on 2 GPUs instead")
    parser.add_argument("--output", type=Path, help="file for all trials, one a line")
    return parser.parse_args(arguments)


def run_chains(campaign: Campaign, record: Record, trials: int) -> None:
    """Chains that the record does not hold, until it has so many trials of faults and damage."""
    known = {trial.chain for trial in record.trials}
    numbers = (number for number in itertools.count() if number not in known)
    with ThreadPoolExecutor(LANES) as lanes:
        running = {lanes.submit(campaign.chain, next(numbers)) for _ in range(LANES)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for chain in done:
                record.add(chain.result())
                for trial in chain.result():
                    print(f"{trial.chain}: {trial.kind} {trial.seconds:.0f} s {trial.problem}", flush=True)
                if sum(trial.part != "config" for trial in record.trials) < trials:
                    running.add(lanes.submit(campaign.chain, next(numbers)))


def main() -> int:
    args = parse()
    record = Record(args.output)
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    if args.gpu:
        record.add([Trial("gpu", kind, problem, seconds) for kind, problem, seconds in gpu_trials(folder)])
    else:
        campaign = Campaign(folder, args.seed)
        if not any(trial.part == "config" for trial in record.trials):
            record.add(list(campaign.configs(args.configs)))
        if args.trials or args.chain is not None:
            nursery()
            campaign.prepare()
        if args.chain is not None:
            record.add(campaign.chain(args.chain))
        elif args.trials:
            run_chains(campaign, record, args.trials)
    minute = LIMIT - TIMEOUT
    print(f"a timeout of {STOP_TIMEOUT} s where a rank is stopped; survivors have to be out {minute:.0f} s later\n")
    print(table(record.trials))
    for trial in record.trials:
        if trial.problem:
            print(f"\n{trial.part}, {trial.kind}, run {trial.chain} in {folder}: {trial.problem}")
    found = any(trial.problem for trial in record.trials)
    if not found:
        shutil.rmtree(folder, ignore_errors=True)
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
