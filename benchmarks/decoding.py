"""Decoding by number of threads: frames a second of samples that are spread over a long film, against other decoders.

    python benchmarks/decoding.py                      # a film made here: 1280 x 720, a key frame every 250
    python benchmarks/decoding.py --film my_film.mp4

A sample is ``--frames`` frames at equal parts of a stretch of the film, as training asks for them. ``here`` decodes
samples and groups of pictures side by side, one thread each; the others get one sample a thread, and one thread of
their own each. Decoders that are not installed (``pip install decord opencv-python-headless torchcodec``) are left out.
Times are medians of ``--rounds``, in turns. The frames of ``here`` are compared with those of a sequential decode.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np

from ds_lvxattn.data.media import Media, decode_frames, probe_video, sample_times
from ds_lvxattn.data.media.files import open_film
from ds_lvxattn.data.media.picture import as_shown

Decoder = Callable[[str, Sequence[Sequence[int]], int], None]  # film, frames of each sample, threads


def make_film(path: Path, frames: int, key_every: int) -> None:
    """A moving test picture with noise in it, so that it is as much work as a film."""
    with av.open("testsrc2=size=1280x720:rate=24", format="lavfi") as picture, av.open(str(path), "w") as film:
        options = {
            "preset": "ultrafast",
            "crf": "28",
            "x264-params": f"keyint={key_every}:min-keyint={key_every}:scenecut=0",
        }
        stream = film.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        noise = np.random.default_rng(0).integers(-12, 12, (16, 1080, 1280), dtype=np.int16)
        for number, frame in zip(range(frames), picture.decode(video=0), strict=False):
            planes = frame.reformat(format="yuv420p").to_ndarray()
            planes = np.clip(planes + noise[number % len(noise)], 0, 255).astype(np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        film.mux(stream.encode())


def here(film: str, samples: Sequence[Sequence[int]], threads: int) -> None:
    media = [Media("video", (film,), tuple(frames)) for frames in samples]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(medium.decode, group) for medium in media for group in medium.groups(medium.frames)]
        for job in jobs:
            job.result()


def by_sample(decode: Callable[[str, Sequence[int]], None]) -> Decoder:
    """A decoder that takes whole samples."""

    def run(film: str, samples: Sequence[Sequence[int]], threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda frames: decode(film, frames), samples))

    return run


def with_decord(film: str, frames: Sequence[int]) -> None:
    import decord

    decord.VideoReader(film, num_threads=1).get_batch(list(frames)).asnumpy()


def with_opencv(film: str, frames: Sequence[int]) -> None:
    import cv2

    reader = cv2.VideoCapture(film, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    for number in frames:
        reader.set(cv2.CAP_PROP_POS_FRAMES, number)
        found, frame = reader.read()
        assert found
        cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def with_torchcodec(film: str, frames: Sequence[int]) -> None:
    from torchcodec.decoders import VideoDecoder

    VideoDecoder(film, num_ffmpeg_threads=1, dimension_order="NHWC").get_frames_at(list(frames))


OTHERS = {"decord": with_decord, "opencv": with_opencv, "torchcodec": with_torchcodec}


def sequential(film: str, numbers: Sequence[int]) -> dict[int, np.ndarray]:
    """Frames by decoding the film from its start, in one thread."""
    found = {}
    with open_film(film) as (container, stream):
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                found[number] = as_shown(frame, None)
            if number >= max(numbers):
                return found
    return found


def installed(film: str) -> dict[str, Decoder]:
    decoders: dict[str, Decoder] = {"here": here}
    for name, decode in OTHERS.items():
        try:
            decode(film, [0])
        except Exception as error:  # not installed, or not for this machine
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            decoders[name] = by_sample(decode)
    return decoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", help="a video file; by default one is made")
    parser.add_argument("--length", type=int, default=2400, help="frames of the film that is made")
    parser.add_argument("--key_every", type=int, default=250, help="frames between its key frames")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--frames", type=int, default=24, help="frames of a sample")
    parser.add_argument(
        "--threads", default=None, help="numbers of threads, with commas; by default 1, 2, 4, ... to all"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    counts = [1 << n for n in range(cores.bit_length()) if 1 << n < cores] + [cores]
    if arguments.threads:
        counts = [int(count) for count in arguments.threads.split(",")]

    with tempfile.TemporaryDirectory() as folder:
        film = arguments.film or f"{folder}/film.mp4"
        if not arguments.film:
            make_film(Path(film), arguments.length, arguments.key_every)
        began = time.perf_counter()
        info = probe_video(film)
        took = time.perf_counter() - began
        print(f"{film}: {info.num_frames} frames of {info.width} x {info.height}; index {took:.2f} s")
        part = info.seconds / arguments.samples
        samples = [
            [info.frame_at(seen) for seen in sample_times(info, arguments.frames, start=part * n, end=part * (n + 1))]
            for n in range(arguments.samples)
        ]
        first = samples[0][:8]
        expected = sequential(film, first)
        for number, frame in zip(first, decode_frames(film, first), strict=True):
            np.testing.assert_array_equal(frame, expected[number])

        decoders = installed(film)
        seconds: dict[tuple[str, int], list[float]] = {}
        for _ in range(arguments.rounds):
            for count in counts:
                for name, decode in decoders.items():
                    began = time.perf_counter()
                    decode(film, samples, count)
                    seconds.setdefault((name, count), []).append(time.perf_counter() - began)
    wanted = sum(map(len, samples))
    rates = {key: wanted / statistics.median(took) for key, took in seconds.items()}
    rows = [
        {
            "decoder": name,
            "threads": count,
            "frames_per_s": round(rate, 2),
            "of_linear": round(rate / (rates[name, counts[0]] * count / counts[0]), 3),
        }
        for (name, count), rate in rates.items()
    ]
    print(f"{cores} cores, {wanted} frames of {arguments.samples} samples")
    for row in rows:
        print("{decoder:>12} {threads:>4} threads {frames_per_s:>9} frames/s {of_linear:>7} of linear".format(**row))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({"cores": cores, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
