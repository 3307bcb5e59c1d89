"""What ZeRO adds to a step in each stage: transfers of parameters and gradients, the update of the optimizer. No torch.

Stages 1 and 2 add gradients up over the ranks as they come, a bucket at a time behind the backward pass, and gather the
updated parameters at the end. Stage 3 gathers parameters ahead of each layer, forward and backward, and has none to
gather at the end; what does not train it can keep gathered, and what trains gather once a step. As DeepSpeed 0.19 does
it: in stages 1 and 2 gradients travel by an all-reduce, of which each rank keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ds_lvxattn.plan import network
from ds_lvxattn.plan.dense import GATHER, PARAMETER, host_time
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.memory import FITS, ModelStates, step_bytes
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.timeline import TRANSFERS, Segment, seconds_by_part

STAGES = (1, 2, 3)
# Bytes that torch's AdamW and DeepSpeed read and write for each trained parameter of a rank: gradients flattened (4),
# to float32 (6), their norm (10), clipping (8), decay (8), moments (32), denominator (24), update (16), to bf16 (6).
UPDATE_BYTES = 114
# The same for each parameter that trains: its gradient into the bucket (4), divided (4); to float32 and back.
GRADIENT_BYTES, WIDENING_BYTES = 8, 12
BUCKET = 500_000_000  # elements of gradients that are sent at once, DeepSpeed's default
LEAST_BUCKET = 50_000_000  # of those that stage 3 sends at once: fewer would not fill the links
MATRICES = 7  # of a decoder layer; what trains is gathered matrix by matrix, what is frozen as a whole
PARAMETERS = 9  # of a decoder layer, norms too
LAUNCHES = 100  # kernels of a layer's pass
GAIN = 0.02  # share of a step by which a stage has to be faster to be worth a word


def gradient_bucket(of_layer: float, trainable: float) -> int:
    """Elements of gradients that stage 3 sends at once: of a layer, of which ``of_layer`` train. What is still to be
    sent when the backward pass ends delays the step, and buckets take memory."""
    return int(min(max(of_layer, LEAST_BUCKET), BUCKET, trainable))


@dataclass(frozen=True)
class Transfers:
    """ZeRO's transfers of one stage.

    Attributes:
        profile, states: the machine, and the model with the stage.
    """

    profile: Profile
    states: ModelStates

    def gather(self, parameters: float) -> float:
        """Seconds until ``parameters`` are there, ahead of a layer; 0 where they always are.

        DeepSpeed copies a rank's own part into what is sent, and what arrives into the parameters; where they stay
        (``runtime/gathers.py``), the large ones arrive in their place.
        """
        states = self.states
        if states.stage != 3 or states.ranks == 1:
            return 0.0
        copied = 0.0 if states.gathered else 2 * (1 + 1 / states.ranks) * parameters * states.element
        return self._seconds(parameters) + copied / self.profile.memory_bandwidth

    def gather_host(self, modules: float, tensors: float) -> float:
        """Seconds that the host needs to gather and release ``tensors`` parameters, called for by ``modules``."""
        if self.states.stage != 3:
            return 0.0
        more = max(tensors - modules, 0.0) * host_time(self.profile, PARAMETER).forward
        return modules * host_time(self.profile, GATHER).forward + more

    def reduce(self, parameters: float) -> float:
        """Seconds until the gradients of ``parameters`` are added up over the ranks."""
        ranks, size = self.states.ranks, parameters * self.states.gradient
        if self.states.stage == 3:
            return network.all_gather(self.profile, ranks, size / ranks)  # a reduce-scatter moves as much
        return network.all_reduce(self.profile, ranks, size)

    def reduced(self, backward: Sequence[tuple[Segment, float]]) -> list[Segment]:
        """The segments of a backward pass, each with the number of its parameters that train, with the transfers of
        their gradients where a bucket is full, and at the end."""
        found, waiting, bucket = [], 0.0, BUCKET
        passes = GRADIENT_BYTES + (WIDENING_BYTES if self.states.gradient > self.states.element else 0)
        if self.states.stage == 3:
            bucket = gradient_bucket(max((trained for _, trained in backward), default=0.0), self.states.trainable)
        for number, (segment, trained) in enumerate(backward):
            waiting += trained
            ready = waiting if waiting >= bucket or number + 1 == len(backward) else 0.0
            copied = passes * trained / self.profile.memory_bandwidth if self.states.ranks > 1 else 0.0
            found.append(replace(segment, device=segment.device + copied, reduce=self.reduce(ready)))
            waiting -= ready
        return found

    def update(self, tensors: float) -> list[Segment]:
        """The optimizer's step, and what it sends.

        Args:
            tensors: parameters that DeepSpeed gathers. Ahead of it stage 3 waits for all gradients, and looks which of
                these to release.
        """
        states, ranks = self.states, self.states.ranks
        own = states.trainable / (ranks if states.stage else 1)
        segments = [Segment("optimizer", UPDATE_BYTES * own / self.profile.memory_bandwidth, waits=True)]
        if states.stage == 3:
            released = tensors * host_time(self.profile, PARAMETER).backward
            segments.insert(0, Segment("optimizer", 0.0, released, waits=True))
        if states.stage in (1, 2):
            segments.append(Segment(TRANSFERS, self._seconds(states.trainable)))
        return segments

    def _seconds(self, parameters: float) -> float:
        states = self.states
        return network.all_gather(self.profile, states.ranks, parameters * states.element / states.ranks)


@dataclass(frozen=True)
class StageTime:
    """A ZeRO stage: seconds of a step with it, bytes of the device, and whether they fit.

    ``narrow``: the seconds if gradients travelled in the dtype of the parameters; None where they do, or not computed.
    """

    stage: int
    seconds: float
    memory: float
    fits: bool
    narrow: float | None = None


def fastest(stages: Iterable[StageTime]) -> StageTime | None:
    """The fastest that fits; of those within ``GAIN`` of it the one with the least memory. None: none fits."""
    possible = [stage for stage in stages if stage.fits]
    if not possible:
        return None
    least = min(stage.seconds for stage in possible)
    return min((s for s in possible if s.seconds <= least * (1 + GAIN)), key=lambda s: s.memory)


def advice(stage: int, stages: Iterable[StageTime]) -> str | None:
    """What to say to who runs ``stage``, where another is faster and fits, or fits at all; None: nothing."""
    known = {each.stage: each for each in stages}
    best, own = fastest(known.values()), known.get(stage)
    if best is None or own is None or best.stage == stage:
        return None
    step = f"ZeRO-{best.stage} is predicted to take {best.seconds:.3g} s and {best.memory / 2**30:.1f} GiB a step"
    instead = f"set 'zero_optimization.stage' to {best.stage}"
    if not own.fits:
        return f"ZeRO-{stage} is predicted not to fit ({own.memory / 2**30:.1f} GiB); {step}: {instead}"
    if own.seconds <= best.seconds * (1 + GAIN):
        return None
    return f"{step}, and fits; ZeRO-{stage} takes {own.seconds:.3g} s: {instead}"


def gradient_advice(stage: int, stages: Iterable[StageTime]) -> str | None:
    """What to say to who runs ``stage``, where the links are slow for gradients in float32; None: nothing."""
    own = next((each for each in stages if each.stage == stage), None)
    if own is None or own.narrow is None or own.seconds <= own.narrow * (1 + GAIN):
        return None
    return (
        f"gradients are added up over the ranks in float32, DeepSpeed's default where ranks share a sequence, in steps "
        f"predicted to take {own.seconds:.3g} s; with 'seq_parallel_communication_data_type' set to 'bf16', as the "
        f"parameters are, {own.narrow:.3g} s, and sums that are rounded more often"
    )


@dataclass(frozen=True)
class Work:
    """What a step does besides ZeRO: seconds of the device, and of the host to issue it, forward and backward."""

    device: float
    host: float


def stages_of_run(
    profile: Profile,
    layers: Sequence[LayerSizes],
    policy: str,
    states: ModelStates,
    shared: int,
    features_train: bool,
    work: Work,
    capacity: float,
    keeps: bool = True,
) -> list[StageTime]:
    """The step of a run in every stage; empty where its own stage is none of them, or the CPU holds its parameters.

    Layers are taken to be alike, a third of their work forward. In stage 3 what is frozen is kept where it fits.

    Args:
        layers, policy, shared, features_train: as in ``memory.step_bytes``.
        states: the model, with the run's own stage.
        work: of a step.
        capacity: bytes of the device, of which a sixth stays free.
        keeps: whether stage 3 may keep what is frozen.
    """
    if states.stage not in STAGES or states.offload_parameters:
        return []
    count, found = len(layers), []
    for stage in STAGES:
        of_stage = replace(states, stage=stage, gathered=states.parameters if stage == 3 and keeps else 0)
        needed = step_bytes(layers, policy, of_stage, shared, features_train)
        if of_stage.gathered and needed > FITS * capacity:
            of_stage = replace(of_stage, gathered=0)
            needed = step_bytes(layers, policy, of_stage, shared, features_train)
        seconds = _seconds_of(profile, of_stage, count, work)
        narrow = None
        if of_stage.element < of_stage.gradient:
            narrow = _seconds_of(profile, replace(of_stage, gradient=of_stage.element), count, work)
        found.append(StageTime(stage, seconds, needed, needed <= FITS * capacity, narrow))
    return found


def _seconds_of(profile: Profile, states: ModelStates, count: int, work: Work) -> float:
    """A step of ``count`` layers that are alike."""
    transfers = Transfers(profile, states)
    trained = states.trainable / max(states.parameters, 1)
    gathering = transfers.gather_host(1 if trained < 1 else MATRICES, MATRICES)
    gathers, tensors = [transfers.gather(states.parameters / count)] * 2, float(PARAMETERS * count)
    if states.gathered:  # what trains, once, without hooks
        gathering, gathers, tensors = 0.0, [trained * gathers[0], 0.0], 0.0
    fetches = states.stage == 3 and not states.gathered
    forward, backward = (
        Segment(
            "compute",
            share * work.device / count,
            share * work.host / count + gathering,
            LAUNCHES,
            gather=gather,
            fetched=fetches,
        )
        for share, gather in zip((1 / 3, 2 / 3), gathers, strict=True)
    )
    reduced = transfers.reduced([(backward, states.trainable / count)] * count)
    return sum(seconds_by_part([*[forward] * count, *reduced, *transfers.update(tensors)]).values())
