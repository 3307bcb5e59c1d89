"""What a training loop needs of this package: attach a model, hand it to DeepSpeed, prepare its batches."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ds_lvxattn.batches.collate import MicroBatch
from ds_lvxattn.batches.loader import ControlGroups, Loader, SampleLoader, made_already
from ds_lvxattn.batches.prepare import Batches, Loaded
from ds_lvxattn.batches.sequence_parallel import SequenceParallel, tile_rows
from ds_lvxattn.calibrate import calibrated
from ds_lvxattn.calibration.extent import HeadLayout
from ds_lvxattn.config import SequenceParallelConfig, load_ds_config, sequence_parallel_config
from ds_lvxattn.data.conversations import ConversationSource
from ds_lvxattn.data.sample import Sample, SampleSource
from ds_lvxattn.data.table import Data, name_of
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import VisualFamily, family_of, unwrapped
from ds_lvxattn.families.family import ANY_SIZE, FrameLimits
from ds_lvxattn.groups import SequenceParallelGroups, start_distributed
from ds_lvxattn.runtime.kept_parameters import KeptParameters
from ds_lvxattn.runtime.tiled import TiledLogits
from ds_lvxattn.training.dataset import text_limit, text_of_model
from ds_lvxattn.training.ds_config import batch_sizes, with_fused_adam, zero_stage
from ds_lvxattn.training.loading import (
    LoadedModel,
    image_token_of,
    loss_factor,
    model_dtype,
    parameter_groups,
    partition_over_all_ranks,
    take_template,
    whole_processor,
)
from ds_lvxattn.training.memory_plan import MemoryPlan, memory_plan, model_states
from ds_lvxattn.training.order import Order
from ds_lvxattn.training.peft_methods import refuse_methods
from ds_lvxattn.training.reach import check_reached_alike, with_gradient
from ds_lvxattn.training.tokens import counted_step
from ds_lvxattn.training.trained import Trained, check_trains
from ds_lvxattn.training.zero3 import frozen_of, keep, may_keep_trained

MARK = "_ds_lvxattn_attached"  # an attribute of models that are
SKIP_REMEDY = "give on_bad_sample='skip' to go on without it"


class Attached:
    """A model that trains on batches which the ranks of a group share; made by ``attach``.

    Args:
        loaded: the model with tokenizer and image processor.
        ds_config: the DeepSpeed config.
        config: its sequence-parallel settings.
        groups: None where this rank is alone, without ``torch.distributed``.
        device: of this rank.
        skip_bad: whether a broken sample is skipped with a warning or fatal.
        dtype: of the model's arguments; None: as the DeepSpeed config has it.
        limits: how large frames may be.
        packing: see ``attach``.

    Attributes:
        batches: makes micro-batches; ``batches.planner.plan`` is the plan at hand.
        parallel: the model's sequence parallelism; None with a size of 1 and without packing.
        tiled_logits: the model's loss by tiles; None: from whole logits.
        trained: what trains, since DeepSpeed has been given the groups.
        loss_factor: what a loss is multiplied by before the backward pass; ``loss`` does it.

    Raises:
        ConfigError: settings that cannot work, on every rank.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        ds_config: dict[str, Any],
        config: SequenceParallelConfig,
        groups: SequenceParallelGroups | None,
        device: torch.device,
        skip_bad: bool = False,
        dtype: torch.dtype | None = None,
        limits: FrameLimits = ANY_SIZE,
        packing: int | None = None,
    ) -> None:
        self.loaded, self.ds_config, self.config, self.groups = loaded, ds_config, config, groups
        self.device, self.skip_bad = device, skip_bad
        self.loss_factor = loss_factor(ds_config, config.size)
        model = unwrapped(loaded.model)
        if getattr(model, MARK, False):
            raise ConfigError("the model is attached already, and its hooks would run twice; load it afresh")
        self.parallel: SequenceParallel | None = None
        self.tiled_logits: TiledLogits | None = None
        if config.size > 1 or packing is not None:
            assert groups is not None
            refuse_methods(loaded.model)
            self.parallel = _attached(model, config, groups)
            self.tiled_logits = self.parallel.tiled_logits
        elif config.tiled_mlp is not None or config.tiled_logits is not None:
            self.tiled_logits = tile_rows(model, family_of(model).attention_layers(model), config)
        self.batches = Batches(
            model, loaded.processor, loaded.pad_token, loaded.image_id,
            device, dtype or model_dtype(ds_config), self.parallel, limits, packing,
        )  # fmt: skip
        setattr(model, MARK, True)
        self.trained: Trained | None = None
        self._model: nn.Module = model  # that of the engine
        self._stage = zero_stage(ds_config)
        self._mixed = False  # whether only some ranks had images in a micro-batch that was prepared here
        self._calibrated = False
        self._planned_memory = False
        self._loader: SampleLoader | None = None
        self._made: list[dist.ProcessGroup] = []  # groups for host messages, of loaders that have not ended
        compares = self.batches.skips_encoder and groups is not None and groups.get_data_parallel_world_size() > 1
        self._comparing = self.everyone() if compares else None

    def close(self) -> None:
        """End the process groups that were made for the model, and their threads; after their last use, on every rank.

        What else the process trains goes on. The model keeps its hooks: to train it again, load it afresh.
        """
        self._end(self._made)
        if self.parallel is not None:
            self.parallel.close()
        if self.groups is not None:
            self.groups.close()
        self.groups = self.parallel = None

    def __enter__(self) -> Attached:
        """For ``with``: closed at its end, but for one by an error."""
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:  # after an error, other ranks may be waiting in a group
            self.close()

    def _end(self, made: Sequence[dist.ProcessGroup]) -> None:
        for group in [*made]:
            dist.destroy_process_group(group)
            self._made.remove(group)

    # Data

    def rows(self, data: Data, *, max_frames: int = 64, **how: Any) -> ConversationSource:
        """Conversations about videos and images as samples for this model.

        Args:
            data: a file, a hub dataset or a ``datasets.Dataset``; ``docs/your-data-and-model.md`` has the layouts of
                its rows.
            max_frames: frames of a row.
            how: other arguments of ``ConversationSource``; here ``eval_share`` is 0.

        Raises:
            ConfigError: the dataset cannot be read or is empty.
        """
        limit = text_limit(unwrapped(self.loaded.model))
        text = text_of_model(self.loaded, self.batches.collator.limits)
        how = {"eval_share": 0.0, "max_text_tokens": limit, **how}
        try:
            return ConversationSource(data, self.loaded.tokenizer, text, max_frames=max_frames, **how)
        except ValueError as error:
            raise ConfigError(f"{name_of(data)}: {error}") from error

    def loader(self) -> SampleLoader:
        """A loader with groups of its own for its messages; all ranks call it."""
        return SampleLoader(self.batches, self._control(), self.skip_bad, remedy=SKIP_REMEDY)

    def _control(self) -> ControlGroups | None:
        if self.groups is None:
            return None
        control = ControlGroups.beside(self.groups)
        self._made += control
        return control

    def everyone(self) -> dist.ProcessGroup:
        """A new group of all ranks for host messages, which ``close`` ends; all ranks call it."""
        group = dist.new_group(backend="gloo")
        self._made.append(group)
        return group

    def prepare(self, samples: Sequence[Sample]) -> MicroBatch:
        """This rank's part of ``samples``: its frames decoded, its arguments made, planned for if it need be.

        Every rank of a group gives the same samples, and all groups call it equally often. Decodes while the device
        waits; ``micro_batches`` decodes ahead.

        Raises:
            SampleError: on every rank, when a sample is broken or the ranks of a group give different ones.
        """
        if self._loader is None:
            self._loader = self.loader()
        self.calibrate()
        return self._prepared(self._loader.load_samples([made_already(sample) for sample in samples]))

    def micro_batches(self, source: SampleSource, first: int, last: int) -> Iterator[MicroBatch]:
        """Micro-batches ``first`` to ``last - 1`` of ``source``, decoded one ahead; all ranks call it alike.

        Rows come in the order of ``source``, epoch after epoch; a group takes every so many of them, by the config's
        ``train_micro_batch_size_per_gpu``, which here is that of a group. The losses of the micro-batches of a step,
        over all groups, average to the sum over its supervised tokens divided by their number.

        Raises:
            SampleError: as ``prepare``.
        """
        assert self.groups is not None
        rank, ranks = self.groups.get_data_parallel_rank(), self.groups.get_data_parallel_world_size()
        _, micro_batch, accumulation = batch_sizes(self.ds_config, ranks)
        control, everyone = self._control(), self.everyone()
        assert control is not None
        loader = Loader(source, self.batches, control, self.skip_bad, remedy=SKIP_REMEDY)
        self.calibrate()
        loaded = loader.stream(Order(source, micro_batch, rank, ranks).rows, first, last)
        return self._by_steps(loaded, accumulation, everyone, (*control, everyone))

    def _by_steps(
        self,
        loaded: Iterator[Loaded],
        accumulation: int,
        everyone: dist.ProcessGroup,
        made: Sequence[dist.ProcessGroup],
    ) -> Iterator[MicroBatch]:
        assert self.groups is not None
        while step := list(itertools.islice(loaded, accumulation)):
            for each in counted_step(step, self.groups, everyone)[0]:
                yield self._prepared(each)
        self._end(made)

    # Training

    @property
    def calibrates(self) -> bool:
        """Whether ``calibrate`` has something to do."""
        auto = self.config.strategy == "auto" and self.config.size > 1
        return auto and self.batches.planner is not None and not self._calibrated

    def calibrate(self) -> None:
        """Once, and where the config leaves the strategy to the plan: measure the machine for it; all ranks call it.

        What was measured on the same machine before is read instead (``ds_lvxattn.calibrate``).
        """
        planner = self.batches.planner
        if not self.calibrates:
            return
        assert self.parallel is not None and planner is not None
        layouts = [HeadLayout(*layout) for layout in self.parallel.head_layouts]
        comm = self.parallel.comm
        planner.profile = calibrated(
            comm.group, layouts, self.device, self.batches.collator.dtype, inner_size=comm.node_size
        )
        self._calibrated = True

    def plan_memory(self, first: Loaded) -> MemoryPlan | None:
        """The memory plan for micro-batches like ``first``, by which ZeRO-3 keeps parameters that do not train; all
        ranks call it, once there is an engine, for the first one that is planned.

        Returns:
            None where the model is not attached.

        Raises:
            ConfigError: the config wants them kept, and something else in it does not let them be.
        """
        planner, parallel, layout = self.batches.planner, self.parallel, first.layout
        if planner is None or parallel is None:
            return None
        sizes, family, model = self.batches.collator.sizes(layout), parallel.family, self.loaded.model
        kept = KeptParameters(model, may_keep_trained(self.ds_config))
        plan = memory_plan(
            planner.layer_sizes(sizes.shapes()), family.visual_widths() if isinstance(family, VisualFamily) else (),
            parallel.recomputation.policy, model_states(model, self.ds_config, dist.get_world_size()),
            layout, self.device, planner.profile, planner.work(sizes),
            family.text_config.vocab_size, self.config.tiled_logits,
            frozen_of(kept, self.ds_config, self.config.keep_frozen),
        )  # fmt: skip
        if plan.frozen is not None and not self._planned_memory:
            plan = replace(plan, frozen=keep(kept, plan.frozen, self.device), buckets=kept.buckets)
        self._planned_memory = True
        return plan

    def _prepared(self, loaded: Loaded) -> MicroBatch:
        """``loaded`` as a micro-batch; the first one decides what ZeRO-3 keeps."""
        self._mixed |= loaded.mixed
        batch = self.batches.prepare(loaded)
        if self.trained is not None and not self._planned_memory:
            self.plan_memory(loaded)
        return batch

    def engine_arguments(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Arguments of ``deepspeed.initialize``: model, trainable parameters, config and process groups.

        Under ZeRO-3 the model is partitioned now, over all ranks, if it is not yet.

        Args:
            model: the attached model inside another module, by ``peft.get_peft_model`` after it was attached, or one of
                yours around it.

        Raises:
            ConfigError: ``model`` does not hold the attached one, nothing of it trains, it has adapters of a method
                that divided text does not allow, or ZeRO-3 has partitioned it over other ranks.
        """
        model = self.loaded.model if model is None else model
        if unwrapped(self.loaded.model) not in model.modules():
            raise ConfigError(
                f"engine_arguments was given a {type(model).__name__} that does not hold the model that was attached; "
                "attach the model that you train"
            )
        if self.parallel is not None:
            refuse_methods(model)
        check_trains(model)
        arguments = {"model": model, "model_parameters": parameter_groups(model)}
        if self.groups is not None:
            partition_over_all_ranks(model, self.ds_config, self.groups)
            arguments["mpu"] = self.groups
        arguments["config"] = with_fused_adam(self.ds_config)
        self.note_engine(model)
        return arguments

    def note_engine(self, model: nn.Module) -> None:
        """DeepSpeed makes an engine of ``model`` now, with the groups."""
        self.trained, self._model = Trained(model), model

    def begin_backward(self, part: Tensor, mixed: bool) -> Tensor:
        """Ahead of the backward pass of a micro-batch: see ``Trained.begin``; all ranks call it.

        Args:
            part: this rank's part of the loss.
            mixed: whether only some ranks may have images; the same on all of them.

        Returns:
            ``part``, with a gradient, if only of 0; as it is where DeepSpeed was given nothing.

        Raises:
            ConfigError: on all ranks, where only some have images and their losses reach other parameters; and see
                ``Trained.begin`` and ``with_gradient``.
        """
        if self.trained is None:
            return part
        if mixed and self._comparing is not None:
            check_reached_alike(part, self._model, self._stage, self._comparing)
        self.trained.begin()
        return with_gradient(part, self._model, self._stage)

    def loss(self, part: Tensor) -> Tensor:
        """The loss of the micro-batch, for ``engine.backward``, from this rank's part of it, which the model returned.

        Returns:
            A scalar: its value is the loss of the group, the same on its ranks; its gradient is that of the part, as
            ZeRO is to sum it.

        Raises:
            ConfigError: DeepSpeed was not given what ``engine_arguments`` gives, or other parameters train than then;
                and see ``begin_backward``.
        """
        if self.trained is None:
            raise ConfigError(
                "a loss before deepspeed.initialize(**engine_arguments()): without the groups of engine_arguments "
                "gradients would not be summed over the ranks of a sequence; call it first"
            )
        # Which micro-batch it is of is not known here: from the first mixed one on, all are compared.
        part = self.begin_backward(part, self._mixed)
        return group_loss(part, self.loss_factor, self.parallel)


def _attached(model: Any, config: SequenceParallelConfig, groups: SequenceParallelGroups) -> SequenceParallel:
    try:
        return SequenceParallel(model, config, groups)
    except ConfigError as error:
        if config.size > 1:
            raise
        raise ConfigError(
            f"packing keeps the samples of a row apart by intervals, on one rank too, and {error}; leave 'packing' out"
        ) from error


def group_loss(part: Tensor, factor: int, parallel: SequenceParallel | None) -> Tensor:
    """A scalar with the value of the group's loss and the gradient of ``factor * part``; a collective of the group."""
    if parallel is None:
        return part
    whole = part.detach().clone()
    dist.all_reduce(whole, group=parallel.comm.group)
    scaled = part * factor
    return scaled + (whole - scaled.detach())


def attach(
    model: PreTrainedModel | nn.Module,
    ds_config: dict[str, Any] | str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    processor: Any = None,
    on_bad_sample: str = "fail",
    limits: FrameLimits = ANY_SIZE,
    packing: int | None = None,
) -> Attached:
    """Make a transformers model ready for a loop of one's own; all ranks call it, ahead of ``deepspeed.initialize``.

    Starts ``torch.distributed`` from the launcher's environment if it has not been started. The model's code stays as
    it is: it gets process groups, roles for its attention modules and hooks. With a ``sequence_parallel_size`` of 1
    it is left alone unless samples are packed, and the same loop trains it as plain DeepSpeed does.

    Args:
        model: of a known family, or a ``PeftModel`` of one; ``peft.get_peft_model`` may also come after.
        ds_config: the DeepSpeed config, or its file.
        tokenizer: None: that of the path or hub name which the model was loaded from.
        processor: the image processor; None: as for ``tokenizer``.
        on_bad_sample: ``skip`` broken media with a warning, or ``fail``.
        limits: how large frames may be.
        packing: tokens of a row of a micro-batch that samples share, each in the first row with room for it; a longer
            sample has a row of its own. None: every sample has.

    Raises:
        ConfigError: on every rank: a setting that cannot work, a model that no family knows, or one that is attached
            or in an engine already.
    """
    if isinstance(model, DeepSpeedEngine):
        raise ConfigError(
            "the model is in a DeepSpeed engine already, which was made without sequence-parallel groups; attach it "
            "first, then deepspeed.initialize(**attached.engine_arguments())"
        )
    if on_bad_sample not in ("skip", "fail"):
        raise ConfigError(f"on_bad_sample is {on_bad_sample!r}; choose 'skip' or 'fail'")
    if not isinstance(ds_config, dict):
        ds_config = load_ds_config(os.fspath(ds_config))
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ConfigError(
                "no process group, and no launcher's environment to start one; start the script with "
                "deepspeed --num_gpus N SCRIPT.py, or torchrun"
            )
        if get_accelerator().device_name() != "cpu":
            get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    start_distributed()
    config = sequence_parallel_config(ds_config, dist.get_world_size())
    loaded = loaded_model(model, tokenizer, processor)
    groups = SequenceParallelGroups(config.size)
    device = torch.device(get_accelerator().current_device_name())
    skip_bad = on_bad_sample == "skip"
    return Attached(loaded, ds_config, config, groups, device, skip_bad, limits=limits, packing=packing)


def loaded_model(model: Any, tokenizer: Any = None, processor: Any = None, whole: Any = None) -> LoadedModel:
    """``model`` with what its data needs, by default from where it was loaded from.

    Raises:
        ConfigError: nothing is there.
    """
    base = unwrapped(model)
    family, name = family_of(base), base.name_or_path
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            if isinstance(family, VisualFamily):
                whole = whole_processor(name)
                take_template(tokenizer, whole, name)
        if processor is None and isinstance(family, VisualFamily):
            processor = family.load_processor(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer or image processor in {name!r} ({error}); give them") from error
    take_template(tokenizer, whole)
    return LoadedModel(model, tokenizer, processor, image_token_of(base, tokenizer), whole)
