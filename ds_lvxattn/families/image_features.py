"""Models of transformers whose forward puts the visual tokens of ``get_image_features`` in the place of image tokens.

LLaVA-NeXT, InternVL and many others have this in common: the model asks its own ``get_image_features`` for the visual
tokens of all images, in the order of the text, and its language model reads them in one causal text. What else there is
to know is read off config, modules and signatures, or asked of the model's own processor, which makes the pixels of
each picture and says how many tokens it has. Models that would be computed wrongly are refused, with the reason.

Here each rank asks for its own pictures, and the tokens then go to the ranks that hold their rows. What is replaced is
``get_image_features`` of the instance rather than the model's forward: so whatever else the forward does is done, and
the visual tokens are made where ZeRO-3 has gathered the parameters of the module itself (line breaks of LLaVA-NeXT).
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from ds_lvxattn.data.sample import FrameShape, FrameSize, SampleError
from ds_lvxattn.errors import ConfigError
from ds_lvxattn.families.concatenation import Concatenation
from ds_lvxattn.families.family import FrameLimits
from ds_lvxattn.families.handed_on import hand_down
from ds_lvxattn.families.image_answers import Asked, visual_parts
from ds_lvxattn.families.image_masks import KINDS, ImageBlocks, image_blocks, runs_of_images
from ds_lvxattn.families.image_obstacles import image_obstacles, inner_of
from ds_lvxattn.families.processors import cut_into, cuts, limited_to, without_video_processor, written
from ds_lvxattn.families.text_only import refuse
from ds_lvxattn.families.videos import VideoProcessor
from ds_lvxattn.plan.layer_plan import AttentionLayer
from ds_lvxattn.runtime.batch import SequenceParallelBatch
from ds_lvxattn.runtime.recompute import Recomputation

SQUARE = 336  # pixels of a side, where the vision config has no image size
# Arguments that models read on the host: on the device they would be waited for.
ON_HOST = ("image_sizes", "batch_num_images", "image_grids")


class ImageFeatures(Concatenation):
    """Models of transformers with ``get_image_features``; see ``VisualFamily``. Its processor is the model's whole one.

    A frame of a video is an image. Where the processor cuts images into as many tiles as it is told, it is told the
    limits; elsewhere a frame has at most the pixels of a square of the vision config's ``image_size``, unless told
    otherwise.

    Attributes:
        video_processor: name of transformers' class, for a model that takes videos as such.
    """

    name = "images in the text"
    video_processor = ""
    model_class: type[PreTrainedModel] = PreTrainedModel
    image_token = "<image>"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # Of a model that is refused, as those of no kind known here.
        self._images = image_blocks(_class_of(config), config) or ImageBlocks()
        self.blocks_in_full, self.blocks_in_window = self._images.in_full, self._images.in_window
        self.blocks_joined = self._images.joined

    @classmethod
    def has_model(cls, model: nn.Module) -> bool:
        return super().has_model(model) and cls.has_config(model.config)

    @classmethod
    def has_config(cls, config: Any) -> bool:
        if cls.model_class is not PreTrainedModel:
            return super().has_config(config)
        known = isinstance(config, PreTrainedConfig) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        # A class without pixels is one of text alone; what cannot be taken of the others is refused with the reason.
        return known and "pixel_values" in inspect.signature(_class_of(config).forward).parameters

    # Modules

    def is_local(self, module: nn.Module) -> bool:
        of_text = type(getattr(module, "config", None)) is type(self.text_config)
        return "Attention" in type(module).__name__ and not of_text

    def sizes_of(self, module: Any) -> tuple[int, int, int]:
        if not self.is_local(module):
            return super().sizes_of(module)
        config = getattr(module, "config", None)
        named = ((x, key) for x in (module, config) for key in ("num_heads", "num_attention_heads"))
        heads = next((int(getattr(x, key)) for x, key in named if hasattr(x, key)), 1)
        return heads, heads, getattr(module, "head_dim", 1)

    def attention_layers(self, model: nn.Module) -> dict[nn.Module, AttentionLayer]:
        """See ``Family``. A model that would be computed wrongly is refused, with the reason."""
        refuse(model, image_obstacles(model))
        return super().attention_layers(model)

    def install_hooks(self, model: nn.Module, recomputation: Recomputation) -> None:
        hand_down(model, self.role_of)
        Asked(self, inner_of(model), recomputation, self.portion)

    def encode(
        self, model: Any, pixels: Sequence[Tensor], batch: SequenceParallelBatch, recomputation: Recomputation
    ) -> Tensor:
        raise NotImplementedError("pixels have no fixed order here: see image_answers.Asked")

    def trainable_by_default(self) -> tuple[str, ...]:
        """All but vision encoders: parts that hold attention, beside the language model."""
        with torch.device("meta"):
            model = _class_of(self.config)(self.config)
        inner, ahead = inner_of(model), "" if inner_of(model) is model else "model."
        encoders = {part for part in visual_parts(inner) if any(map(self.is_local, part.modules()))}
        parts = [(name, part) for name, part in inner.named_children() if any(True for _ in part.parameters())]
        names = [name for name, part in parts if part not in encoders]
        alone = [name for name, _ in inner.named_parameters(recurse=False)]
        head = [] if _ties(self.config) else ["*lm_head.*"]
        return (*(f"*{ahead}{name}.*" for name in names), *(f"*{ahead}{name}" for name in alone), *head)

    # Visual tokens

    def visual_widths(self) -> tuple[int, ...]:
        hidden = self.config.text_config.hidden_size
        return (hidden, getattr(self.config.vision_config, "hidden_size", hidden))

    def frame_tokens(self) -> int:
        return getattr(self.config, "image_seq_length", None) or self.encoder_tokens()

    def encoder_tokens(self) -> int:
        return (self._square // _patch(self.config.vision_config)) ** 2

    def shape_of(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> FrameShape:
        """``grid``: rows of pixels, height and width that the processor gets, tiles at most (0: as it has it); times,
        rows and columns of patches, where the model is told."""
        return self.looked_at(size, processor, limits)[0]

    def write(self, text: str, sizes: Sequence[FrameSize], processor: Any, limits: FrameLimits) -> str:
        # Some processors have one token for an image in a conversation, and another one for its visual tokens.
        token = self.token_of(processor.tokenizer)
        pictures = (self.looked_at(size, processor, limits)[1] for size in sizes)
        text = text.replace(processor.image_token, token)
        ends = self._ends(processor.tokenizer) if self._rope_index is not None else None
        if ends is not None:  # images side by side would be one to the model
            text = text.replace(token.join(ends), token).replace(token, token.join(ends))
        return written(text, token, pictures)

    def positions(self, visual: np.ndarray, shapes: Sequence[FrameShape]) -> np.ndarray:
        """See ``Family``. Of a model whose positions follow from the places of images, those that it gives itself.

        Raises:
            SampleError: two images stand side by side, which it would take for one.
        """
        if self._rope_index is None:
            return super().positions(visual, shapes)
        is_image = visual >= 0
        picture = np.repeat(np.arange(len(shapes)), [shape.tokens for shape in shapes])
        numbers = np.full_like(visual, -1)
        numbers[is_image] = picture[visual[is_image]]
        if (is_image[1:] & is_image[:-1] & (numbers[1:] != numbers[:-1])).any():
            raise SampleError("two images stand side by side, which the model takes for one: let text stand between")
        types = torch.zeros(1, max(len(visual), 1), dtype=torch.long)
        types[0, : len(visual)] = torch.from_numpy(is_image)
        grids = torch.tensor([shape.grid[4:] for shape in shapes]) if shapes else None
        made, _ = self._rope_index(torch.zeros_like(types), types, image_grid_thw=grids)
        return made[:, 0, : len(visual)].numpy()

    @property
    def has_blocks(self) -> bool:
        return self._images.exist

    def blocks(
        self, ids: np.ndarray, labels: np.ndarray, visual: np.ndarray, shapes: Sequence[FrameShape]
    ) -> Sequence[tuple[int, int]]:
        return runs_of_images(visual) if self._images.exist else ()

    def block_arguments(self, in_block: np.ndarray) -> Mapping[str, np.ndarray]:
        return {KINDS: in_block.astype(np.int64)} if self._images.exist else {}

    def prompt_arguments(self, positions: np.ndarray) -> Mapping[str, Tensor]:
        """Positions that the model would make itself; ahead of times, rows and columns its places in the text."""
        if positions.ndim == 2:
            return {}
        places = np.broadcast_to(np.arange(positions.shape[-1]), (int(len(positions) == 3), *positions.shape[1:]))
        return {"position_ids": torch.from_numpy(np.concatenate((places, positions)))}

    def _ends(self, tokenizer: Any) -> tuple[str, str] | None:
        """The tokens around an image in the text."""
        for kind in ("image", "vision"):
            ids = [getattr(self.config, f"{kind}_{end}_token_id", None) for end in ("start", "end")]
            if None not in ids:
                start, end = tokenizer.convert_ids_to_tokens(ids)
                return start, end
        return None

    @functools.cached_property
    def _rope_index(self) -> Any:
        """``get_rope_index`` of the model, which gives the positions of a text and its images; None: it has none."""
        if "image_grid_thw" not in inspect.signature(_class_of(self.config).forward).parameters:
            return None
        return getattr(self._inner, "get_rope_index", None)

    @functools.cached_property
    def _inner(self) -> Any:
        """See ``inner_of``; without memory for its weights."""
        with torch.device("meta"):
            return inner_of(_class_of(self.config)(self.config))

    def looked_at(self, size: FrameSize | None, processor: Any, limits: FrameLimits) -> tuple[FrameShape, str]:
        """The shape of a picture, and how the processor writes it."""
        size = size or FrameSize(self._square, self._square, video=True)
        cutting = cuts(_whole(processor).image_processor)
        most = (limits.frame_tiles if size.video else limits.image_tiles) or 0
        height, width = size.height, size.width
        if size.video and not cutting:
            scale = ((limits.frame_pixels or self._square**2) / (height * width)) ** 0.5
            height, width = (max(1, round(side * min(scale, 1))) for side in (height, width))
        return _looked_at(
            processor, height, width, most if cutting else 0, self._image_id, _patch(self.config.vision_config)
        )

    @property
    def _square(self) -> int:
        """Pixels of a side of a square that the vision encoder takes."""
        size = getattr(self.config.vision_config, "image_size", SQUARE)
        return size[0] if isinstance(size, (list, tuple)) else size

    @property
    def _image_id(self) -> int:
        return getattr(self.config, "image_token_id", None) or self.config.image_token_index

    def token_of(self, tokenizer: Any) -> str:
        return tokenizer.convert_ids_to_tokens(self._image_id)

    def tile_limits(self, processor: Any) -> tuple[str, ...]:
        return ("image_tiles", "frame_tiles") if cuts(_whole(processor).image_processor) else ()

    def limited(self, processor: Any, limits: FrameLimits) -> Any:
        images = _whole(processor).image_processor
        if limits.image_tiles is None or not cuts(images):
            return processor
        told = copy.copy(processor)
        told.image_processor = limited_to(limits.image_tiles, images)
        return told

    # Videos

    def videos_otherwise(self) -> str:
        if self.video_token or not self._encodes_videos:
            return ""
        return (
            f"{_class_of(self.config).__name__} of transformers takes them as such ('pixel_values_videos'), with other "
            "tokens and times: serve what was trained so with frames as images too"
        )

    def refuses_videos(self) -> str:
        if self.video_token or not self._encodes_videos or not hasattr(self._inner, "video_tower"):
            return ""
        return (
            f"{_class_of(self.config).__name__} has an encoder of its own for videos ('video_tower'), which does not "
            "train here; give the frames as images, which its encoder of images takes"
        )

    @property
    def _encodes_videos(self) -> bool:
        taken = inspect.signature(_class_of(self.config).forward).parameters
        return "pixel_values_videos" in taken

    # Pixels

    def load_processor(self, name: str) -> Any:
        try:
            found = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        except ImportError as error:
            found, reason = None, str(error)
        else:
            reason = f"transformers finds a {type(found).__name__} alone"
        if not isinstance(found, ProcessorMixin):  # for want of torchvision, which video processors need
            found = without_video_processor(name, self.config, self.video_settings)
        if found is None:
            raise ConfigError(f"its processor does not load here: {reason}")
        check_runs(_whole(found).image_processor)
        return found

    def video_settings(self, images: Any) -> dict[str, Any]:
        """Settings of the video processor where no file has them: those of the image processor, as in transformers."""
        if not self.video_processor:
            return {}
        shared: tuple[str, ...] = (
            "do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "rescale_factor", "resample", "image_mean",
            "image_std",
        )  # fmt: skip
        size = {"height": self._square, "width": self._square}
        if getattr(images, "do_center_crop", False):
            shared = (*shared, "do_center_crop", "crop_size", "size")
        made = {"size": size, **{key: getattr(images, key) for key in shared}}
        plain = {key: dict(x) if isinstance(x, (SizeDict, dict)) else x for key, x in made.items()}
        return {"video_processor_type": self.video_processor, **plain}

    def scaled(self, frames: np.ndarray, processor: Any) -> Tensor:
        """Frames of a video, uint8 ``[f, H, W, 3]``, as the model's video processor makes them, ``[f, 3, h, w]``."""
        return VideoProcessor.of(processor.video_processor).fitted(frames)

    def pixels(self, frames: Sequence[np.ndarray], shapes: Sequence[FrameShape], processor: Any) -> Mapping[str, Any]:
        model_class = _class_of(self.config)
        names = set(inspect.signature(getattr(model_class, "get_image_features", lambda: None)).parameters)
        # Some take further ones, or all, by the forward alone.
        taken = inspect.signature(model_class.forward).parameters
        names |= {key for key in taken if key.startswith("image_") or "pixel_values" in key}
        made = [self.made(frame, shape, processor, shape.grid[3]) for frame, shape in zip(frames, shapes, strict=True)]
        return on_host({key: _joined([of[key] for of in made])[None] for key in made[0] if key in names})

    def made(self, frame: np.ndarray, shape: FrameShape, processor: Any, most: int = 0) -> dict[str, Any]:
        """What the processor makes of a picture of such a shape; see ``made_by``."""
        height, width = shape.grid[1:3]
        if frame.shape[:2] != (height, width):
            frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        made = made_by(processor, [frame], most)
        tokens = made["input_ids"].count(self._image_id)
        if tokens != shape.tokens:
            raise SampleError(
                f"a picture of {width} x {height} pixels has {tokens} visual tokens, and one without its contents "
                f"{shape.tokens}"
            )
        return made

    def portion(
        self, pixels: Mapping[str, Tensor], shapes: Sequence[FrameShape], first: int, last: int
    ) -> Mapping[str, Tensor]:
        """Of the arguments of ``get_image_features`` for a rank's pictures those for ``[first, last)`` of them.

        Args:
            pixels: of all of them, without the dimension of a batch.
            shapes: of all of them.
        """
        rows = [0, *np.cumsum([shape.grid[0] for shape in shapes]).tolist()]
        given = {}
        for key, x in pixels.items():
            begin, end = (first, last) if len(x) == len(shapes) else (rows[first], rows[last])
            given[key] = x[begin:end]
        return given

    def blank(self, processor: Any, limits: FrameLimits) -> Mapping[str, Any]:
        shape = self.shape_of(None, processor, limits)
        return self.pixels([np.zeros((self._square, self._square, 3), np.uint8)], [shape], processor)

    def blank_pixels(self) -> Mapping[str, Tensor]:
        raise NotImplementedError("the processor makes them: see blank")

    def pad_tiles(self, pixels: Mapping[str, Any]) -> Mapping[str, Tensor]:
        return {key: torch.as_tensor(x[0]) for key, x in pixels.items()}


