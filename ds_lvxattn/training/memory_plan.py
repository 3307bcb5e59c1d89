"""The memory plan of a run: model states, what the layers keep for each recompute policy, and the frames that fit."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ds_lvxattn.batches.layout import BatchLayout
from ds_lvxattn.families.family import TOKENS_AT_ONCE
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.memory import FITS, POLICIES, ModelStates, kept_bytes, largest_that_fits, logits_bytes, step_bytes
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.tiling import Tiles
from ds_lvxattn.plan.zero import StageTime, Work, advice, fastest, gradient_advice, stages_of_run


@dataclass(frozen=True)
class Frozen:
    """What of a model does not train under ZeRO-3, and whether it stays gathered (``runtime.kept_parameters``).

    Attributes:
        parameters: that can be kept.
        wish: ``sequence_parallel.keep_frozen``.
        obstacle: what keeps it from being kept; None: nothing.
        trained: whether what trains stays gathered too, from the beginning of a step to the optimizer's.
    """

    parameters: int
    wish: bool | str = "auto"
    obstacle: str | None = None
    trained: bool = True


@dataclass(frozen=True)
class KeptFrozen:
    """What becomes of it.

    Attributes:
        kept: whether it stays gathered.
        why: in words.
        bytes: of what is whole on every rank then: what is frozen for the run, what trains for most of a step.
        portions: of the vision encoder, the most with which a batch fits beside it; None: no limit.
        trained: whether what trains is gathered once a step.
    """

    kept: bool
    why: str
    bytes: int
    portions: int | None = None
    trained: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Of the rank that holds most, for batches like the first one.

    Attributes:
        policy: the recompute policy of the run.
        kept: for each policy and role, bytes that all its layers keep for the backward pass.
        shared: bytes of the visual features, and of what their projector keeps, which all layers share.
        states: bytes of parameters, gradients and optimizer on the device.
        frames: for each policy, the frames of a sample that would fit the device; None without a GPU.
        stage: of ZeRO, that of the config.
        stages: a step in every stage of ZeRO; empty without a GPU, or where the CPU holds the parameters.
        frozen: what becomes of parameters that do not train, under ZeRO-3; None elsewhere.
        buckets: elements that ZeRO-3 sends at once, by their keys in the config.
    """

    policy: str
    kept: Mapping[str, Mapping[str, int]]
    shared: int
    states: int
    frames: Mapping[str, int] | None
    stage: int
    stages: Sequence[StageTime] = ()
    frozen: KeptFrozen | None = None
    buckets: Mapping[str, int] = field(default_factory=dict)

    @property
    def zero(self) -> dict[str, Any] | None:
        """What ``plan.json`` says of ZeRO; None where nothing is known."""
        best = fastest(self.stages)
        if not self.stages and self.frozen is None:
            return None
        kept: dict[str, Any] = {}
        if (frozen := self.frozen) is not None:
            kept = {
                "keeps_frozen": frozen.kept,
                "gathers_trained_once": frozen.trained,
                "why": frozen.why,
                "gathered_bytes": frozen.bytes,
                "buckets": dict(self.buckets),
            }
        return {
            "stage": self.stage,
            **kept,
            "fastest_that_fits": None if best is None else best.stage,
            "predicted_s": {f"{each.stage}": round(each.seconds, 4) for each in self.stages},
            "predicted_bytes": {f"{each.stage}": round(each.memory) for each in self.stages},
            "warning": self.warning,
        }

    @property
    def warning(self) -> str | None:
        """What to say where another stage of ZeRO is faster and fits, or other gradients are."""
        told = (advice(self.stage, self.stages), gradient_advice(self.stage, self.stages))
        return "; ".join(text for text in told if text is not None) or None


