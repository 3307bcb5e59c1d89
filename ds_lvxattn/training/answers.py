"""Evaluation by generated answers: what the model says to a question, compared with the answer of the row."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ds_lvxattn.batches.generation import generate
from ds_lvxattn.batches.prepare import Batches
from ds_lvxattn.data.rows import LETTERS
from ds_lvxattn.data.sample import IGNORE, Sample, SampleError, SampleSource
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import unwrapped
from ds_lvxattn.groups import SequenceParallelGroups

# "B", "(B)", "B.", "B) the red one", "Answer: B", "The best option is (B)."
LEAD = r"(?:(?:the\s+)?(?:best\s+|correct\s+)?(?:answer|option)(?:\s+is)?\W*)?"
CHOICE = re.compile(rf"^\W*{LEAD}\(?([{LETTERS}])(?![a-z0-9'])", re.IGNORECASE)


def judge(said: str, wanted: str) -> dict[str, bool | None]:
    """Whether an answer is right: ``exact`` and ``contained`` without regard to case, spaces and final punctuation.

    ``choice``: whether it picks the letter of a multiple-choice question, as in Video-MME; None where the answer of
    the row is no letter.
    """
    plain_said, plain_wanted = _plain(said), _plain(wanted)
    letter = CHOICE.match(wanted) if re.fullmatch(rf"\W*[{LETTERS}]\W*(?:[.):].*)?", wanted.strip(), re.S) else None
    picked = CHOICE.match(said.strip())
    return {
        "exact": plain_said == plain_wanted,
        "contained": re.search(rf"(?<!\w){re.escape(plain_wanted)}(?!\w)", plain_said) is not None,
        "choice": None if letter is None else picked is not None and picked[1].upper() == letter[1].upper(),
    }


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".!?").strip()


def question_and_answer(sample: Sample) -> tuple[Sample, list[int]] | None:
    """The prompt up to the last answer of a sample, and that answer's tokens; None without an answer at the end."""
    labels = sample.labels
    ends = [n for n in range(len(labels)) if labels[n] != IGNORE]
    if not ends:
        return None
    first = last = ends[-1]
    while first > 0 and labels[first - 1] != IGNORE:
        first -= 1
    if first == 0:
        return None
    return replace(sample, input_ids=sample.input_ids[:first], labels=[IGNORE] * first), list(labels[first : last + 1])


def evaluate_answers(
    model: Any,
    batches: Batches,
    source: SampleSource,
    tokenizer: Any,
    groups: SequenceParallelGroups,
    new_tokens: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Let the model answer the last question of every row; all ranks call it.

    Returns:
        ``exact``, ``contained`` and ``choice``: shares in [0, 1] of the answers that are right, the last only where
        rows have letters for answers; ``generated``, how many were judged.

    Raises:
        ConfigError: a model whose family cannot generate.
    """
    family = batches.collator.family
    if not family.generates(unwrapped(model)):
        raise ConfigError(
            f"'finetuning.eval_new_tokens' is {new_tokens}, and {family.name} cannot generate; set it to 0"
        )
    size, data_ranks, data_rank = len(source), groups.get_data_parallel_world_size(), groups.get_data_parallel_rank()
    counts = torch.zeros(5, dtype=torch.float64, device=batches.collator.device)
    nothing = Sample([batches.collator.pad_token], [IGNORE])
    how: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }

    def answer(prompt: Sample) -> torch.Tensor:
        return generate(model, batches, [prompt], **how)

    # Every group answers as often, since ZeRO-3 gathers parameters for each token; a row is asked twice then.
    for number in range(-(-size // data_ranks)):
        progress()
        at = number * data_ranks + data_rank
        try:
            found = question_and_answer(source.sample(at % size))
        except SampleError:  # the same on every rank of the group
            found = None
        judged = found is not None and at < size
        if found is None:
            found = nothing, []
        prompt, wanted = found
        try:
            tokens = answer(prompt)
        except SampleError:  # frames that cannot be decoded, on every rank of the group; other groups go on
            answer(nothing)
            continue
        if judged and groups.get_sequence_parallel_rank() == 0:
            said, right = (tokenizer.decode(t, skip_special_tokens=True).strip() for t in (tokens[0], wanted))
            results = judge(said, right)
            choice = results["choice"]
            values = (1, results["exact"], results["contained"], choice is not None, bool(choice))
            counts += torch.tensor([float(bool(v)) for v in values], dtype=torch.float64, device=counts.device)
    dist.all_reduce(counts)
    generated, exact, contained, choices, chosen = counts.tolist()
    result: dict[str, Any] = {"generated": int(generated)}
    if generated:
        result |= {"exact": exact / generated, "contained": contained / generated}
    if choices:
        result |= {"choice": chosen / choices}
    return result
