"""Runs hurt at random for a given time: faults of ranks, damaged files, mistaken configs. A table at the end.

    python -m benchmarks.campaign --seconds 600 --configs 1000 --seed 0
    python -m benchmarks.campaign --gpu --output faults.json

The first form runs on CPU, with gloo. A run is hurt and then resumed, and must give what an unbroken one gives: the
same losses, bit for bit, and the same model. ``--gpu`` goes through a fixed list of faults on 2 GPUs with NCCL, by the
DeepSpeed launcher, several at a time. The exit code is 1 when a trial shows a fault.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.faults.configs import mistake, verdict
from benchmarks.faults.damage import DAMAGES
from benchmarks.faults.gpu import gpu_trials
from benchmarks.faults.ranks import (
    LIMIT,
    PATIENCE,
    ROOT,
    TIMEOUT,
    Ended,
    Fault,
    Left,
    ds_config,
    left_in,
    run,
    write_config,
)

PHASES = ("loading the model", "planning", "step 1", "step 2", "step 3", "step 4", "saving the checkpoint of step 2",
          "saving the checkpoint of step 4", "evaluating", "exporting")  # fmt: skip
# Of the faults, stopped ranks take longest: the timeout of the run.
KINDS = ("kill", "kill", "kill", "raise", "ENOSPC", "EDQUOT", "EROFS", "EIO", "stop")
STAGES = (1, 2, 3)


@dataclass(frozen=True)
class Trial:
    """What was done, and what came of it.

    Attributes:
        part: of the campaign: ``fault``, ``damage`` or ``config``.
        kind: what was done.
        problem: what was wrong with the outcome; empty when nothing was.
        seconds: that the survivors took to leave.
    """

    part: str
    kind: str
    problem: str = ""
    seconds: float = 0.0


class Campaign:
    """Trials in folders of their own, against unbroken runs.

    Args:
        folder: for everything.
        seed: of what is drawn.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw, self.number = folder, random.Random(seed), 0
        self.whole: dict[int, Path] = {}

    def unbroken(self, stage: int) -> Path:
        """Folder of an unbroken run of that ZeRO stage."""
        if stage not in self.whole:
            folder = self.folder / f"whole-{stage}"
            ended = self.train(folder, stage)
            if ended.codes != (0, 0):
                raise RuntimeError(ended.text)
            self.whole[stage] = folder
        return self.whole[stage]

    def train(self, folder: Path, stage: int, resume: bool = False, fault: Fault | None = None) -> Ended:
        timeout = TIMEOUT if fault is not None and fault.kind == "stop" else PATIENCE
        config = write_config(self.folder / f"zero{stage}-{timeout}", ds_config(stage, timeout_s=timeout))
        words = ["--ds_config", config, "--output_dir", folder, *(["--resume"] if resume else [])]
        return run(words, folder.with_name(folder.name + "-logs"), fault)

    def new_folder(self) -> Path:
        self.number += 1
        return self.folder / f"trial-{self.number}"

    def fault(self) -> Trial:
        """A rank is hurt, the run resumed."""
        kind, stage = self.draw.choice(KINDS), self.draw.choice(STAGES)
        phase = self.draw.choice([p for p in PHASES if p.startswith("saving")] if kind.startswith("E") else PHASES)
        amount = (
            self.draw.choice([0, 10_000]) if kind.startswith("E") else self.draw.choice([0, self.draw.uniform(0, 0.5)])
        )
        fault = Fault(kind, self.draw.randrange(2), phase, amount)
        folder = self.new_folder()
        expected = left_in(self.unbroken(stage))
        ended = self.train(folder, stage, fault=fault)
        left = left_in(folder)
        problem = judge_end(fault, ended, left, expected)
        if not problem:
            again = self.train(folder, stage, resume=bool(left.checkpoints))
            problem = judge_whole(again, left_in(folder), expected)
        clear(folder, problem)
        return Trial("fault", f"{kind} in {phase.rstrip(' 1234')}", problem, ended.seconds)

    def damage(self) -> Trial:
        """The files of a run are damaged, the run resumed."""
        stage, name = self.draw.choice(STAGES), self.draw.choice(sorted(DAMAGES))
        whole, folder = self.unbroken(stage), self.new_folder()
        shutil.copytree(whole, folder)
        passed = DAMAGES[name](self.draw, folder)
        ended = self.train(folder, stage, resume=True)
        problem = judge_whole(ended, left_in(folder), left_in(whole))
        if not problem and passed != ("passing over the checkpoint step-4" in ended.text):
            problem = f"the newest checkpoint was {'not ' if passed else ''}passed over"
        clear(folder, problem)
        return Trial("damage", name, problem, ended.seconds)

    def configs(self, count: int) -> Iterator[Trial]:
        """Mistakes in the configs that come along."""
        bases = [json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))]
        for _ in range(count):
            mistaken = mistake(self.draw, self.draw.choice(bases))
            found = verdict(mistaken, self.folder)
            yield Trial("config", mistaken.kind, "" if found in ("refused", "accepted") else found)


