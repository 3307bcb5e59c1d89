"""Hugging Face's Trainer, with each sample divided over the ranks of a group."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize

from ds_lvxattn.batches.layout import BatchLayout
from ds_lvxattn.batches.prepare import Loaded
from ds_lvxattn.config import sequence_parallel_config
from ds_lvxattn.data.sample import IGNORE, Sample, without_labels
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.family import ANY_SIZE, FrameLimits
from ds_lvxattn.groups import SequenceParallelGroups, start_distributed
from ds_lvxattn.hf.accelerator import use_groups
from ds_lvxattn.hf.arguments import REFUSED, check_arguments, packing_of
from ds_lvxattn.hf.checkpoints import check_resumable
from ds_lvxattn.hf.decisions import decide_together, share_decisions
from ds_lvxattn.hf.rows import Found, as_dataset, as_made, as_they_are, bind
from ds_lvxattn.hf.sft import of_trl, row_settings
from ds_lvxattn.plan.layer_plan import write_plan
from ds_lvxattn.plan.planner import Plan
from ds_lvxattn.training.attach import Attached, group_loss, loaded_model
from ds_lvxattn.training.plan_times import PlanTimes
from ds_lvxattn.training.trained import check_trains


class SequenceParallelTrainer(Trainer):
    """``transformers.Trainer`` for models that ``ds_lvxattn`` knows; the settings are those of the DeepSpeed config.

    ``sequence_parallel_size`` and the block ``sequence_parallel`` of ``TrainingArguments(deepspeed=...)`` say how many
    ranks share a sample, and how; ``finetuning.packing`` in it packs rows. A micro-batch is that of a group:
    ``per_device_train_batch_size`` rows for the ranks of a group together. Losses, gradient norms and metrics are those
    of whole samples. Without DeepSpeed, or with a size of 1, it is the Trainer over the same rows.

    Args:
        model: a transformers model of a known family, or a ``PeftModel`` of one.
        args: with ``deepspeed``, unless there is one rank alone; TRL's ``SFTConfig`` too.
        train_dataset, eval_dataset: ``Rows``, a ``datasets.Dataset`` of such rows, or datasets of
            ``ds_lvxattn.Sample``; no iterable datasets.
        processing_class: the model's processor or tokenizer; None: that of the path that the model was loaded from.
        on_bad_sample: ``skip`` broken media with a warning, or ``fail``.
        limits: how large frames may be.
        preprocess_logits_for_metrics: called with the logits ``[B, s, V]`` of the rank's own rows and the labels at
            their places, before rows are gathered: without it whole logits are.
        others: of ``Trainer``, by name.

    Attributes:
        attached: the attached model; ``attached.batches.planner.plan`` is the plan at hand.

    Raises:
        ConfigError: on every rank, for what cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        on_bad_sample: str = "fail",
        limits: FrameLimits = ANY_SIZE,
        **others: Any,
    ) -> None:
        for name, why in REFUSED.items():
            if others.pop(name, None) is not None:
                raise ConfigError(f"{name} was given, which SequenceParallelTrainer does not take: {why}; leave it out")
        check_arguments(args)
        if on_bad_sample not in ("skip", "fail"):
            raise ConfigError(f"on_bad_sample is {on_bad_sample!r}; choose 'skip' or 'fail'")
        self._attach = (model, processing_class, on_bad_sample == "skip", limits)
        self._row_settings = row_settings(args, train_dataset, eval_dataset)
        datasets = as_dataset(train_dataset, **self._row_settings), as_dataset(eval_dataset, **self._row_settings)
        self._datasets = datasets
        super().__init__(
            model=model, args=args, data_collator=as_they_are, train_dataset=datasets[0], eval_dataset=datasets[1],
            processing_class=processing_class, **others,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = True  # the loss is divided by all items of a step, see ``training_step``
        self._epoch: Iterator[Any] | None = None
        self._ahead: Iterator[Loaded] = iter(())
        self._step: int | None = None  # the one at hand, in training
        self._evaluates_alone = False
        self._whole = False  # whether the loss of the micro-batch at hand came by ``whole_loss``
        self._mixed = False  # ... and whether only some ranks have images in it
        self._zero: dict[str, Any] | None = None  # what ``plan.json`` says of ZeRO

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        for base in cls.__mro__:
            if of_trl(base):
                raise ConfigError(
                    f"{cls.__name__} is a {base.__name__}, which tokenises its dataset and replaces the model's "
                    "forward by one for whole texts, which no rank has; use SequenceParallelTrainer in its place, "
                    "which takes the same rows and SFTConfig, and takes loss on the answers"
                )
        if cls.prediction_step is not Trainer.prediction_step:
            raise ConfigError(
                f"{cls.__name__} has a prediction_step, which evaluation does not call: it predicts rows that ranks "
                "share; override compute_loss, or give compute_metrics or preprocess_logits_for_metrics"
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Made ahead of everything that asks for data or model: the model is attached here."""
        super().create_accelerator_and_postprocess()
        model, processing, skip_bad, limits = self._attach
        if self.args.deepspeed and not self.is_deepspeed_enabled:
            raise ConfigError(
                "TrainingArguments.deepspeed is given, and Accelerate passes it by, as accelerate launch --cpu tells "
                "it to; start the script with deepspeed, torchrun or accelerate launch --use_deepspeed, or leave it out"
            )
        # That of the arguments, or of accelerate launch --deepspeed_config_file.
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        ds_config = {} if plugin is None else plugin.hf_ds_config.config
        packing = packing_of(ds_config)
        config = sequence_parallel_config(ds_config, self.args.world_size)
        if not self.is_deepspeed_enabled and self.args.world_size > 1:
            raise ConfigError(
                f"{self.args.world_size} ranks without DeepSpeed; give TrainingArguments(deepspeed=CONFIG) with "
                "'sequence_parallel_size' in the config"
            )
        groups: SequenceParallelGroups | None = None
        if self.is_deepspeed_enabled:
            start_distributed()  # on a CPU, Accelerate has started torch.distributed without DeepSpeed
            groups = SequenceParallelGroups(config.size)
        loaded = loaded_model(
            model,
            getattr(processing, "tokenizer", processing),
            getattr(processing, "image_processor", None),
            processing,
        )
        dtype = None if self.is_deepspeed_enabled else next(model.parameters()).dtype
        self.attached = Attached(loaded, ds_config, config, groups, self.args.device, skip_bad, dtype, limits, packing)
        self._everyone: dist.ProcessGroup | None = None  # for host messages of all ranks
        if groups is not None:
            use_groups(self.accelerator, groups, self.attached.note_engine)
            self._everyone = self.attached.everyone()
        for dataset in self._datasets:
            bind(dataset, self.attached)
        self._loaders = [self.attached.loader() for _ in range(2)]
        self._plan_times = PlanTimes(self.attached.batches, self.args.device, self._write_plan)

    def close(self) -> None:
        """End the process groups of this Trainer; after its last use, on every rank. Another Trainer goes on."""
        self.attached.close()

    @property
    def _data_ranks(self) -> int:
        groups = self.attached.groups
        return 1 if groups is None else groups.get_data_parallel_world_size()

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See ``Trainer.train``."""
        if self._evaluates_alone:
            raise ConfigError(
                "train after an evaluation that made a ZeRO-3 engine without optimizer; train first, or make another "
                "Trainer, over a model that is loaded afresh"
            )
        if self.deepspeed is not None:
            raise ConfigError(
                "a second train() of one Trainer under DeepSpeed: transformers ends the engine of the first and makes "
                "no other; give max_steps or num_train_epochs for both, or resume_from_checkpoint to another Trainer"
            )
        check_trains(self.attached.loaded.model)
        if self.is_deepspeed_enabled and resume_from_checkpoint:
            check_resumable(resume_from_checkpoint, self.args, self.attached.ds_config)
        self.attached.calibrate()
        self._step = None
        if self._everyone is not None:
            decide_together(self.callback_handler, self._everyone)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        # What was loading ahead ends here, on all ranks.
        self._epoch, self._ahead = None, iter(())
        return result

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Rows of an optimizer step, over all groups."""
        return super().get_total_train_batch_size(args) // self.attached.config.size

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The micro-batches of a step, loaded ahead, and the supervised tokens in them, by which the loss is divided.

        Over all groups with ``average_tokens_across_devices``.
        """
        if epoch_iterator is not self._epoch:
            self._epoch, self._ahead = epoch_iterator, self._loaders[0].ahead(map(as_made, epoch_iterator))
        batches = list(itertools.islice(self._ahead, num_batches))
        items = sum(batch.layout.supervised_tokens for batch in batches)
        if not self._averages_tokens:
            return batches, max(items, 1)
        assert self.attached.groups is not None
        total = torch.tensor(items, device=device)
        dist.all_reduce(total, group=self.attached.groups.get_data_parallel_group())
        return batches, total.clamp(min=1)

    @property
    def _averages_tokens(self) -> bool:
        return self.args.average_tokens_across_devices and self._data_ranks > 1

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Prepare what was loaded, planned for if it need be, and take the step; see ``Trainer.training_step``."""
        self._begin_step(inputs, self.state.global_step + 1)
        batch = self._plan_times.prepare(replace(inputs, tokens=num_items_in_batch))
        self._whole, self._mixed = False, inputs.mixed
        loss = super().training_step(model, batch.inputs, num_items_in_batch)
        self._check_whole()
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        """As they are: on the device, in the model's dtype, and those that the batch belongs to, not copies."""
        return inputs

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the group: its value, and the gradient of this rank's part of it."""
        outputs = model(**inputs)
        loss = self.whole_loss(outputs.loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def whole_loss(self, part: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """What ``compute_loss`` of a class of your own returns for ``part``, a scalar of this rank's rows.

        Args:
            part: a sum over the rank's rows (``inputs["shift_labels"]`` are those that they predict), divided by what
                is the same on all ranks: ``inputs["num_items_in_batch"]``.
            num_items_in_batch: the argument of ``compute_loss``.

        Returns:
            A scalar: its value is the sum of the parts of the group, its gradient that of this rank's part.
        """
        self._whole = True
        if torch.is_grad_enabled():
            part = self.attached.begin_backward(part, self._mixed)
        loss = group_loss(part, self.attached.loss_factor, self.attached.parallel)
        if self._averages_tokens and num_items_in_batch is not None:
            loss = loss * self._data_ranks  # ZeRO averages over the groups what is a share of all
        return loss

    def _check_whole(self) -> None:
        """Raise ``ConfigError`` where the loss of a micro-batch did not come by ``whole_loss``."""
        if self.is_deepspeed_enabled and not self._whole:
            raise ConfigError(
                f"compute_loss of {type(self).__name__} returned the loss of this rank's rows as that of the micro-"
                "batch; let it return self.whole_loss(loss, num_items_in_batch), or what super().compute_loss does"
            )

    def floating_point_ops(self, inputs: Any) -> int:
        """Of this rank's share of a micro-batch, as it was loaded."""
        rows = inputs.layout.input_ids.size // self.attached.config.size
        main = getattr(self.model, "main_input_name", "input_ids")
        return super().floating_point_ops({main: torch.empty(rows, device="meta")})

    def _begin_step(self, first: Loaded, step: int) -> None:
        """Ahead of a micro-batch of ``step``: measure layers or not, and plan for the first one of all."""
        if step == self._step:
            return
        batches = self.attached.batches
        if self._step is None and batches.planner is not None:
            batches.plans(first.layout)
            memory = self.attached.plan_memory(first) if self.is_deepspeed_enabled else None
            self._zero = None if memory is None else memory.zero
            self._plan_times.start(batches.planner.plan, step)
            self._write_plan(batches.planner.plan)
        self._step = step
        self._plan_times.start_step(step)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer does; what callbacks decide meanwhile, all ranks do."""
        control = self.control
        acts = control.should_log or control.should_evaluate or control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if acts and self._everyone is not None:
            share_decisions(self.control, self._everyone)

    def _write_plan(self, plan: Plan) -> None:
        """``plan.json`` in the output directory."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            write_plan(plan, folder / "plan.json", self._zero)

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See ``Trainer.evaluate``; ``eval_dataset`` as for the Trainer."""
        return super().evaluate(self._bound(eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """See ``Trainer.predict``; ``test_dataset`` as for the Trainer."""
        return super().predict(self._bound(test_dataset), *args, **kwargs)

    def _bound(self, dataset: Any) -> Any:
        dataset = as_dataset(dataset, **self._row_settings)
        bind(dataset, self.attached)
        return dataset

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss, and with ``compute_metrics`` its metrics, over predictions of whole samples; as the Trainer's own.

        Labels and predictions are ``[rows, S, ...]`` in the order of the text, as the unmodified model gives them.
        """
        args, attached = self.args, self.attached
        loss_only = args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        attached.calibrate()
        model = self._model_to_evaluate()
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        left = len(dataloader.dataset)
        names = ("losses", "predictions", "label_ids", "inputs")
        found = {name: EvalLoopContainer(args.eval_do_concat_batches, padding_index=IGNORE) for name in names}
        metrics: dict[str, Any] = {}
        for step, loaded in enumerate(self._loaders[1].ahead(map(as_made, self._without_repeats(dataloader)))):
            batch = attached.batches.prepare(loaded)
            whole: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if not loss_only and attached.tiled_logits is not None:
                whole = attached.tiled_logits.whole_logits()
            self._whole = False
            with torch.no_grad(), self.compute_loss_context_manager(), whole:
                loss, outputs = self.compute_loss(model, batch.inputs, return_outputs=True)
            self._check_whole()
            rows = len(loaded.layout.frames)
            given = {"losses": loss.repeat(rows)}
            if not loss_only:
                given |= self._predictions(outputs, loaded.layout)
            # The groups' rows in turn; where their number is no multiple, the last ones are repeats.
            kept = {name: _first(left, self._of_all_groups(each)) for name, each in given.items()}
            left = max(left - rows * self._data_ranks, 0)
            if args.batch_eval_metrics:
                found["losses"].add(kept["losses"])
                if self.compute_metrics is not None and not loss_only:
                    judge: Any = self.compute_metrics
                    metrics = judge(self._to_judge(kept), compute_result=left == 0)
            else:
                for name, each in kept.items():
                    found[name].add(each)
                if args.eval_accumulation_steps is not None and (step + 1) % args.eval_accumulation_steps == 0:
                    for container in found.values():
                        container.to_cpu_and_numpy()
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        arrays = {name: container.get_arrays() for name, container in found.items()}
        if self.compute_metrics is not None and not args.batch_eval_metrics and arrays["predictions"] is not None:
            metrics = self.compute_metrics(self._to_judge(arrays))
        metrics = denumpify_detensorize(metrics)
        losses = arrays["losses"]
        if losses is not None:
            metrics["loss"] = float(np.mean(np.concatenate(losses) if isinstance(losses, list) else losses))
        prefix = f"{metric_key_prefix}_"
        metrics = {name if name.startswith(prefix) else prefix + name: value for name, value in metrics.items()}
        return EvalLoopOutput(arrays["predictions"], arrays["label_ids"], metrics, len(dataloader.dataset) - left)

    def _model_to_evaluate(self) -> nn.Module:
        """The engine that trains, or where there is none yet, the model as it is; ZeRO-3 needs an engine."""
        if self.is_in_train or self.deepspeed is not None:
            return self.model_wrapped
        if not self.is_deepspeed_enabled or self.accelerator.state.deepspeed_plugin.zero_stage != 3:
            model: Any = self.model
            return nn.Module.to(model, self.args.device, self.attached.batches.collator.dtype)
        self._evaluates_alone = True
        deepspeed_init(self, num_training_steps=0, inference=True)
        self.model_wrapped = self.deepspeed = self.accelerator.prepare(self.model)
        return self.model_wrapped

    def _without_repeats(self, dataloader: Iterable[Sequence[Found]]) -> Iterator[list[Found | None]]:
        """Batches of this rank's group; rows that are there again, so that all groups have as many, do not count.

        They have no content, or where the model skips its vision encoder for text alone no labels.
        """
        groups, size = self.attached.groups, len(dataloader.dataset)  # type: ignore[attr-defined]
        rank = 0 if groups is None else groups.get_data_parallel_rank()
        for number, samples in enumerate(dataloader):
            first = (number * self._data_ranks + rank) * self.args.eval_batch_size
            yield [sample if first + row < size else self._filling(sample) for row, sample in enumerate(samples)]

    def _filling(self, sample: Found) -> Found | None:
        if self.attached.batches.skips_encoder and isinstance(sample, Sample):
            return without_labels(sample)
        return None

    def _predictions(self, outputs: Any, layout: BatchLayout) -> dict[str, Any]:
        """What ``compute_metrics`` may ask for, ``[B, S, ...]``, on every rank of the group."""
        labels = np.full_like(layout.shift_labels, IGNORE)
        labels[:, 1:] = layout.shift_labels[:, :-1]
        rank = self.attached.batches.collator.rank_in(layout)
        values = outputs.logits
        if self.preprocess_logits_for_metrics is not None:
            own = torch.from_numpy(np.ascontiguousarray(labels[:, layout.text.index(rank)])).to(self.args.device)
            values = self.preprocess_logits_for_metrics(values, own)
        given = {
            "predictions": _each(values, lambda x: self._whole_text(x, layout)),
            "label_ids": torch.from_numpy(labels).to(self.args.device),
        }
        if "inputs" in self.args.include_for_metrics:
            given["inputs"] = torch.from_numpy(layout.input_ids).to(self.args.device)
        if layout.rows == len(layout.spans):
            return given
        padding = {"label_ids": IGNORE, "inputs": self.attached.loaded.pad_token}
        apart = {name: functools.partial(_apart, layout, padding.get(name, 0)) for name in given}
        return {name: _each(values, apart[name]) for name, values in given.items()}

    def _whole_text(self, own: Tensor, layout: BatchLayout) -> Tensor:
        """``[B, s, ...]`` of this rank's rows to ``[B, S, ...]`` of all, in the order of the text."""
        text, parallel = layout.text, self.attached.parallel
        if parallel is None or text.ranks == 1:
            return own
        rows = text.lengths[parallel.comm.rank]
        if own.dim() < 2 or own.shape[1] != rows:
            raise ConfigError(
                f"preprocess_logits_for_metrics returned a tensor of shape {list(own.shape)} for logits of {rows} rows "
                "a sample; return [B, rows, ...], as argmax(-1) does"
            )
        padded = own.new_zeros(own.shape[0], text.longest, *own.shape[2:])
        padded[:, :rows] = own
        every = parallel.comm.all_gather(padded, "predictions").transpose(0, 1).flatten(1, 2)
        order = text.order_from_padded()
        return every if order is None else every[:, torch.tensor(order, device=every.device)]

    def _of_all_groups(self, rows: Any) -> Any:
        """``[B, ...]`` of this rank's group to those of all groups in turn, padded to the longest text."""
        if self._data_ranks == 1:
            return rows

        def gather(x: Tensor) -> Tensor:
            padded = self.accelerator.pad_across_processes(x, dim=1, pad_index=IGNORE) if x.dim() > 1 else x
            ranks = self.accelerator.gather(padded).unflatten(0, (self.args.world_size, -1))
            return ranks[:: self.attached.config.size].flatten(0, 1)  # ranks of a group have the same

        return _each(rows, gather)

    def _to_judge(self, given: dict[str, Any]) -> EvalPrediction:
        named: dict[str, Any] = {name: given.get(name) for name in ("predictions", "label_ids")}
        for name, key in (("loss", "losses"), ("inputs", "inputs")):
            if name in self.args.include_for_metrics:
                named[key] = given.get(key)
        return EvalPrediction(**named)


def _apart(layout: BatchLayout, padding: int, x: Tensor) -> Tensor:
    """``[rows, S, ...]`` of rows that samples share as ``[samples, S', ...]``, ``padding`` behind the shorter ones."""
    parts = [x[span.row, span.start : span.stop] for span in layout.spans]
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=padding)


def _each(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of every tensor in nested tuples, lists and dicts."""
    if isinstance(values, (tuple, list)):
        return type(values)(_each(value, function) for value in values)
    if isinstance(values, dict):
        return {name: _each(value, function) for name, value in values.items()}
    return function(values)


def _first(rows: int, values: Any) -> Any:
    return _each(values, lambda x: x[:rows])
