"""What models have in common that put the visual tokens of a frame into the text, under plain causal self-attention."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ds_lvxattn.data.sample import FrameShape
from ds_lvxattn.families.family import Family, VisualFamily
from ds_lvxattn.families.handed_on import hand_down
from ds_lvxattn.families.mixers import divide, mixers
from ds_lvxattn.families.rotary import (
    self_attention_chunk,
    self_attention_role,
    self_attention_sizes,
    self_attention_window,
)
from ds_lvxattn.families.text_only import OBSTACLES, causality, refuse
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation


class Concatenation(VisualFamily):
    """A family whose text holds the visual tokens; see ``VisualFamily``.

    Each rank encodes its own frames; their features then go to the ranks that hold their rows (``VisualRows``). The
    model gets embeddings in the place of token ids and pixels.

    Attributes:
        inner: name of the module inside the model for conditional generation, whose ``inputs_embeds`` the rows are.
        pixel_arguments: names of the model's pixel arguments.
        trained: what trains by default (``trainable_by_default``), beside a head of its own.
    """

    attention_config = "text_config"
    keys_in_text = True
    inner = "model"
    pixel_arguments: tuple[str, ...] = ("pixel_values",)
    trained: tuple[str, ...] = ("*language_model.*", "*multi_modal_projector.*")

    @abstractmethod
    def is_local(self, module: nn.Module) -> bool:
        """Whether a module is an attention of the vision encoder."""

    @abstractmethod
    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        """Visual tokens ``[f, tokens, d]`` or ``[tokens, d]`` of the rank's ``f`` frames.

        Args:
            model: the module inside the model for conditional generation.
            pixels: ``[f, ...]``, its ``pixel_arguments``.
            batch: says what they are and in how many portions they are encoded.
            recomputation: see ``encode_in_portions``.
        """

    def placed(self, text: Tensor, visual: Tensor, batch: SequenceParallelBatch) -> Mapping[str, Any]:
        """Arguments of the module inside the model: embeddings of the rank's rows, visual tokens in their places.

        Args:
            text: ``[B, s, d]``, embeddings of the rows.
            visual: what ``encode`` gave.
        """
        assert batch.visual_rows is not None
        return {"inputs_embeds": batch.visual_rows.place(text, visual, batch.comm)}

    def encoded(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        """``encode``, whose tokens are those that the layout has rows for.

        Raises:
            ValueError: they are more or fewer.
        """
        visual = self.encode(model, pixels, batch, recomputation)
        made, wanted = visual.shape[:-1].numel(), sum(shape.tokens for shape in batch.shapes)
        if made != wanted:
            raise ValueError(
                f"{self.name}: {type(self).__name__}.encode made {made} visual tokens of {len(batch.shapes)} frames, "
                f"for which frame_tokens or shape_of promise {wanted}; they belong to family_of(model), the first of "
                "FAMILIES that has such a model"
            )
        return visual

    def role_of(self, module: nn.Module) -> str | None:
        return "local" if self.is_local(module) else self_attention_role(module)

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        return super().sizes_of(module) if self.is_local(module) else self_attention_sizes(module)

    def window_of(self, module: Any) -> int | None:
        return None if self.is_local(module) else self_attention_window(module)

    def chunk_of(self, module: Any) -> int | None:
        return None if self.is_local(module) else self_attention_chunk(module)

    def attention_layers(self, model: Any) -> dict[nn.Module, AttentionLayer]:
        """See ``Family``. A text that would be computed wrongly is refused with the reason, in whichever model."""
        blocks = type(self).blocks is not Family.blocks
        refuse(model, (hinders(model.get_decoder()) for hinders in OBSTACLES if not (blocks and hinders is causality)))
        return super().attention_layers(model)

    def reach_attention(self, model: nn.Module) -> None:
        divide(model)

    def mixers(self, model: nn.Module) -> dict[nn.Module, AttentionLayer]:
        return mixers(model)

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        module: Any
        for module in model.modules():
            if getattr(module, "use_head", False):
                # Of a vision tower: what its head pools goes nowhere, and ZeRO-3 could not compute it, as it takes
                # weights past their module.
                module.use_head = False
        hand_down(model, self.role_of)
        hook = functools.partial(embed_rows, self, recomputation)
        model.get_submodule(self.inner).register_forward_pre_hook(hook, with_kwargs=True)

    def trainable_by_default(self) -> tuple[str, ...]:
        # A head that shares the weights of the embedding is no parameter of its own.
        head = () if self.config.tie_word_embeddings else ("*lm_head.*",)
        return (*self.trained, *head)

    def pad_tiles(self, pixels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {key: x[0] for key, x in pixels.items()}

    def dense_mask(
        self, ranges: Sequence[Sequence[tuple[int, int]]], shapes: Sequence[Sequence[FrameShape]]
    ) -> Mapping[str, Tensor]:
        return {}  # causal


def embed_rows(
    family: Concatenation,
    recomputation: Recomputation,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Before the model: embeddings of the rank's rows, with the visual tokens of all ranks in their places."""
    batch: SequenceParallelBatch | None = kwargs.get("sequence_parallel")
    if batch is None or not batch.brings_frames:  # a new token is text
        return None
    model: Any = module
    rest = dict(kwargs)
    missing = [name for name in ("input_ids", *family.pixel_arguments) if rest.get(name) is None]
    if missing:
        raise ValueError(
            f"{missing} are missing beside sequence_parallel: {family.name} puts visual tokens among the embeddings of "
            "the rank's rows here; pass the batch's inputs as they are, and no inputs_embeds"
        )
    pixels = [rest.pop(name)[0] for name in family.pixel_arguments]
    visual = family.encoded(model, pixels, batch, recomputation)
    text = model.get_input_embeddings()(rest.pop("input_ids"))
    return args, {**rest, **family.placed(text, visual, batch)}
