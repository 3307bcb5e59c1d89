"""The model to fine-tune: loaded or built, with its tokenizer, image processor and trainable parameters."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import zero
from deepspeed.accelerator import get_accelerator
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.processing_utils import ProcessorMixin

from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families import REFUSED, VisualFamily, family_of, family_of_config
from ds_lvxattn.families.family import ANY_SIZE, FrameLimits
from ds_lvxattn.families.processors import ImagesAndVideos
from ds_lvxattn.groups import SequenceParallelGroups
from ds_lvxattn.needle.small_models import SMALL_MODELS, small_model
from ds_lvxattn.needle.task import IMAGE, build_tokenizer
from ds_lvxattn.training.ds_config import zero_stage
from ds_lvxattn.training.zero3 import take_as_wholes

QUICKSTART = "quickstart"
# Weights in formats of other libraries, which a repository may hold besides.
OTHER_FORMATS = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "original/*"]
WEIGHTS = ["*.safetensors", "*.bin"]
CAST = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes that DeepSpeed casts from

logger = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """A model with what its data needs.

    Attributes:
        processor: its image processor.
        image_token: the token that stands for a frame; None for a model that takes none.
        whole: its processor as transformers has it, of text and images and perhaps videos, to be saved with the model;
            None where there is none yet.
        limits: how large pictures were in training, for what the saved processor can say of it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    processor: Any
    image_token: str | None
    whole: Any = None
    limits: FrameLimits = ANY_SIZE

    @property
    def image_id(self) -> int:
        """Token id of a frame; -1, which no token has, for a model that takes none."""
        if self.image_token is None:
            return -1
        image = self.tokenizer.convert_tokens_to_ids(self.image_token)
        assert isinstance(image, int)  # a list is for a list of tokens
        return image

    @property
    def pad_token(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id

    def save(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """``save_pretrained`` of model, tokenizer and image processor, and of the whole processor, so that
        transformers serves what was trained with ``AutoProcessor.from_pretrained(folder)``."""
        self.model.save_pretrained(folder, state_dict=state_dict)
        self.tokenizer.save_pretrained(folder)
        if self.processor is None:
            return
        family, processor = family_of(self.model), self.processor
        if isinstance(family, VisualFamily):
            processor = family.limited(processor, self.limits)
        if isinstance(processor, ProcessorMixin):
            whole = processor
        else:
            processor.save_pretrained(folder)
            whole = self.whole or whole_processor(str(folder))
        if whole is not None and isinstance(family, VisualFamily) and self.image_token is not None:
            whole.tokenizer = self.tokenizer  # some processors add tokens to theirs, which the model has no rows for
            family.complete_processor(whole, self.image_token)
            if isinstance(processor, ImagesAndVideos):
                processor.take_video_settings(whole)
            whole.save_pretrained(folder)


def config_of(name: str) -> PreTrainedConfig:
    """The config of a local path or hub name.

    Raises:
        ConfigError: it takes code of its repository.
        OSError, ValueError: as of transformers.
    """
    if (os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1) and not os.path.isdir(name):
        raise FileNotFoundError("no such folder")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:  # transformers asks for an argument that nobody can give here
        values, _ = PreTrainedConfig.get_config_dict(name)
        if "auto_map" not in values:
            raise
        kind = values.get("model_type", "")
        reason = REFUSED.get(kind, "load it in a script of your own and attach it there, if a family knows it")
        raise ConfigError(
            f"its config is of the type {kind!r}, code that its repository brings, which is not run here: {reason}"
        ) from error


def load_model(name: str, ds_config: dict[str, Any], seed: int) -> LoadedModel:
    """Load a model from a local path or hub name, or build a small one by its name in ``SMALL_MODELS``.

    Code that a repository brings along is not run, and nobody is asked whether to. A hub name may end in
    ``@REVISION``, a commit, tag or branch. Under ZeRO-3 a pretrained model is partitioned while it loads, so that it
    need not fit one rank.

    Raises:
        ConfigError: nothing loads under ``name``, or no family knows it.
    """
    if name in SMALL_MODELS:
        small, processor = small_model(name, seed)
        nn.Module.to(small, model_dtype(ds_config))
        if isinstance(processor, ProcessorMixin):
            return LoadedModel(small, processor.tokenizer, processor, IMAGE, processor)
        return LoadedModel(small, build_tokenizer(), processor, IMAGE)
    # Alive while the model loads: transformers partitions what it loads when a ZeRO-3 config is.
    zero3 = HfDeepSpeedConfig(ds_config) if zero_stage(ds_config) == 3 else None
    try:
        name = at_revision(name)
        family = family_of_config(config_of(name))
        model = family.load_model(name, model_dtype(ds_config))
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        processor = family.load_processor(name) if isinstance(family, VisualFamily) else None
    except ConfigError as error:
        raise ConfigError(f"--model {name}: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {name}: cannot be loaded ({error}); small random models are {', '.join(SMALL_MODELS)}"
        ) from error
    del zero3
    whole = None
    if isinstance(family, VisualFamily):
        whole = processor if isinstance(processor, ProcessorMixin) else whole_processor(name)
        take_template(tokenizer, whole, name)
    try:
        return LoadedModel(model, tokenizer, processor, image_token_of(model, tokenizer), whole)
    except ConfigError as error:
        raise ConfigError(f"--model {name}: {error}") from error


def image_token_of(model: nn.Module, tokenizer: Any) -> str | None:
    """The token that stands for a frame; None for a model that takes none.

    Raises:
        ConfigError: the tokenizer lacks it.
    """
    family = family_of(model)
    if not isinstance(family, VisualFamily):
        return None
    wanted = family.token_of(tokenizer)
    # The small models are saved with the tokenizer of the needle task.
    found = next((token for token in (wanted, IMAGE) if token in tokenizer.get_vocab()), None)
    if found is None:
        raise ConfigError(f"its tokenizer has no token {wanted!r}, which stands for a frame; add it")
    return found


def take_template(tokenizer: Any, whole: Any, name: str = "") -> None:
    """Give ``tokenizer`` the chat template of the whole processor, with which alone it may stand.

    Args:
        whole: that processor; None where it does not load.
        name: the local path or hub name whose files have its template all the same.
    """
    if tokenizer.chat_template:
        return
    of_files = ProcessorMixin.get_processor_dict(name)[0] if whole is None and name else {}
    template = getattr(whole, "chat_template", None) or of_files.get("chat_template")
    if template:
        tokenizer.chat_template = template


def whole_processor(name: str) -> Any:
    """The processor of a local path or hub name, of text and images; None where it has none that loads here."""
    try:
        found = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: its processor does not load here and is not saved with the model (%s)", name, error)
        return None
    return found if isinstance(found, ProcessorMixin) else None


def at_revision(name: str, weights: bool = True) -> str:
    """A folder with the files of ``REPOSITORY@REVISION``, without its weights where none are asked for; any other name
    as it is.

    Raises:
        OSError, ValueError: the hub does not have it, or cannot be reached.
    """
    repository, at, revision = name.rpartition("@")
    if not at or Path(name).exists():
        return name
    return str(
        snapshot_download(repository, revision=revision, ignore_patterns=OTHER_FORMATS + WEIGHTS * (not weights))
    )


def model_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """dtype of the parameters, as the DeepSpeed config has it."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds_config.get(key, {}).get("enabled"):
            return dtype
    return torch.float32


def select_trainable(model: nn.Module, name: str, trainable: str | Sequence[str]) -> None:
    """Freeze all parameters but those that ``trainable`` names; see ``FinetuningConfig.trainable``.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    if trainable == "all" or (trainable == "default" and name in SMALL_MODELS):
        return
    patterns = family_of(model).trainable_by_default() if trainable == "default" else trainable
    names = [parameter for parameter, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(parameter, pattern) for parameter in names):
            raise ConfigError(f"'finetuning.trainable' has {pattern!r}, which matches no parameter of the model")
    for parameter, tensor in model.named_parameters():
        tensor.requires_grad_(any(fnmatchcase(parameter, pattern) for pattern in patterns))


def partition_over_all_ranks(model: nn.Module, ds_config: dict[str, Any], groups: SequenceParallelGroups) -> None:
    """Under ZeRO-3, partition a model that is not yet: over all ranks, as ZeRO reduces its gradients. What ZeRO-3 takes
    as a whole is marked, and its sizes in ``ds_config`` are filled in where they are missing.

    Left to ``deepspeed.initialize``, DeepSpeed 0.19.8 partitions parameters over the data-parallel group of an
    ``mpu``, and then sums their gradients over that group alone, not over the ranks of a sequence. It would also cast
    them to the dtype of ``ds_config``, and leaves partitioned ones as they are: they are cast here.

    Raises:
        ConfigError: it is partitioned over some of the ranks.
    """
    if zero_stage(ds_config) != 3:
        return
    ds_config["zero_optimization"] = take_as_wholes(model, ds_config["zero_optimization"])
    partitioned = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    for parameter in partitioned:
        ranks = dist.get_world_size(parameter.ds_process_group)  # type: ignore[attr-defined]
        if ranks != dist.get_world_size():
            raise ConfigError(
                f"the model is partitioned over {ranks} of the {dist.get_world_size()} ranks, so that ZeRO-3 would not "
                "sum its gradients over the ranks of a sequence; load it under HfDeepSpeedConfig, or unpartitioned"
            )
    if len(partitioned) < len(list(model.parameters())):  # adapters beside a model that was partitioned as it loaded
        _cast(model, model_dtype(ds_config))
        zero.Init(model, groups.get_sequence_data_parallel_group(), config_dict_or_path=ds_config, mpu=groups)
        # DeepSpeed leaves a partitioned model where it is, and partitioning moves parameters alone.
        device = torch.device(get_accelerator().current_device_name())
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters that are not partitioned, as DeepSpeed casts them in ``bf16`` and ``fp16``: in float32 none are."""
    for parameter in model.parameters():
        if dtype != torch.float32 and parameter.dtype in CAST and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def loss_factor(ds_config: dict[str, Any], sequence_parallel_size: int) -> int:
    """What the loss is multiplied by before the backward pass, so that gradients are summed over a sequence's ranks.

    ZeRO divides the sum over all ranks by ``ranks / sequence_parallel_size``, but for stage 3's reduce-scatter, which
    in DeepSpeed 0.19.8 divides by ``ranks``. Adam would hide a constant factor; clipping and reported norms would not.

    Raises:
        ConfigError: stage 3 without reduce-scatter, which divides large parameters in one way and small in the other.
    """
    if zero_stage(ds_config) != 3 or sequence_parallel_size == 1:
        return 1
    if not ds_config["zero_optimization"].get("reduce_scatter", True):
        raise ConfigError(
            "'zero_optimization.reduce_scatter' is false, with which DeepSpeed's stage 3 scales the gradients of "
            f"sequence parallelism (size {sequence_parallel_size}) differently for small and large parameters; leave "
            "it out, or choose stage 2"
        )
    return sequence_parallel_size


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters for the optimizer: matrices decay, vectors and scalars (norms, biases, gates) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    return [g for g in ({"params": matrices}, {"params": others, "weight_decay": 0.0}) if g["params"]]
