"""Processors as families call them."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import AutoTokenizer
from transformers.image_utils import SizeDict
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from ds_lvxattn.families.videos import VideoProcessor


def written(text: str, token: str, pieces: Iterable[str]) -> str:
    """``text`` with the first of ``pieces`` in the place of the first ``token``, and so on; later tokens stay."""
    waiting = iter(pieces)
    return re.sub(re.escape(token), lambda _: next(waiting, token), text)


def cuts(images: Any) -> bool:
    """Whether an image processor cuts images into a number of tiles, and a thumbnail of the whole."""
    return hasattr(images, "max_patches") or hasattr(images, "max_crops")


def cut_into(most: int, images: Any) -> dict[str, Any]:
    """Arguments with which such a processor makes at most so many tiles of an image, the thumbnail not counted."""
    if hasattr(images, "max_crops"):  # Molmo 2
        return {"max_crops": most}
    return {"crop_to_patches": most > 1, "min_patches": min(images.min_patches, most), "max_patches": most}


def limited_to(most: int | None, images: Any) -> Any:
    """Such a processor that always does so; None: as it is."""
    if most is None:
        return images
    told = copy.copy(images)
    vars(told).update(cut_into(most, images))
    return told


class OwnVideos:
    """What a whole processor of transformers becomes that has a ``VideoProcessor`` for that of transformers."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """As of transformers' processors."""
        if not isinstance(argument, VideoProcessor):
            return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]
        return None

    def to_dict(self) -> dict[str, Any]:
        """As of transformers' processors; without a video processor of which no settings are known."""
        made: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {key: value for key, value in made.items() if key != "video_processor" or value}


def without_video_processor(name: str, config: Any, settings: Callable[[Any], Mapping[str, Any]]) -> Any:
    """The whole processor of a local path or hub name, for images and text; None where it has other parts.

    It takes no videos, and keeps and saves the settings of its video processor, which may need what is not installed.

    Args:
        config: the model's.
        settings: those of its video processor where no file has them, by its image processor.

    Raises:
        ImportError: it needs something else that is not installed.
    """
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or {*kind.get_attributes()} != {"image_processor", "tokenizer", "video_processor"}:
        return None
    images = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    parts = {
        "image_processor": images,
        "tokenizer": AutoTokenizer.from_pretrained(name, trust_remote_code=False),
        "video_processor": VideoProcessor.load(name, settings(images)),
    }
    own: Any = type(kind.__name__, (OwnVideos, kind), {})  # saved under the name of transformers' class
    return own.from_args_and_dict([parts[key] for key in kind.get_attributes()], own.get_processor_dict(name)[0])


class ChannelsLast:
    """An image processor that is told that frames have their channels last, as they do.

    Left to itself, transformers' processors guess, and take a frame that is 1 or 3 pixels high for one with its
    channels first.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, images: Any, **options: Any) -> Any:
        return self._processor(images, input_data_format="channels_last", **options)

    def preprocess(self, images: Any, **options: Any) -> Any:
        """As the processor's own method of this name."""
        return self._processor.preprocess(images, input_data_format="channels_last", **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


class ImagesAndVideos:
    """An image processor, and beside it as ``video`` the video processor of a model that takes videos as such."""

    def __init__(self, processor: Any, video: VideoProcessor) -> None:
        self._processor, self.video = processor, video

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._processor(*args, **options)

    def with_video(self, video: VideoProcessor) -> ImagesAndVideos:
        """This image processor beside another video processor."""
        return ImagesAndVideos(self._processor, video)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """As of transformers' processors."""
        self._processor.save_pretrained(folder)
        self.video.save_pretrained(folder)

    def take_video_settings(self, whole: Any) -> None:
        """Give the video processor in the ``whole`` one of transformers the settings of this one."""
        for name, value in self.video.settings.items():
            if hasattr(whole.video_processor, name):
                setattr(whole.video_processor, name, SizeDict(**value) if name == "size" else value)

    def __getattr__(self, name: str) -> Any:
        if name == "_processor":  # not made yet, as in a copy
            raise AttributeError(name)
        return getattr(self._processor, name)
