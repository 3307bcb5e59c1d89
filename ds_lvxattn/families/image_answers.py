"""What ``get_image_features`` of an attached model answers: the visual tokens of the rank's own rows.

Each rank encodes its own frames in portions, by the model's own function, and the tokens go to the ranks that hold
their rows. The function of the instance is replaced, and not the model's forward, see ``image_features.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ds_lvxattn.data.sample import FrameShape
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.frames import encode_in_portions
from ds_lvxattn.families.image_obstacles import INDICATORS, indicators_of
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

Portion = Callable[[Mapping[str, Tensor], Sequence[FrameShape], int, int], Mapping[str, Tensor]]


class Asked:
    """``get_image_features`` of a model that is attached: the visual tokens of the rank's own rows, in their order.

    Args:
        family: the model's family.
        inner: the module inside the model for conditional generation.
        recomputation: see ``encode_in_portions``.
        portion: see ``ImageFeatures``.
    """

    def __init__(self, family: Concatenation, inner: Any, recomputation: Recomputation, portion: Portion) -> None:
        self.family, self.inner, self.recomputation, self.portion = family, inner, recomputation, portion
        self.features = inner.get_image_features
        self.names = inspect.signature(self.features).parameters
        self.indicators = indicators_of(family.config)
        self.batch: SequenceParallelBatch | None = None
        self.pixels: dict[str, Tensor] = {}
        inner.register_forward_pre_hook(self.take, with_kwargs=True)
        inner.get_image_features = self.answer

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model: note the batch, which its forward does not hand on."""
        batch: SequenceParallelBatch | None = kwargs.get("sequence_parallel")
        if batch is None or not batch.brings_frames:
            self.batch = None
            return None
        known = [key for key in self.names if isinstance(kwargs.get(key), (Tensor, np.ndarray))]
        given = {key: torch.as_tensor(kwargs[key][0]) for key in known}
        self.batch, self.pixels = batch, given
        return args, {**kwargs, **given}

    def answer(self, *args: Any, **options: Any) -> Any:
        """What the model's forward gets when it asks for the visual tokens of its text."""
        if self.batch is None:
            return self.features(*args, **options)
        (batch, self.batch), (pixels, self.pixels) = (self.batch, None), (self.pixels, {})
        parts = visual_parts(self.inner)
        encoders = [part for part in parts if any(map(self.family.is_local, part.modules()))]
        needed = {key: x for key, x in self._needed(args, options).items() if key not in pixels}
        form: list[Any] = []
        tokens = encode_in_portions(
            _holder(self.inner, parts),
            functools.partial(self._portion, pixels, needed, form, batch.shapes),
            [torch.arange(len(batch.shapes))],  # on the host: which frames a portion has
            batch,
            # What projects the output of a frozen encoder keeps little; the encoder need not run twice for it.
            self.recomputation if any(p.requires_grad for e in encoders for p in e.parameters()) else None,
            ragged=True,
            behind=self.indicators,
        )
        if self.indicators:
            tokens, indicators = tokens.split([len(tokens) - self.indicators, self.indicators])
        assert batch.visual_rows is not None
        in_rows = batch.visual_rows.fetch(tokens, batch.comm)
        name, listed, dimensions = form[0]
        in_rows = in_rows[(None,) * (dimensions - 2)]
        answer: Any = {name: [in_rows] if listed else in_rows}
        output = BaseModelOutputWithPooling(**answer)
        if self.indicators:
            setattr(output, INDICATORS, indicators)
        return output

    def _needed(self, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        """What the forward asks with that has no default."""
        given = inspect.signature(self.features).bind(*args, **options).arguments
        wanted = (key for key, x in self.names.items() if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD)
        return {key: given[key] for key in wanted}

    def _portion(
        self,
        pixels: Mapping[str, Tensor],
        needed: Mapping[str, Any],
        form: list[Any],
        of_rank: Sequence[FrameShape],
        frames: Tensor,
        shapes: Sequence[FrameShape],
    ) -> Tensor:
        """The visual tokens of some of the rank's frames, ``[tokens, d]``; notes in what form the model gives them."""
        first, last = int(frames[0]), int(frames[-1]) + 1
        given = self.portion(pixels, of_rank, first, last)
        made = self.features(**needed, **given, return_dict=True)
        # Where the forward projects them itself, they are the encoder's (Llama 4).
        name = "last_hidden_state" if made.pooler_output is None else "pooler_output"
        features: Any = getattr(made, name)
        listed = isinstance(features, (list, tuple))
        parts = features if listed else [features]
        form[:] = [(name, listed, parts[0].dim())]
        tokens = torch.cat([part.flatten(0, -2) for part in parts])
        wanted = sum(shape.tokens for shape in shapes)
        if len(tokens) != wanted:
            raise ValueError(
                f"{type(self.inner).__name__} makes {len(tokens)} visual tokens of pictures whose text has {wanted}; "
                "its processor and its config do not fit together"
            )
        if self.indicators and last == len(of_rank):
            # Beside the tokens, so that every rank's backward pass goes through the same modules.
            tokens = torch.cat((tokens, getattr(made, INDICATORS)))
        return tokens


def visual_parts(inner: Any) -> list[nn.Module]:
    """The parts of a model beside its language model."""
    decoder = inner.get_decoder()
    return [part for part in inner.children() if decoder not in part.modules()]


def _holder(inner: nn.Module, parts: Sequence[nn.Module]) -> nn.Module:
    """A module with the parameters of ``parts`` and with those of ``inner`` itself."""
    holder = nn.ModuleList(parts)
    for name, parameter in inner.named_parameters(recurse=False):
        holder.register_parameter(name, parameter)
    return holder
