"""The fine-tuning loop: one DeepSpeed engine, sequence-parallel micro-batches, metrics, evaluation, checkpoints."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ds_lvxattn.batches.agreement import gather, on_all_ranks
from ds_lvxattn.batches.loader import ControlGroups, Loader
from ds_lvxattn.batches.prepare import Loaded
from ds_lvxattn.config import SequenceParallelConfig
from ds_lvxattn.data.sample import SampleSource
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.groups import SequenceParallelGroups, set_timeouts
from ds_lvxattn.plan.layer_plan import PlanSettings, plan_layers
from ds_lvxattn.plan.planner import Plan
from ds_lvxattn.plan.profile import profile_for_device
from ds_lvxattn.training import checkpoint
from ds_lvxattn.training.answers import evaluate_answers
from ds_lvxattn.training.attach import Attached
from ds_lvxattn.training.best import Best
from ds_lvxattn.training.divergence import FiniteLoss
from ds_lvxattn.training.engine import start_engine
from ds_lvxattn.training.evaluation import evaluate
from ds_lvxattn.training.hub import push
from ds_lvxattn.training.learning import Learning
from ds_lvxattn.training.loading import LoadedModel
from ds_lvxattn.training.lora import has_adapters, merged, save_adapter
from ds_lvxattn.training.order import Order
from ds_lvxattn.training.phases import begin
from ds_lvxattn.training.plan_times import PlanTimes
from ds_lvxattn.training.provenance import write_provenance
from ds_lvxattn.training.run_folder import RunFolder
from ds_lvxattn.training.run_log import RunLog
from ds_lvxattn.training.settings import FinetuningConfig
from ds_lvxattn.training.tokens import counted_step
from ds_lvxattn.training.watchdog import Watchdog, group_timeout


@dataclass(frozen=True)
class Job:
    """A fine-tuning run.

    Attributes:
        ds_config: the DeepSpeed config.
        parallel: its sequence-parallel settings.
        finetuning: the loop's settings.
        loaded: the model and what its data needs; trainable parameters are chosen.
        train, evaluation: the datasets; no evaluation when None.
        steps: optimizer steps.
        seed: of the data order.
        output_dir: where everything is written.
        resume: go on from the newest whole checkpoint there.
        new_data: whether that checkpoint may be of a run on other rows; the order goes on at the steps' place in these.
        watchdog: is told what this rank does.
    """

    ds_config: dict[str, Any]
    parallel: SequenceParallelConfig
    finetuning: FinetuningConfig
    loaded: LoadedModel
    train: SampleSource
    evaluation: SampleSource | None
    steps: int
    seed: int
    output_dir: Path
    resume: bool
    watchdog: Watchdog = field(default_factory=Watchdog)
    new_data: bool = False


class Trainer:
    """Runs a ``Job``. All ranks make it and call ``run``.

    Raises:
        ConfigError: settings that cannot work, on every rank.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.watchdog = job, job.watchdog
        config = job.parallel
        self.groups = SequenceParallelGroups(config.size)
        self.everyone = dist.new_group(backend="gloo")  # for host messages of the main thread
        first = dist.get_rank() == 0
        self.folder = on_all_ranks(lambda: RunFolder(job.output_dir) if first else None, self.everyone)
        try:
            self._prepare(config)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another run have the output folder."""
        if self.folder is not None:
            self.folder.close()

    def _prepare(self, config: SequenceParallelConfig) -> None:
        job = self.job
        if not job.resume:
            on_all_ranks(lambda: checkpoint.check_fresh(job.output_dir), self.everyone)
        begin(self.watchdog, "starting DeepSpeed")
        model = job.loaded.model
        self.device = torch.device(get_accelerator().current_device_name())
        self.attached = attached = Attached(
            job.loaded, job.ds_config, config, self.groups, self.device,
            limits=job.finetuning.frame_limits, packing=job.finetuning.packing,
        )  # fmt: skip
        self.parallel, self.batches, self.loss_factor = attached.parallel, attached.batches, attached.loss_factor
        self.engine = start_engine(**attached.engine_arguments())
        facts = checkpoint.RunFacts(
            dist.get_world_size(),
            self.engine.zero_optimization_stage(),
            self.engine.train_batch_size(),
            job.seed,
            config.size,
            checkpoint.parameter_digest(model),
            job.train.digest,
        )
        self.checkpoints = checkpoint.Checkpoints(
            self.engine, job.output_dir, facts, self.everyone, self.watchdog.tick, job.new_data, has_adapters(model),
            job.finetuning.keep_last,
        )  # fmt: skip
        self.order = Order(
            job.train, self.engine.train_micro_batch_size_per_gpu(),
            self.groups.get_data_parallel_rank(), self.groups.get_data_parallel_world_size(),
        )  # fmt: skip
        self.learning = Learning(job.finetuning.max_bad_share, job.steps)
        self.skipped = 0  # broken samples of this rank's group, since the start
        self.loader = self._loader(job.train)
        self.evaluation_loader = None if job.evaluation is None else self._loader(job.evaluation)
        set_timeouts(group_timeout(job.finetuning.timeout_s))

    def _loader(self, source: SampleSource) -> Loader:
        control = ControlGroups.beside(self.groups)
        settings = self.job.finetuning
        skip = settings.on_bad_sample == "skip"
        # A step wants all its micro-batches at once.
        ahead = max(settings.look_ahead, self.engine.gradient_accumulation_steps())
        return Loader(source, self.batches, control, skip, ahead, settings.decode_workers)

    def run(self) -> dict[str, Any]:
        """Train to the last step, evaluate, save and export. Returns the evaluation."""
        try:
            result = self._run()
        finally:
            self.close()
        # Not after an error: the loader's thread may be waiting for other ranks.
        for loader in (self.loader, self.evaluation_loader):
            if loader is not None and loader.control is not None:
                loader.control.close()
        dist.destroy_process_group(self.everyone)
        self.attached.close()
        return result

    def _run(self) -> dict[str, Any]:
        job, every = self.job, self.job.finetuning
        done = None
        if job.resume:
            begin(self.watchdog, "loading the checkpoint")
            done = self.checkpoints.resume()
        begun = done or 0
        if begun > job.steps:
            raise ConfigError(f"--resume: the checkpoint is at step {begun} already; give --steps {begun} or more")
        # Every rank has loaded: from here on what is there is replaced.
        log = RunLog(
            job.output_dir, dist.get_rank(), job.steps, job.ds_config, done, every.report_to, self.checkpoints.metrics
        )  # fmt: skip
        if dist.get_rank() == 0:
            write_provenance(job.output_dir, job.ds_config, job.seed, job.steps, dist.get_world_size())
        best = gather(Best.read(job.output_dir, begun), self.everyone)[0]
        finite = FiniteLoss(self.checkpoints.newest)
        accumulation = self.engine.gradient_accumulation_steps()
        try:
            begin(self.watchdog, "loading the first batch")
            # A run that has its last step behind it plans for that one, to evaluate.
            start = min(begun, job.steps - 1) * accumulation
            batches = self.loader.stream(self.order.rows, start, job.steps * accumulation)
            first = next(batches)
            begin(self.watchdog, "planning")
            self.plan_times = PlanTimes(self.batches, self.device, log.plan)
            self.plan_times.start(self._make_plan(log, first), begun + 1)
            batches = itertools.chain((first,), batches)
            step, result = begun, {}
            for step in range(begun + 1, job.steps + 1):
                self.watchdog.enter(f"step {step}")
                self.plan_times.start_step(step)
                metrics = self._step(batches, accumulation)
                log.step({"step": step, **metrics})
                self.learning.note_gradient(step, metrics["grad_norm"])
                last = step == job.steps
                norm = metrics["grad_norm"] if self.batches.collator.dtype == torch.float32 else None
                finite.note(step, metrics["loss"], norm, last)
                saved = last or bool(every.save_every and step % every.save_every == 0)
                if saved:
                    self._save(log, step, finite.finite, best)
                if not (last or (every.eval_every and step % every.eval_every == 0)):
                    continue
                result = self._evaluate(log, step)
                better = bool(result) and best.note(step, result["loss"])
                ends = bool(every.patience) and best.since >= every.patience
                if (ends or (better and every.keep_best)) and not saved:
                    self._save(log, step, finite.finite, best)
                if dist.get_rank() == 0:
                    best.write(job.output_dir)
                if ends and not last:
                    log.say(f"step {step}: {best.since} evaluations without a lower loss than that of step {best.step}")
                    break
            if not result:
                result = self._evaluate(log, job.steps)  # of a run that had its last step behind it
            if every.keep_best and best.step not in (0, step):
                begin(self.watchdog, f"loading the checkpoint of step {best.step}")
                self.checkpoints.load_step(best.step)
                log.say(f"exporting the model of step {best.step}, whose evaluation was the best")
            self._export(log)
        finally:
            log.close()
        return result

    def _make_plan(self, log: RunLog, first: Loaded) -> Plan:
        """Choose the strategies for batches like the first one; empty where ranks share no samples."""
        collator, planner, model = self.batches.collator, self.batches.planner, self.job.loaded.model
        if self.parallel is None or planner is None:
            layers = collator.family.attention_layers(model).values()
            log.plan(plan_layers(list(layers), {}, profile_for_device(self.device.type), PlanSettings(), ranks=1))
            return ()
        if self.attached.calibrates:
            begin(self.watchdog, "measuring the machine for the plan, unless an earlier run did")
            self.attached.calibrate()
        plan = planner.start(collator.sizes(first.layout))
        memory = self.attached.plan_memory(first)
        assert memory is not None
        log.zero = memory.zero
        log.plan(plan)
        log.memory(memory)
        return plan

    def _step(self, batches: Iterator[Loaded], accumulation: int) -> dict[str, Any]:
        """One optimizer step; its metrics."""
        if self.parallel:
            self.parallel.comm.reset()
        began = time.perf_counter()
        total = torch.zeros((), device=self.device)
        text_tokens = frames = 0
        rate = self.engine.get_lr()[0]
        # All micro-batches of the step: their tokens are counted ahead of it.
        loaded_now = [self._next(batches) for _ in range(accumulation)]
        micro_batches, counts = counted_step(loaded_now, self.groups, self.everyone)
        waited = time.perf_counter() - began
        self.learning.note_samples(counts)
        self.skipped += sum(loaded.skipped for loaded in micro_batches)
        for loaded in micro_batches:
            self.watchdog.tick()
            batch = self.plan_times.prepare(loaded)
            loss = self.attached.begin_backward(self.engine(**batch.inputs).loss, loaded.mixed)
            self.engine.backward(loss * self.loss_factor)
            self.engine.step()
            total += loss.detach()
            text_tokens += batch.text_tokens
            frames += batch.frames
        # The parts of a group add up to its loss; groups and micro-batches are averaged, as ZeRO does with gradients.
        dist.all_reduce(total)
        data_ranks = self.groups.get_data_parallel_world_size()
        value = total.item() / (accumulation * data_ranks)
        seconds = time.perf_counter() - began
        norm = self.engine.get_global_grad_norm()
        return {
            "loss": value,
            "grad_norm": float(norm) if norm is not None else None,
            "lr": rate,
            "step_time_s": seconds,
            "data_wait_s": waited,
            "text_tokens_per_s": text_tokens * data_ranks / seconds,
            "frames_per_s": frames * data_ranks / seconds,
            "comm_bytes": self.parallel.comm.bytes_received if self.parallel else 0,
            "comm_bytes_between_nodes": self.parallel.comm.bytes_between_nodes if self.parallel else 0,
            "peak_memory_bytes": peak_memory(),
            "skipped_samples": self.skipped,
        }

    def _next(self, batches: Iterator[Loaded]) -> Loaded:
        self.watchdog.tick()
        return next(batches)

    def _save(self, log: RunLog, step: int, finite: bool, best: Best) -> None:
        if not finite:
            log.say(f"no checkpoint of step {step}: its loss or gradients are not finite")
            return
        begin(self.watchdog, f"saving the checkpoint of step {step}")
        log.sync()
        self.checkpoints.save(step, best.step if self.job.finetuning.keep_best else 0)

    def _evaluate(self, log: RunLog, step: int) -> dict[str, Any]:
        loader = self.evaluation_loader
        if loader is None or not len(loader.source):
            return {}
        micro_batch = self.engine.train_micro_batch_size_per_gpu()
        begin(self.watchdog, f"evaluating after step {step}")
        result = evaluate(self.engine, loader, self.groups, micro_batch, self.watchdog.tick)
        if new_tokens := self.job.finetuning.eval_new_tokens:
            result |= evaluate_answers(
                self.engine.module, self.batches, loader.source, self.job.loaded.tokenizer, self.groups, new_tokens,
                self.watchdog.tick,
            )  # fmt: skip
        log.evaluation(step, result)
        return result

    def _export(self, log: RunLog) -> None:
        """``model/``; with adapters ``adapter/``, and ``model/`` where they are merged. Then the hub, if asked for."""
        begin(self.watchdog, "exporting the model")
        job, first, lora = self.job, dist.get_rank() == 0, self.job.finetuning.lora
        model = job.loaded.model
        state = checkpoint.full_state_dict(self.engine, trained_only=lora is not None and not lora.merge)
        writers: dict[str, Callable[[Path], None]] = {}
        if lora is not None:
            writers["adapter"] = lambda folder: save_adapter(model, state, folder)
        if lora is None or lora.merge:
            writers["model"] = lambda folder: job.loaded.save(folder, merged(model, state) if lora else state)
        for name, write in writers.items():
            make = functools.partial(checkpoint.export, job.output_dir, name, write)
            folder = on_all_ranks(make if first else lambda: None, self.everyone)
            log.say(f"{name} saved in {folder}")
            if folder is not None and job.finetuning.push_to_hub:
                # Beside merged weights, an adapter at the top would be added to them a second time by whoever loads.
                inside = name if len(writers) > 1 and name == "adapter" else ""
                log.say(push(folder, job.finetuning.push_to_hub, inside))


def peak_memory() -> int:
    """Peak bytes: of the accelerator's allocator, or on a CPU the process's resident set."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return accelerator.max_memory_allocated()