def judge_end(fault: Fault, ended: Ended, left: Left, expected: Left) -> str:
    """What is wrong with the end of a run that was hurt."""
    survivors = [code for rank, code in enumerate(ended.codes) if not (fault.kind == "stop" and rank == fault.rank)]
    if None in survivors:
        return f"ranks are left after {ended.seconds:.0f} s: {ended.codes}"
    if fault.kind == "stop" and ended.codes != (0, 0):
        named = f"rank {fault.rank} gives no sign of life" in ended.text or f"rank {fault.rank} is in" in ended.text
        if not named and 1 in ended.codes:
            return f"the stopped rank {fault.rank} is not named: {ended.text[-300:]}"
    if fault.kind.startswith("E") and f"({fault.kind})" not in ended.text:
        return f"{fault.kind} is not named: {ended.text[-300:]}"
    if fault.kind.startswith("E") and "Traceback" in ended.text:
        return f"{fault.kind} gives a traceback"
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
    return "" if left.checkpoints == expected.checkpoints else f"checkpoints {left.checkpoints}"


def clear(folder: Path, problem: str) -> None:
    """Make room, unless there is something to look at."""
    if not problem:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.with_name(folder.name + "-logs"), ignore_errors=True)


def table(trials: list[Trial]) -> str:
    """Markdown: kinds of each part with their trials, problems and the longest end."""
    lines = ["| part | what | trials | problems | longest, s |", "| --- | --- | ---: | ---: | ---: |"]
    for part in dict.fromkeys(trial.part for trial in trials):
        some = [trial for trial in trials if trial.part == part]
        for kind, count in sorted(Counter(trial.kind for trial in some).items()):
            of_kind = [trial for trial in some if trial.kind == kind]
            problems = sum(bool(trial.problem) for trial in of_kind)
            seconds = max(trial.seconds for trial in of_kind)
            lines.append(f"| {part} | {kind} | {count} | {problems} | {f'{seconds:.0f}' if seconds else ''} |")
    problems = sum(bool(trial.problem) for trial in trials)
    return "\n".join([*lines, f"| all | | {len(trials)} | {problems} | |"])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="for faults and damage (default: %(default)s)")
    parser.add_argument("--configs", type=int, default=1000, help="mistaken configs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true", help="the fixed list on 2 GPUs instead")
    parser.add_argument("--output", type=Path, help="JSON file for all trials")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    trials: list[Trial] = []
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    if args.gpu:
        trials = [Trial("gpu", kind, problem, seconds) for kind, problem, seconds in gpu_trials(folder)]
    else:
        campaign = Campaign(folder, args.seed)
        trials += campaign.configs(args.configs)
        end = time.monotonic() + args.seconds
        while time.monotonic() < end:
            trials.append(campaign.draw.choice((campaign.fault, campaign.damage))())
            print(f"{len(trials)}: {trials[-1].kind} {trials[-1].seconds:.0f} s {trials[-1].problem}", flush=True)
    print(f"a timeout of {TIMEOUT} s where a rank is stopped; survivors have to be out {LIMIT - TIMEOUT:.0f} s later\n")
    print(table(trials))
    for trial in trials:
        if trial.problem:
            print(f"\n{trial.part}, {trial.kind}: {trial.problem}")
    if args.output:
        args.output.write_text(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")
    found = any(trial.problem for trial in trials)
    if not found:
        shutil.rmtree(folder, ignore_errors=True)
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
