"""From samples to the model's arguments in one place: layout, the rank's frames, the plan, the micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_lvxattn.batches.collate import Collator, Division, MicroBatch, Pixels, Vocabulary
from ds_lvxattn.batches.layout import BatchLayout
from ds_lvxattn.batches.planning import planner_for
from ds_lvxattn.batches.sequence_parallel import SequenceParallel
from ds_lvxattn.data.sample import Sample
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import VisualFamily, family_of, unwrapped
from ds_lvxattn.families.family import ANY_SIZE, FrameLimits
from ds_lvxattn.families.processors import ChannelsLast
from ds_lvxattn.plan.layer_plan import LayerPlan
from ds_lvxattn.plan.planner import BatchSizes, Plan, Planner
from ds_lvxattn.runtime.layer_times import LayerTimes
from ds_lvxattn.runtime.zero3 import is_partitioned

# What to do about images that only some ranks have.
IMAGES_EVERYWHERE = (
    "Set 'finetuning.packing' (in a loop of your own, attach(packing=...)) or 'sequence_parallel_size' (above 1), with "
    "which a rank without images encodes a blank one, or leave rows of text out"
)


@dataclass(frozen=True)
class Loaded:
    """Samples, their layout and the frames that this rank decoded, as pixels; ``skipped`` of them were replaced.

    ``portions`` is that of the layouts of all groups: all ranks call the vision encoder equally often, since
    ZeRO-3 gathers its parameters over all of them. ``tokens`` is what its loss is divided by, so that those of all
    micro-batches of a step average to the step's loss a token; None: its own supervised tokens. ``mixed``: some groups
    have images in this micro-batch of theirs, and others have none.
    """

    layout: BatchLayout
    pixels: Pixels
    skipped: int
    portions: int
    tokens: Tensor | float | None = None
    mixed: bool = False


class Batches:
    """Makes the micro-batches of one model.

    Args:
        model: a transformers model of a known family.
        processor: its image processor.
        pad_token: token id behind the end of a sample.
        image_id: token id of a frame.
        device, dtype: of the model's arguments.
        parallel: its sequence parallelism; None: the unmodified model.
        limits: how large frames may be.
        packing: tokens of a row of a micro-batch that samples share; None: each has a row of its own.

    Attributes:
        collator: makes arguments of samples.
        planner: plans the attached model; None for the unmodified one.
        skips_encoder: whether the model does not call its vision encoder for a micro-batch without images: it is the
            unmodified one.

    Raises:
        ConfigError: on every rank, when the kernel that is set cannot run a layer, or the model does not follow what
            ``limits`` sets, or has no embedding of the padding token.
        ValueError: packing of the unmodified model, whose attention would not keep samples apart.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        pad_token: int,
        image_id: int,
        device: torch.device,
        dtype: torch.dtype,
        parallel: SequenceParallel | None,
        limits: FrameLimits = ANY_SIZE,
        packing: int | None = None,
    ) -> None:
        self.parallel, self.packing = parallel, packing
        if packing is not None and parallel is None:
            raise ValueError("packing is of attached models: the unmodified one would mix the samples of a row")
        family = family_of(model)
        if isinstance(family, VisualFamily):
            family.refuse_unheeded(processor, limits)
            if parallel is None:
                family.fit_unattached(unwrapped(model))
        processor = ChannelsLast(processor)
        division: Division | None = None
        self.planner: Planner | None = None
        if parallel is not None:
            self.planner = planner_for(parallel, device, dtype)
            config = parallel.config
            division = Division(parallel.comm, config.placement, parallel.limits, config.kernel)
        vocabulary = Vocabulary.of(unwrapped(model))
        if vocabulary.embeddings is not None and pad_token >= vocabulary.embeddings:
            raise ConfigError(
                f"the tokenizer's padding token has the id {pad_token}, and the model {vocabulary.embeddings} "
                "embeddings, so a rank with a row that is padded would fail alone: call "
                "model.resize_token_embeddings(len(tokenizer)), or set tokenizer.pad_token to one that the model knows"
            )
        self.collator = Collator(family, processor, pad_token, image_id, device, dtype, division, limits, vocabulary)
        self.skips_encoder = parallel is None and isinstance(family, VisualFamily) and not family.needs_frames
        self._model = model
        self._plan: Plan = ()
        self._plans: Mapping[nn.Module, LayerPlan] = {}

    def layout(self, samples: Sequence[Sample]) -> BatchLayout:
        """Where ``samples`` lie; a small batch, or the text alone, on a single rank, where every rank is to compute all
        of it.

        Raises:
            ConfigError: the text is to be copied, and copies would drop out differently.
        """
        divided = self.collator.layout(samples, self.packing)
        if self.planner is None or divided.text.ranks == 1:
            return divided
        sizes = self.collator.sizes(divided)
        if self.planner.undivided(sizes):
            return self.collator.undivided_layout(samples, self.packing)
        return self.collator.frames_layout(samples, self.packing) if self._copies_text(sizes) else divided

    def _copies_text(self, sizes: BatchSizes) -> bool:
        """Whether every rank is to have all of the text: not where copies of a row would drop out differently, whose
        partial attentions would then be of different queries.

        Raises:
            ConfigError: the config wants them.
        """
        assert self.parallel is not None and self.planner is not None
        if not self.planner.copies_text(sizes):
            return False
        if self.parallel.draws is not None and self.parallel.config.text == "replicated":
            raise ConfigError(
                f"'sequence_parallel.text' is 'replicated', and the text has {self.parallel.draws}, so that the "
                "copies of a row would no longer be the same: set it to 'auto' or 'divided', or the rate to 0"
            )
        return self.parallel.draws is None

    def plans(self, layout: BatchLayout) -> Mapping[nn.Module, LayerPlan]:
        """What each attention module runs a batch with, planned now if it is of a class of sizes without a plan.

        Every rank of the group calls it for the same batches in the same order; see ``Planner.follow``.
        """
        if self.planner is None:
            return {}
        assert self.parallel is not None
        plan = self.planner.follow(self.collator.sizes(layout))
        if plan is not self._plan:
            self._plan, self._plans = plan, dict(zip(self.parallel.layers, plan, strict=True))
        return self._plans

    def load(self, samples: Sequence[Sample], layout: BatchLayout | None = None) -> Loaded:
        """Decode the frames that lie on this rank, where ``samples`` are the batch of the only group of a run.

        Args:
            layout: None: ``layout(samples)``.

        Raises:
            SampleError: on this rank alone, when frames of a sample cannot be decoded on it; a ``Loader`` has one
                verdict for all ranks.
        """
        layout = layout or self.layout(samples)
        pixels = self.collator.pixels(layout, self.collator.load(samples, layout))
        return Loaded(layout, pixels, 0, layout.portions)

    def prepare(self, batch: Loaded | Sequence[Sample], times: LayerTimes | None = None) -> MicroBatch:
        """This rank's micro-batch, planned for; every rank of the group calls it for the same batches.

        Args:
            batch: what a ``Loader`` or ``load`` loaded, or samples for ``load``.
            times: measures the attention layers; None: nothing is measured.

        Raises:
            ConfigError: on all ranks, where only some have images, the model skips its vision encoder on the others,
                and ZeRO-3 gathers the parameters of a module on all of them together.
        """
        if not isinstance(batch, Loaded):
            batch = self.load(batch)
        if batch.mixed and self.skips_encoder and is_partitioned(self._model):
            raise ConfigError(
                f"only some of the {dist.get_world_size()} ranks have images in a micro-batch: the unmodified model "
                "does not call its vision encoder for text alone, and ZeRO-3, which gathers a module on all ranks "
                f"together, would wait for ever. {IMAGES_EVERYWHERE}"
            )
        plans = self.plans(batch.layout)
        return self.collator.collate(batch.layout, batch.pixels, plans, batch.portions, times, batch.tokens)

    def note_times(self, plan: Plan, times: LayerTimes) -> Plan:
        """``plan``, one of the planner's, with what was measured."""
        assert self.parallel is not None and self.planner is not None
        layers = self.parallel.layers
        return self.planner.note_times(
            plan, {layers[module].name: took for module, took in times.milliseconds().items()}
        )
