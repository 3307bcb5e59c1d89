"""What the thinkers of Qwen2.5-Omni and Qwen3-Omni have in common: the part of those models that reads and writes text.

They take images and videos as Qwen's other models do, and audio, which this package does not: the audio encoder stays
as it is. A checkpoint may be of the thinker, or of the whole model, of which the thinker is loaded.

Rotary positions are those of Qwen's other models, but that text goes on behind the time of a video too, and that time
is counted in ``position_id_per_seconds``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ds_lvxattn.data.sample import FrameShape, FrameSize, Part, Sample, SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.family import FrameLimits
from ds_lvxattn.families.qwen_vl import QwenVL
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.kept_parameters import UNUSED
from ds_lvxattn.runtime.recompute import Recomputation

logger = logging.getLogger(__name__)


class Thinker(QwenVL):
    """A thinker; see ``QwenVL``.

    Attributes:
        audio_attention: the class of its audio encoder's attention.
        whole_config: of the models that it is a part of.
        audio_token: the token that stands for audio in the text.
        position_type: dtype of position ids.
    """

    audio_attention: type[nn.Module]
    whole_config: type[PreTrainedConfig]
    audio_token: str
    position_type: type[np.int64] | type[np.float32]

    def __init__(self, config: Any) -> None:
        self._of_whole = isinstance(config, self.whole_config)
        super().__init__(config.thinker_config if self._of_whole else config)

    @classmethod
    def has_config(cls, config: Any) -> bool:
        return super().has_config(config) or isinstance(config, cls.whole_config)

    # Modules

    def is_local(self, module: nn.Module) -> bool:
        return super().is_local(module) or isinstance(module, self.audio_attention)

    def attention_layers(self, model: nn.Module) -> dict[nn.Module, AttentionLayer]:
        """See ``Family``. The audio encoder computes nothing here.

        Raises:
            ConfigError: a release of transformers whose model is made in another way.
        """
        _check_release(self.model_class)
        layers = super().attention_layers(model)
        return {module: layer for module, layer in layers.items() if not isinstance(module, self.audio_attention)}

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        super().install_hooks(model, recomputation)
        self.fit_unattached(model)

    def fit_unattached(self, model: nn.Module) -> None:
        """Freeze the audio encoder: what gets no gradient would still decay in ZeRO's partitions."""
        ears = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "audio_tower"]
        parameters = [parameter for part in ears for parameter in part.parameters()]
        if any(parameter.requires_grad for parameter in parameters):
            logger.warning("%s: the audio encoder does not train, as no audio reaches it", self.name)
        for parameter in parameters:
            parameter.requires_grad_(False)
            setattr(parameter, UNUSED, True)

    def load_model(self, name: str, dtype: torch.dtype) -> PreTrainedModel:
        _check_release(self.model_class)
        config: Any = self.config  # of the thinker, whatever the checkpoint is of
        if self._of_whole:
            logger.warning(
                "%s: the thinker alone of the whole %s is loaded, trained and saved; its other parts stay as they are",
                name,
                self.name,
            )
        made: PreTrainedModel = self.model_class.from_pretrained(name, config=config, dtype=dtype)
        return made

    # Text

    def write(self, text: str, sizes: Sequence[FrameSize], processor: Any, limits: FrameLimits) -> str:
        if self.audio_token in text:
            raise SampleError(
                f"the text holds {self.audio_token!r}, which stands for audio, and there is none here; leave it out"
            )
        return super().write(text, sizes, processor, limits)

    def told(self, shapes: list[FrameShape], sample: Sample, processor: Any) -> list[FrameShape]:
        audio = self.config.audio_token_id
        if audio in sample.input_ids:
            raise SampleError(f"{sample.name} holds the token of audio ({audio}), and there is none here; leave it out")
        return super().told(shapes, sample, processor)

    def time_of(self, part: Part) -> float | None:
        # In float32, as the model multiplies.
        per_second = np.float32(self.config.position_id_per_seconds)
        return float(self.position_type(np.float32(part.number) * np.float32(part.seconds) * per_second))

    def positions(self, visual: np.ndarray, shapes: Sequence[FrameShape]) -> np.ndarray:
        """``position_type`` ``[3, S]``; see ``Family``. Rounded where the model rounds, one video after another."""
        one: Any = self.position_type(1)
        merge = self.config.vision_config.spatial_merge_size
        made = np.empty((3, len(visual)), dtype=self.position_type)
        rows = np.flatnonzero(visual >= 0)
        done, at = 0, 0  # rows and visual tokens that have their positions
        first = free = one - one  # of the picture at hand; the next one behind what has been placed

        def place_text(stop: int) -> None:
            """A row that ends what is ahead, and those that go on behind it."""
            nonlocal done, free
            if stop > done:
                behind = free + one + np.arange(stop - done - 1, dtype=self.position_type)
                made[:, done], made[:, done + 1 : stop] = free, behind
                done, free = stop, (behind[-1] if len(behind) else free) + one

        for shape in shapes:
            place_text(int(rows[at]))
            if shape.time is None:
                first = free
            columns = self.position_type(shape.grid[1] // merge)
            row, column = np.divmod(np.arange(shape.tokens, dtype=self.position_type), columns)
            time = self.position_type(shape.time or 0)
            part = slice(done, done + shape.tokens)
            made[:, part] = first + np.stack(np.broadcast_arrays(time, row, column))
            done, at = done + shape.tokens, at + shape.tokens
            free = max(free, made[:, part].max() + one)
        place_text(len(visual))
        return made

    def prompt_arguments(self, positions: np.ndarray) -> Mapping[str, Tensor]:
        made = super().prompt_arguments(positions)
        return {key: x.to(torch.from_numpy(positions).dtype) for key, x in made.items()}

    # Videos

    def load_processor(self, name: str) -> Any:
        """That of a path. transformers' whole processor has limits of a frame of its own, which hold where the file of
        the video processor has larger ones."""
        made = super().load_processor(name)
        _, own = self.video_processor
        if made.video.settings["size"]["longest_edge"] <= own["longest_edge"]:
            return made
        return made.with_video(made.video.with_settings(size=own))


def _check_release(kind: type[PreTrainedModel]) -> None:
    """Refuse the models of transformers before 5.21, whose vision encoder is beside the module that reads its tokens.

    Raises:
        ConfigError: saying so.
    """
    if kind.base_model_prefix == "thinker":
        raise ConfigError(
            f"{kind.__name__} of this release of transformers is made in another way, in which it does not train here; "
            "install transformers 5.21 or newer"
        )