def check_runs(images: Any) -> None:
    """Refuse an image processor that loads here, and fails at its first image.

    Raises:
        ConfigError: saying what it needs.
    """
    if isinstance(images, TorchvisionBackend) and not is_torchvision_available():
        raise ConfigError(f"its {type(images).__name__} needs torchvision: pip install torchvision")


def _ties(config: Any) -> bool:
    """Whether the head shares the weights of the embedding; some configs say so only for their language model."""
    return bool(getattr(config, "tie_word_embeddings", getattr(config.text_config, "tie_word_embeddings", False)))


def _class_of(config: Any) -> Any:
    """The class of the models with such a config."""
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]


def _whole(processor: Any) -> Any:
    """``processor``, which is to be the model's whole one.

    Raises:
        ConfigError: it is an image processor.
    """
    if not hasattr(processor, "image_processor"):
        raise ConfigError(
            f"the processor is a {type(processor).__name__}; give the model's whole one "
            "(AutoProcessor.from_pretrained), which knows how many tokens an image has"
        )
    return processor


def _patch(vision: Any) -> int:
    """Pixels of a side of a patch."""
    size = getattr(vision, "patch_size", 14)
    return size[0] if isinstance(size, (list, tuple)) else size


@functools.lru_cache(maxsize=4096)
def _looked_at(processor: Any, height: int, width: int, most: int, image_id: int, patch: int) -> tuple[FrameShape, str]:
    """What the processor makes of a picture of that size, told from a blank one, and how it writes it."""
    made = made_by(processor, [np.zeros((height, width, 3), np.uint8)], most)
    values = next(x for key, x in made.items() if key.startswith("pixel_values"))
    of_patches = made["image_grid_thw"][0].tolist() if "image_grid_thw" in made else ()
    tokenizer, text, runs = processor.tokenizer, "", []
    for is_image, ids in itertools.groupby(made["input_ids"], lambda token: token == image_id):
        run = list(ids)
        text += tokenizer.decode(run[:1] if is_image else run, clean_up_tokenization_spaces=False)
        runs += [len(run)] * is_image
    encoder_tokens = len(values) if of_patches else max(values.numel() // (3 * patch**2), 1)
    grid = (len(values), height, width, most, *of_patches)
    return FrameShape(sum(runs), encoder_tokens, grid, runs=tuple(runs) if len(runs) > 1 else ()), text


def made_by(processor: Any, pictures: Sequence[np.ndarray], most: int = 0) -> dict[str, Any]:
    """What the processor makes of the pictures of a row and the tokens that stand for them: tensors, and token ids in a
    list.

    Args:
        most: tiles at most; 0: as the processor has it.
    """
    cut = cut_into(most, processor.image_processor) if most else {}
    text = processor.image_token * len(pictures)
    given = list(pictures) if len(pictures) == 1 else [list(pictures)]
    made = processor(given, text=[text], return_tensors="pt", add_special_tokens=False, **cut)
    ids = made["input_ids"][0].tolist()
    # Some put the token that begins a text ahead of it, whatever they are told.
    begins = {getattr(processor.tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos")}
    return {**made, "input_ids": ids[1:] if ids and ids[0] in begins else ids}


def on_host(arguments: Mapping[str, Tensor]) -> dict[str, Any]:
    """``arguments``, those of them as arrays that the model reads on the host."""
    return {key: x.numpy() if key in ON_HOST else x for key, x in arguments.items()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` one after another, each padded with zeros to the largest."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [wanted - have for wanted, have in zip(largest, part.shape[1:], strict=True)]
        padded.append(pad(part, [side for size in reversed(missing) for side in (0, size)]))
    return torch.cat(padded)