def memory_plan(
    layers: Sequence[LayerSizes],
    visual_widths: Sequence[int],
    policy: str,
    states: ModelStates,
    layout: BatchLayout,
    device: torch.device,
    profile: Profile,
    work: Work,
    vocabulary: int = 0,
    tiled_logits: Tiles = None,
    frozen: Frozen | None = None,
) -> MemoryPlan:
    """The plan for the first micro-batch.

    Args:
        layers: its decoder layers, by ``Planner.layer_sizes``.
        visual_widths: of the model's family.
        policy: the recompute policy of the run.
        states: what ZeRO keeps of the model.
        layout: of the micro-batch.
        profile: the machine.
        work: of a micro-batch, by ``Planner.work``.
        vocabulary, tiled_logits: size of the output layer, and its tiles.
        frozen: of a model under ZeRO-3.
    """

    def shared(some: Sequence[LayerSizes]) -> int:
        cross = [layer for layer in some if layer.role == "cross"]
        return max((layer.batch * layer.keys * sum(visual_widths) * layer.element for layer in cross), default=0)

    kept: dict[str, dict[str, int]] = {policy: {} for policy in POLICIES}
    for each, of_role in kept.items():
        for layer in layers:
            of_role[layer.role] = of_role.get(layer.role, 0) + kept_bytes(layer, each)

    def logits(some: Sequence[LayerSizes]) -> int:
        return max(logits_bytes(x.batch * x.rows, vocabulary, x.element, tiled_logits) for x in some)

    whole = replace(states, gathered=states.parameters)
    frames, stages, capacity, portions = None, [], None, None
    if device.type == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory
        per_frame = max(-(-layout.visual_tokens // max(sum(layout.frames), 1)), 1)
        rows = per_frame if layout.keys_in_text else 1  # of a frame in the text
        most = max(sum(layout.frames[sample] for sample in row) for row in layout.samples_of_rows)
        text = max(0, layout.text.total - most * rows)

        def step(each: str, count: int, of: ModelStates = states) -> int:
            some = [_at(layer, text + count * rows, count, per_frame, layout.rows) for layer in layers]
            # Features that need no gradient would leave room for more.
            return step_bytes(some, each, of, shared(some), True, logits(some))

        frames = {each: largest_that_fits(functools.partial(step, each), capacity) for each in POLICIES}
        may_keep = frozen is None or (frozen.obstacle is None and frozen.wish is not False)
        stages = stages_of_run(profile, layers, policy, states, shared(layers), True, work, capacity, may_keep)
        if frozen is not None and any(layout.frames):
            most_kept = largest_that_fits(functools.partial(step, policy, of=whole), int(FITS * capacity))
            at_once = max(TOKENS_AT_ONCE * sum(layout.frames) // max(layout.encoder_tokens, 1), 1)  # frames
            portions = most_kept * layout.rows // (layers[0].ranks * at_once)
    needed = step_bytes(layers, policy, whole, shared(layers), True, logits(layers)) if layers else 0
    fate = None if frozen is None else kept_frozen(frozen, states, needed, capacity, layout.portions, portions)
    held = whole if fate is not None and fate.kept else states
    return MemoryPlan(policy, kept, shared(layers), held.device_bytes, frames, states.stage, stages, fate)


def kept_frozen(
    frozen: Frozen, states: ModelStates, needed: int, capacity: int | None, portions: int, most: int | None
) -> KeptFrozen:
    """Whether what is frozen is kept, and how long.

    Args:
        states: of the model, nothing kept.
        needed: bytes of a step with it.
        capacity: of the device; None, without a GPU: no limit.
        portions, most: of the vision encoder, for the first batch, and the most that fit; None: not known.
    """
    size = states.parameters * states.element
    gib = f"{needed / 2**30:.1f} GiB a step"
    if not frozen.parameters:
        return KeptFrozen(False, "all parameters train", 0)
    if frozen.obstacle is not None:
        return KeptFrozen(False, frozen.obstacle, 0)
    if frozen.wish is not True:
        if frozen.wish is False:
            return KeptFrozen(False, "'sequence_parallel.keep_frozen' is false", 0)
        if capacity is not None and needed > FITS * capacity:
            return KeptFrozen(False, f"{gib}, of which {FITS * capacity / 2**30:.1f} may be taken", 0)
        return KeptFrozen(True, gib, size, None if most is None else max(most, portions), frozen.trained)
    return KeptFrozen(True, "'sequence_parallel.keep_frozen' is true", size, trained=frozen.trained)


def model_states(model: nn.Module, ds_config: Mapping[str, Any], ranks: int) -> ModelStates:
    """What ZeRO keeps of ``model``, whose parameters may be partitioned already."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad, p.element_size()) for p in model.parameters()]
    zero = ds_config.get("zero_optimization", {})

    def offloads(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") != "none"

    return ModelStates(
        parameters=sum(size for size, _, _ in sizes),
        trainable=sum(size for size, trains, _ in sizes if trains),
        element=max(element for _, _, element in sizes),
        stage=zero.get("stage", 0),
        ranks=ranks,
        offload_optimizer=offloads("offload_optimizer"),
        offload_parameters=offloads("offload_param"),
        gradient=_bytes_of_gradients(ds_config),
    )


def _bytes_of_gradients(ds_config: Mapping[str, Any]) -> int:
    """Of an element as DeepSpeed sends it: in float32 where ranks share a sequence, else as the parameters are."""
    half = any((ds_config.get(key) or {}).get("enabled") is True for key in ("bf16", "fp16"))
    if ds_config.get("sequence_parallel_size", 1) > 1:
        dtype = ds_config.get("seq_parallel_communication_data_type") or "fp32"
    else:
        dtype = ds_config.get("communication_data_type") or ("bf16" if half else "fp32")
    return 4 if str(dtype).lower() == "fp32" else 2


def _at(layer: LayerSizes, text: int, frames: int, per_frame: int, batch: int) -> LayerSizes:
    """``layer`` with other numbers of text tokens and frames of each of ``batch`` rows, evenly divided."""
    if layer.role == "cross":  # whose rows and keys are those of the whole batch
        text, frames = text * batch, frames * batch
    rows, keys = -(-text // layer.ranks), -(-frames // layer.ranks) * per_frame
    total = frames * per_frame
    if layer.role != "cross":
        keys, total = rows, text
    return replace(layer, rows=rows, longest_rows=rows, total_rows=text, keys=keys, total_keys=total)
