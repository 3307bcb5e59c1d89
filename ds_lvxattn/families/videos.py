"""Videos as transformers' video processors make them of frames, from their own settings, on the host.

They need torchvision, which nothing else here does. These settings, one resampling of torch and (Qwen's) a permutation
are all that they do to frames that have been chosen already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.utils import PushToHubMixin, cached_file

from ds_lvxattn.errors import ConfigError

FILE = "video_preprocessor_config.json"
WHOLE_FILE = "processor_config.json"  # of a whole processor, its parts inside
MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}


@dataclass(frozen=True)
class VideoProcessor(PushToHubMixin):
    """A video processor by its settings.

    Attributes:
        settings: as its file has them, and as its class has what the file leaves out.
    """

    settings: Mapping[str, Any]
    _auto_class: ClassVar[None] = None  # asked for by a whole processor that saves this one with it

    @classmethod
    def of(cls, processor: Any) -> VideoProcessor:
        """One by the settings of a video processor of transformers; one of these as it is."""
        return processor if isinstance(processor, cls) else cls(processor.to_dict())

    @classmethod
    def load(cls, name: str, default: Mapping[str, Any]) -> VideoProcessor:
        """That of a local path or hub name.

        Args:
            default: settings where no file has them. The file of the image processor, which transformers falls back on,
                is not read: its limits are those of an image.
        """
        whole, alone = _read(name, WHOLE_FILE), _read(name, FILE)
        found = dict(whole.get("video_processor") or alone)
        if not (found or default):
            return cls({})
        size = dict(found.pop("size", None) or default.get("size", {}))
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):  # names of older files
            least = found.pop(key, None) or size.get(edge) or default.get("size", {}).get(edge)
            size |= {} if least is None else {edge: least}
        return cls({**default, **found, "size": size})

    def with_settings(self, **settings: Any) -> VideoProcessor:
        """This one with other settings."""
        return VideoProcessor({**self.settings, **settings})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write its file, by which ``AutoVideoProcessor`` of transformers loads it."""
        text = json.dumps(dict(self.settings), indent=2, sort_keys=True)
        Path(folder, FILE).write_text(text + "\n")

    def to_dict(self) -> dict[str, Any]:
        """As of transformers' processors."""
        return dict(self.settings)

    def scaled(self, frames: np.ndarray, height: int, width: int) -> Tensor:
        """uint8 frames ``[f, H, W, 3]`` as float32 ``[f, 3, height, width]``, normalized."""
        x = torch.from_numpy(frames).permute(0, 3, 1, 2)
        if x.shape[2:] != (height, width):
            mode = MODES[Image.Resampling(self.settings["resample"])]
            x = interpolate(x.contiguous(), size=(height, width), mode=mode, antialias=True, align_corners=False)
        return self._normalized(x)

    def fitted(self, frames: np.ndarray) -> Tensor:
        """uint8 frames ``[f, H, W, 3]`` as processors without limits of their own make them, ``[f, 3, h, w]``.

        Scaled to a height and a width, or to a shorter edge and then cropped, normalized.

        Raises:
            ConfigError: they are to be cropped to more than they are scaled to.
        """
        size = self.settings["size"]
        if "shortest_edge" not in size:
            return self.scaled(frames, size["height"], size["width"])
        short, long = sorted(frames.shape[1:3])
        to = size["shortest_edge"], int(size["shortest_edge"] * long / short)
        x = self.scaled(frames, *(to if frames.shape[1] == short else reversed(to)))
        if not self.settings.get("do_center_crop"):
            return x
        height, width = (self.settings["crop_size"][side] for side in ("height", "width"))
        if max(height, width) > size["shortest_edge"]:
            raise ConfigError(
                f"the video processor scales frames to a shorter edge of {size['shortest_edge']} pixels and crops them "
                f"to {width} x {height}; set 'crop_size' of {FILE} to no more than 'size'"
            )
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        return x[..., top : top + height, left : left + width]

    def patches(self, frames: np.ndarray, height: int, width: int) -> Tensor:
        """The patches of frames that are merged.

        Args:
            frames: uint8 ``[merged, H, W, 3]``.
            height, width: to which they are scaled.

        Returns:
            float32 ``[patches, values]``, those that make one visual token side by side.
        """
        x = self.scaled(frames, height, width)
        merge, patch = self.settings["merge_size"], self.settings["patch_size"]
        # merged, channels, then rows and columns: of blocks, of patches in a block, of pixels in a patch
        x = x.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
        return x.permute(2, 5, 3, 6, 1, 0, 4, 7).flatten(4).flatten(0, 3)

    def _normalized(self, x: Tensor) -> Tensor:
        """As transformers does it, in one step from 0 ... 255 where it does both."""
        scale = self.settings["rescale_factor"] if self.settings["do_rescale"] else 1.0
        if not self.settings["do_normalize"]:
            return x.float() * scale
        mean, std = (
            torch.tensor(self.settings[key])[:, None, None] * (1.0 / scale) for key in ("image_mean", "image_std")
        )
        return x.float().sub_(mean).div_(std)


def _read(name: str, file: str) -> dict[str, Any]:
    """A file of settings; empty where there is none."""
    path = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
    )
    return {} if path is None else json.loads(Path(path).read_text())
