"""What each strategy would take and send on nodes of several GPUs: a table for machines that are not at hand.

    python benchmarks/nodes_on_paper.py --model Llama-3.2-11B-Vision --cluster h100 --gpus 64,512 --text 2048,32768

One layer that attends to visual tokens, by the formulas of the planner: predicted milliseconds, forward and backward
with the projection of K and V; MiB that a GPU receives, and of these from other nodes. A strategy is shown by its best
schedule; those of query exchange that know the node stand apart. The fastest is bold. No GPU is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from ds_lvxattn.plan.choice import Candidate, choose
from ds_lvxattn.plan.cluster.model_sizes import model_sizes
from ds_lvxattn.plan.cluster.step import ClusterJob, layer_candidates
from ds_lvxattn.plan.profile import Profile, load_profile

FRAMES = (1_250, 6_250)  # of 1,601 visual tokens each: 2 million and 10 million


def columns(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates by what they are a way of."""
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        mode = candidate.mode
        apart = mode.two_levels and mode.strategy == "lv_xattn"
        found.setdefault(f"`{mode.strategy}`" + (", node known" if apart else ""), []).append(candidate)
    return found


def cell(candidate: Candidate | None, fastest: bool) -> str:
    if candidate is None or candidate.received is None or candidate.between is None:
        return "cannot run"
    ms = f"{candidate.seconds * 1e3:.3g}" if candidate.seconds < 1 else f"{candidate.seconds * 1e3:,.0f}"
    ms = f"**{ms}**" if fastest else ms
    sizes = "; ".join(f"{size / 2**20:,.0f}" for size in (candidate.received, candidate.between))
    return f"`{candidate.mode.schedule}`: {ms}; {sizes}"


def rows(
    model: str, profile: Profile, gpus: Sequence[int], text: Sequence[int], frames: Sequence[int]
) -> Iterator[list[str]]:
    """The head of the table, then a row for each case."""
    sizes = model_sizes(model)
    names: list[str] = []
    for n in gpus:
        for frame_count in frames:
            for length in text:
                job = ClusterJob(sizes, length, frame_count, n, gpus_per_node=profile.gpus_per_node)
                candidates = layer_candidates(job.compared(), profile)
                best = {name: choose(some) for name, some in columns(candidates).items()}
                if not names:
                    names = list(best)
                    yield ["GPUs", "visual tokens", "text", *names]
                least = min(each.seconds for each in best.values() if each is not None)
                cells = [cell(best[name], best[name] is not None and best[name].seconds == least) for name in names]  # type: ignore[union-attr]
                yield [str(n), f"{job.visual / 1e6:.0f} M", f"{length:,}", *cells]


def table(found: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    head, *body = (f"| {' | '.join(row)} |" for row in found)
    return "\n".join((head, "|" + " --- |" * len(found[0]), *body))


def integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-3.2-11B-Vision", help="name or config.json (default: %(default)s)")
    parser.add_argument("--cluster", default="h100", help="profile by name or file (default: %(default)s)")
    parser.add_argument("--gpus", type=integers, default=[64, 512], help="by comma (default: 64,512)")
    parser.add_argument("--text", type=integers, default=[2_048, 32_768], help="by comma (default: 2048,32768)")
    parser.add_argument("--frames", type=integers, default=list(FRAMES), help="by comma (default: 1250,6250)")
    args = parser.parse_args(arguments)
    profile = load_profile(args.cluster)
    print(table(list(rows(args.model, profile, args.gpus, args.text, args.frames))))


if __name__ == "__main__":
    main()
