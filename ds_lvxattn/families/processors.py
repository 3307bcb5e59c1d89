"""Image processors as families call them."""

from __future__ import annotations

from typing import Any


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
