"""The ``finetuning`` block of a DeepSpeed config: what the loop needs beside DeepSpeed's own settings."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ConfigDict, Field, ValidationError

from ds_lvxattn.data.media import DEFAULT_LIMITS
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.family import FrameLimits

BLOCK_KEY = "finetuning"


class LoraSettings(DeepSpeedConfigModel):
    """Keys of the block ``lora`` inside it: low-rank adapters train instead of the model's own weights.

    Attributes:
        r: rank of the adapters.
        alpha: ``alpha / r`` multiplies what they add.
        dropout: of their input.
        target_modules: linear layers by the end of their names, or one regular expression over whole names.
        merge: add the adapters to the weights at the end, and write ``model/`` too.
        bits: 4 holds the model's linear layers in 4 bits (QLoRA), by bitsandbytes; None: as they are.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    r: int = Field(8, ge=1, le=1 << 16)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str = Field(["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)
    merge: bool = False
    bits: Literal[4] | None = None

    def __init__(self, **keys: Any) -> None:
        super().__init__(strict=True, **keys)  # otherwise DeepSpeed's model drops keys whose value is "auto"


class FinetuningConfig(DeepSpeedConfigModel):
    """Keys of the ``finetuning`` block.

    Attributes:
        steps: optimizer steps, unless the command line gives them.
        epochs: passes over the training data, instead of ``steps``; None: ``steps`` counts.
        trainable: ``default`` (cross-attention layers and projector of a pretrained model, everything of a
            small random one), ``all``, or parameter-name patterns (``fnmatch``).
        frames: frames sampled from a video, at most.
        image_tiles, frame_tiles: tiles of an image and of a frame of a video, at most, for models that cut pictures
            into tiles; None: as the image processor has it.
        frame_padding: whether text ahead of a video sees the tiles that pad its frames, as in transformers; see
            ``FrameLimits``.
        max_text_tokens: longest text of a sample; None: the model's limit.
        packing: tokens of a row of a micro-batch that its samples share, each in the first row with room for it; None:
            every sample has a row of its own.
        on_bad_sample: ``skip`` broken media or overlong text with a warning, or ``fail``.
        max_bad_share: share of bad samples above which a run ends, though they are skipped.
        fps: frames of each second of a video that are taken, within its share of ``frames``; None: all of its share.
        image_pixels, video_pixels: pixels of an image, and of a frame of a video, at most: larger ones are scaled down
            while they are decoded; None: no limit.
        image_orientation: ``upright``, by the EXIF orientation, or as ``stored``.
        look_ahead: micro-batches that are loaded while one trains; as many are kept in memory.
        decode_workers: threads of a rank that decode; None: its share of the host's processors.
        media_root: folder that relative media paths start from; None: the folder of the data file.
        eval_data: a dataset of its own to evaluate on; None: a held-out share of the training data.
        eval_share: that share.
        eval_examples: samples of an evaluation; 0: none.
        eval_every: steps between evaluations; 0: only at the end.
        save_every: steps between checkpoints; 0: only at the end.
        timeout_s: seconds that ranks may wait for one of them before the run ends: the timeout of every process group.
        lora: adapters that train instead of the weights; None: ``trainable`` says what trains.
        report_to: ``wandb``, ``tensorboard``, ``trackio`` or ``none``; None: wandb where it is installed.
        keep_last: checkpoints that stay, the newest; 0: all.
        keep_best: keep that of the lowest evaluation loss too, saved when it is found, and export it at the end.
        patience: evaluations without a lower loss after which the run ends; 0: it does not end by itself.
        eval_new_tokens: longest answer that the model generates to each question of an evaluation; 0: none.
        push_to_hub: repository of the hub that takes the exported folders; None: none.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    steps: int = Field(200, ge=1, lt=1 << 31)
    epochs: float | None = Field(None, gt=0, le=1e6)
    trainable: Literal["default", "all"] | Annotated[list[str], Field(min_length=1)] = "default"
    frames: int = Field(64, ge=1)
    image_tiles: int | None = Field(None, ge=1)
    frame_tiles: int | None = Field(1, ge=1)
    frame_padding: bool = False
    max_text_tokens: int | None = Field(None, ge=2)
    packing: int | None = Field(None, ge=2)
    on_bad_sample: Literal["skip", "fail"] = "skip"
    max_bad_share: float = Field(0.5, ge=0, le=1)
    fps: float | None = Field(None, gt=0)
    image_pixels: int | None = Field(DEFAULT_LIMITS.image, ge=1)
    video_pixels: int | None = Field(DEFAULT_LIMITS.video, ge=1)
    image_orientation: Literal["upright", "stored"] = "upright"
    look_ahead: int = Field(2, ge=1)
    decode_workers: int | None = Field(None, ge=1)
    media_root: str | None = None
    eval_data: str | None = None
    eval_share: float = Field(0.05, gt=0, lt=1)
    eval_examples: int = Field(128, ge=0, lt=1 << 31)
    eval_every: int = Field(0, ge=0)
    save_every: int = Field(0, ge=0)
    timeout_s: int = Field(1800, ge=10, le=10_000_000)
    lora: LoraSettings | None = None
    report_to: Literal["wandb", "tensorboard", "trackio", "none"] | None = None
    keep_last: int = Field(0, ge=0)
    keep_best: bool = False
    patience: int = Field(0, ge=0)
    eval_new_tokens: int = Field(0, ge=0)
    push_to_hub: str | None = Field(None, min_length=1)

    @property
    def frame_limits(self) -> FrameLimits:
        """How large pictures may be."""
        asked = "video_pixels" in self.model_fields_set
        pixels = (self.video_pixels or sys.maxsize) if asked else None
        return FrameLimits(self.image_tiles, self.frame_tiles, self.frame_padding, pixels)


def finetuning_config(ds_config: dict[str, Any]) -> FinetuningConfig:
    """The checked ``finetuning`` block.

    Raises:
        ConfigError: an unknown key or value.
    """
    block = ds_config.get(BLOCK_KEY, {})
    if not isinstance(block, dict):
        raise ConfigError(f"'{BLOCK_KEY}' is {block!r}; give an object")
    try:
        config = FinetuningConfig(strict=True, **block)
    except ValidationError as error:
        problem, *others = error.errors()
        inside = problem["loc"][0] == "lora" and len(problem["loc"]) > 1
        path = problem["loc"][: 2 if inside else 1]
        # Of a setting of several types, what each of them says.
        words = [problem["msg"], *(other["msg"] for other in others if other["loc"][: len(path)] == path)]
        if problem["type"] == "extra_forbidden":
            words.append(f"the keys are {list((LoraSettings if inside else FinetuningConfig).model_fields)}")
        key = ".".join([BLOCK_KEY, *map(str, path)])
        raise ConfigError(f"'{key}' is {problem['input']!r}: {'; '.join(dict.fromkeys(words))}") from None
    _check_together(config)
    return config


def _check_together(config: FinetuningConfig) -> None:
    """Settings that mean nothing, or two things, beside each other. Raises ``ConfigError``."""
    if config.lora is not None and config.trainable != "default":
        raise ConfigError(
            f"'{BLOCK_KEY}.trainable' is {config.trainable!r} beside '{BLOCK_KEY}.lora', with which the adapters alone "
            "train; leave one of them out"
        )
    for key in ("keep_best", "patience"):
        if getattr(config, key) and not (config.eval_every and config.eval_examples):
            raise ConfigError(
                f"'{BLOCK_KEY}.{key}' is {getattr(config, key)!r}, and nothing is evaluated on the way; set "
                f"'{BLOCK_KEY}.eval_every' and 'eval_examples'"
            )
