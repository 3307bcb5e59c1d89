"""Videos and images: what a file shows, which of its frames are taken, and their pixels.

``files`` opens nothing but the file that is named; ``index`` knows the frames that a player shows and when;
``sampling`` chooses among them by time; ``decode`` decodes the chosen ones; ``picture`` turns a decoded frame into what
a player shows; ``images`` reads still and animated images; ``medium`` is a row's image or video.
"""

from ds_lvxattn.data.media.files import MediaError, check_sha256
from ds_lvxattn.data.media.medium import (
    DEFAULT_LIMITS,
    FRAMES_A_SECOND,
    NO_LIMITS,
    Media,
    PixelLimits,
    decode_frames,
    frame_groups,
    load_frames,
    probe_image,
    probe_video,
)
from ds_lvxattn.data.media.sampling import sample_indices, sample_times
from ds_lvxattn.data.media.timeline import VideoInfo

__all__ = [
    "DEFAULT_LIMITS",
    "FRAMES_A_SECOND",
    "NO_LIMITS",
    "Media",
    "MediaError",
    "PixelLimits",
    "VideoInfo",
    "check_sha256",
    "decode_frames",
    "frame_groups",
    "load_frames",
    "probe_image",
    "probe_video",
    "sample_indices",
    "sample_times",
]
