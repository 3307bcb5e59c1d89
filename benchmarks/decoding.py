"""Decoding by number of threads: frames a second of samples that are spread over a long film, against other decoders.

    python benchmarks/decoding.py                      # a film made here: 1280 x 720, a key frame every 250
    python benchmarks/decoding.py --film my_film.mp4

A sample is ``--frames`` frames at equal parts of a stretch of the film, as training asks for them. ``here`` decodes
groups of pictures side by side, one thread each; the others get one sample a thread, and one thread of their own each.
``processes`` is ``here`` with a process for each thread: what this machine gives where nothing is shared. Decoders that
are not installed (``pip install decord opencv-python-headless torchcodec``) are left out.

Every thread takes the next piece of work until ``--seconds`` are over, and counts with the time that it took for its
own: as in training, there is always more to do. Rates are medians of ``--rounds``, in turns. ``of cores`` is the rate
over that of one thread on each physical core, since two logical CPUs of one core share its units. ``busy`` is the part
of its time that a thread computes: what it waits for, a lock, Python's or another, is missing there. CPU time a frame
grows where threads share a core or the memory. The frames of ``here`` are compared with those of a sequential decode.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np

from ds_lvxattn.data.media import Media, decode_frames, probe_video, sample_times
from ds_lvxattn.data.media.files import open_film
from ds_lvxattn.data.media.picture import as_shown

Samples = Sequence[Sequence[int]]  # frames of each
Work = tuple[int, Callable[[], Any]]  # frames, and what decodes them


@dataclass(frozen=True)
class Figures:
    """What threads did side by side.

    Attributes:
        rate: frames a second, of all.
        busy: part of their time for which they computed.
        cpu_ms: CPU time of a frame, in milliseconds.
    """

    rate: float
    busy: float
    cpu_ms: float

    @classmethod
    def of(cls, done: Sequence[tuple[float, float, int]], took: float) -> Figures:
        rates, cpu, frames = zip(*done, strict=True)
        return cls(sum(rates), sum(cpu) / (took * len(done)), 1000 * sum(cpu) / sum(frames))


Measure = Callable[[int, float], Figures]  # by threads and seconds


def make_film(path: Path, frames: int, key_every: int) -> None:
    """A moving test picture with noise in it, so that it is as much work as a film.

    Two groups of pictures are encoded, and stand in the film again and again: a long film is there at once.
    """
    stretch = min(frames, 2 * key_every)
    with av.open("testsrc2=size=1280x720:rate=24", format="lavfi") as picture, av.open(str(path), "w") as film:
        options = {
            "preset": "ultrafast",
            "crf": "28",
            "x264-params": f"keyint={key_every}:min-keyint={key_every}:scenecut=0",
        }
        stream = film.add_stream("libx264", rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        noise = np.random.default_rng(0).integers(-12, 12, (16, 1080, 1280), dtype=np.int16)
        packets = []
        for number, frame in zip(range(stretch), picture.decode(video=0), strict=False):
            planes = frame.reformat(format="yuv420p").to_ndarray()
            planes = np.clip(planes + noise[number % len(noise)], 0, 255).astype(np.uint8)
            packets += stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p"))
        packets += stream.encode()
        # A packet that is written is empty afterwards; this preset has a packet a frame, in order.
        parts = [(bytes(packet), packet.is_keyframe, packet.time_base) for packet in packets]
        for number in range(frames):
            content, is_key, unit = parts[number % stretch]
            packet = av.Packet(content)
            packet.stream, packet.time_base, packet.is_keyframe = stream, unit, is_key
            packet.pts = packet.dts = round(Fraction(number, 24) / unit)
            packet.duration = round(Fraction(1, 24) / unit)
            film.mux(packet)


def of_groups(film: str, samples: Samples) -> list[Work]:
    """Groups of pictures, as training decodes them."""
    media = [Media("video", (film,), tuple(frames)) for frames in samples]
    return [
        (len(group), functools.partial(medium.decode, group))
        for medium in media
        for group in medium.groups(medium.frames)
    ]


def of_samples(decode: Callable[[str, Sequence[int]], None], film: str, samples: Samples) -> list[Work]:
    """Whole samples, of another decoder."""
    return [(len(frames), functools.partial(decode, film, frames)) for frames in samples]


def worked(works: list[Work], numbers: Iterator[int], seconds: float) -> tuple[float, float, int]:
    """What one thread does until ``seconds`` are over: frames a second, seconds of CPU, and frames."""
    began, before, frames = time.perf_counter(), time.thread_time(), 0
    while (took := time.perf_counter() - began) < seconds:
        wanted, work = works[next(numbers) % len(works)]
        work()
        frames += wanted
    return frames / took, time.thread_time() - before, frames


def in_threads(works: list[Work], threads: int, seconds: float) -> Figures:
    numbers = itertools.count()
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        done = list(pool.map(lambda _: worked(works, numbers, seconds), range(threads)))
    return Figures.of(done, time.perf_counter() - began)


def in_processes(film: str, samples: Samples, processes: int, seconds: float) -> Figures:
    spawn = get_context("spawn")
    barrier, results = spawn.Barrier(processes), spawn.SimpleQueue()
    started = [
        spawn.Process(target=_process, args=(film, samples, number, processes, seconds, barrier, results))
        for number in range(processes)
    ]
    for process in started:
        process.start()
    done = [results.get() for _ in started]
    for process in started:
        process.join()
    return Figures.of([result for result, _ in done], max(took for _, took in done))


def _process(film: str, samples: Samples, number: int, step: int, seconds: float, barrier: Any, results: Any) -> None:
    works = of_groups(film, samples)
    barrier.wait()
    began = time.perf_counter()
    result = worked(works, itertools.count(number, step), seconds)
    results.put((result, time.perf_counter() - began))


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


def installed(film: str, samples: Samples) -> dict[str, Measure]:
    """How each decoder that works here is measured, by threads and seconds."""
    decoders: dict[str, Measure] = {
        "here": functools.partial(in_threads, of_groups(film, samples)),
        "processes": functools.partial(in_processes, film, samples),
    }
    for name, decode in OTHERS.items():
        try:
            decode(film, [0])
        except Exception as error:  # not installed, or not for this machine
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            decoders[name] = functools.partial(in_threads, of_samples(decode, film, samples))
    return decoders


def processors() -> dict[str, int]:
    """CPUs that this process may use, and the physical cores that those are part of."""
    own = os.sched_getaffinity(0)
    topology = Path("/sys/devices/system/cpu")
    cores = set()
    for cpu in own:
        names = [topology / f"cpu{cpu}" / "topology" / part for part in ("physical_package_id", "core_id")]
        cores.add(tuple(name.read_text().strip() if name.exists() else str(cpu) for name in names))
    return {"logical_cpus": len(own), "physical_cores": len(cores)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--film", help="a video file; by default one is made")
    parser.add_argument("--length", type=int, default=5000, help="frames of the film that is made")
    parser.add_argument("--key_every", type=int, default=250, help="frames between its key frames")
    parser.add_argument("--samples", type=int, default=16, help="stretches of the film, taken in turns")
    parser.add_argument("--frames", type=int, default=24, help="frames of a sample")
    parser.add_argument(
        "--threads", default=None, help="numbers of threads, with commas; by default 1, 2, 4, ... to all CPUs"
    )
    parser.add_argument("--seconds", type=float, default=5, help="that a measurement takes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", help="write the figures to this JSON file")
    arguments = parser.parse_args()
    machine = processors()
    cpus, cores = machine["logical_cpus"], machine["physical_cores"]
    counts = [1 << n for n in range(cpus.bit_length()) if 1 << n < cpus] + [cpus]
    if arguments.threads:
        counts = [int(count) for count in arguments.threads.split(",")]
    print(f"{cpus} CPUs of {cores} cores")

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

        found: dict[tuple[str, int], list[Figures]] = {}
        decoders = installed(film, samples)
        for _ in range(arguments.rounds):
            for count in counts:
                for name, measure in decoders.items():
                    found.setdefault((name, count), []).append(measure(count, arguments.seconds))
    rates = {key: statistics.median(each.rate for each in figures) for key, figures in found.items()}
    rows = [
        {
            "decoder": name,
            "threads": count,
            "frames_per_s": round(rate, 2),
            "of_linear": round(rate / (rates[name, counts[0]] * count / counts[0]), 3),
            "of_cores": round(rate / (rates[name, counts[0]] * min(count, cores) / counts[0]), 3),
            "busy": round(statistics.median(each.busy for each in found[name, count]), 3),
            "cpu_ms_per_frame": round(statistics.median(each.cpu_ms for each in found[name, count]), 2),
        }
        for (name, count), rate in rates.items()
    ]
    for row in rows:
        print(
            "{decoder:>12} {threads:>4} threads {frames_per_s:>9} frames/s {of_linear:>7} of linear {of_cores:>7} of "
            "cores {busy:>7} busy {cpu_ms_per_frame:>8} ms of CPU a frame".format(**row)
        )
    if arguments.output:
        Path(arguments.output).write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
