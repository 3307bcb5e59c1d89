"""A machine profile: what a cost model must know of a machine, as readable JSON that says where its figures come from.

Profiles of known machines ship with the package (``profiles/*.json``); ``ds_lvxattn.calibrate`` measures one.
Everything here is seconds, bytes and operations a second; the file has milliseconds, gigabytes and tera-operations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).with_name("profiles")
FORMAT = 2

GB, US, MS, TERA = 1e9, 1e-6, 1e-3, 1e12


class ProfileError(ValueError):
    """A profile that cannot be read; the message names the file, the key and what it has to hold."""


@dataclass(frozen=True)
class Link:
    """A way between two GPUs.

    Attributes:
        latency: seconds until the first byte of a message arrives, starting the operation included.
        message: seconds that each further message or ring step of one collective adds.
        bandwidth: bytes a second that one GPU can receive.
        shared: bytes a second that all GPUs of a node can receive together; None when they do not share.
    """

    latency: float
    message: float
    bandwidth: float
    shared: float | None = None


@dataclass(frozen=True)
class Curve:
    """Measured times of one collective on one group.

    Attributes:
        op: ``all_gather``, ``all_to_all``, ``send`` or ``all_reduce``.
        ranks: ranks of the group that was measured.
        points: ``(bytes, seconds)`` in ascending order; bytes that a rank receives from the others.
        level: ``group`` for a group by itself; ``inner`` and ``outer`` for the groups of either level of a grid, all of
            which do the same at the same time.
    """

    op: str
    ranks: int
    points: tuple[tuple[int, float], ...]
    level: str = "group"


@dataclass(frozen=True)
class KernelPoint:
    """One measured attention call of one rank.

    Attributes:
        rows, keys: query rows and keys.
        heads, kv_heads: query and key heads.
        seen: keys that a row sees, on average.
        drift: keys by which the two ends of a row's range move from a row to the next, both added.
        forward, backward: seconds.
    """

    rows: int
    keys: int
    heads: int
    kv_heads: int
    seen: float
    drift: float
    forward: float
    backward: float


@dataclass(frozen=True, eq=False)  # known by identity: hashing its points would cost more than using them
class KernelRates:
    """An attention kernel at one head size: its rate, its tiles and measured points that correct both.

    Attributes:
        name: the kernel (``cudnn``, ``triton``, ...).
        masked: whether it takes intervals.
        head_dim: head size.
        tile_rows: rows of a tile; ``packed``: the query heads of a key head are rows of one tile.
        tile_keys: keys of a tile.
        splits_below: with fewer row tiles the forward pass divides the keys over idle multiprocessors too.
        forward, backward: operations a second on full tiles and a full machine. Operations are
            ``4 * rows * keys * heads * D`` forward and 2.5 times that backward.
        points: measurements.
    """

    name: str
    masked: bool
    head_dim: int
    tile_rows: int
    tile_keys: int
    packed: bool
    splits_below: int
    forward: float
    backward: float
    points: tuple[KernelPoint, ...] = ()


@dataclass(frozen=True)
class HostTime:
    """Seconds that the host needs to issue one layer; it binds where the device is faster.

    Attributes:
        forward, backward: of the layer, projections of K and V among it.
        repeated: what recomputing K and V adds.
    """

    forward: float
    backward: float
    repeated: float


@dataclass(frozen=True)
class Projection:
    """How much longer than by the formula of ``cost`` projecting K and V takes, norm and transposition included.

    Attributes:
        width: of K and of V, heads times head size.
        head_dim: head size.
        forward, backward: measured over computed seconds.
    """

    width: int
    head_dim: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Product:
    """One measured matrix product, ``[rows, inputs]`` by ``[inputs, outputs]`` in the training dtype."""

    rows: int
    inputs: int
    outputs: int
    seconds: float


@dataclass(frozen=True, eq=False)  # known by identity: hashing its points would cost more than using them
class Profile:
    """A machine, or a cluster of equal ones.

    Attributes:
        name, device, source: what it is and where the figures come from.
        multiprocessors: units that work on tiles at the same time.
        memory: bytes a GPU.
        memory_bandwidth: bytes a second, read and written bytes both counted.
        matmul: operations a second of a large matrix product in the training dtype.
        launch: seconds of the smallest kernel on the device.
        overlap: of a transfer and a kernel that run side by side, the share of the shorter one that is really hidden;
            what is missing to 1 is the time by which they slow each other. Not measured by calibration, whose short
            runs give anything from 0.04 to 0.93 on the same machine.
        gpus_per_node: GPUs behind one ``intra`` link.
        intra, inter: links inside a node and between nodes.
        kernels: attention kernels.
        curves: measured collectives; they go before the links where op and ranks agree.
        host: host time by ``strategy/schedule``, and by ``strategy/schedule masked``, on ``host_ranks`` ranks; by the
            names of ``plan/dense.py`` what else a step's layers and ZeRO take of the host.
        projections: of K and V.
        products: measured matrix products, which correct ``matmul`` by their sizes.
        versions: of the software that was measured, by name; none in profiles from before they were noted.
    """

    name: str
    device: str
    source: str
    multiprocessors: int
    memory: float
    memory_bandwidth: float
    matmul: float
    launch: float
    overlap: float
    gpus_per_node: int
    intra: Link
    inter: Link
    kernels: tuple[KernelRates, ...]
    curves: tuple[Curve, ...] = ()
    host: Mapping[str, HostTime] = field(default_factory=dict)
    host_ranks: int = 1
    projections: tuple[Projection, ...] = ()
    products: tuple[Product, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def kernel(self, head_dim: int, masked: bool) -> KernelRates:
        """The kernel for a head size: of the nearest size measured, with a mask if asked for and if known."""
        return self.kernels_for(head_dim, masked)[0]

    def kernels_for(self, head_dim: int, masked: bool) -> tuple[KernelRates, ...]:
        """Every kernel that was measured with a mask or without one, each at the nearest head size."""
        some = [kernel for kernel in self.kernels if kernel.masked == masked] or self.kernels
        nearest: dict[str, KernelRates] = {}
        for kernel in sorted(some, key=lambda kernel: abs(kernel.head_dim - head_dim)):
            nearest.setdefault(kernel.name, kernel)
        return tuple(nearest.values())

    def limited_to(self, names: Collection[str]) -> Profile:
        """The same machine with the kernels of these names; with all where there is none of them."""
        kernels: list[KernelRates] = []
        for masked in (False, True):
            some = [kernel for kernel in self.kernels if kernel.masked == masked]
            kernels += [kernel for kernel in some if kernel.name in names] or some
        return replace(self, kernels=tuple(kernels))

    def projection(self, width: int, head_dim: int) -> Projection:
        """The projection measured with the nearest head size, and of these with the nearest width."""
        return min(
            self.projections,
            key=lambda p: (abs(p.head_dim - head_dim), abs(p.width - width)),
            default=Projection(width, head_dim, 1.0, 1.0),
        )

    def curve(self, op: str, ranks: int) -> Curve | None:
        return next((c for c in self.curves if (c.op, c.ranks, c.level) == (op, ranks, "group")), None)


def shipped_profiles() -> list[str]:
    """Names of the profiles that ship with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load_profile(name: str | Path) -> Profile:
    """A profile by the name of a shipped one or by a path.

    Raises:
        ProfileError: there is none, or it cannot be read.
    """
    path = Path(name)
    if path.suffix != ".json" and not path.is_file():
        path = SHIPPED / f"{name}.json"
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ProfileError(
            f"profile '{name}' cannot be read ({error.strerror}); give a JSON file or one of {shipped_profiles()}"
        ) from error
    except ValueError as error:  # not text, among them
        raise ProfileError(
            f"profile '{name}' is not valid JSON ({error}); 'ds_lvxattn.calibrate' writes one"
        ) from error
    return profile_from_json(data, str(name))


def profile_for_device(device: str) -> Profile:
    """The shipped profile of a device name as torch gives it; the nearest known machine for an unknown GPU."""
    for word, name in (("H200", "h200"), ("H100", "h100"), ("A100", "a100-2x3"), ("cpu", "cpu")):
        if word in device:
            return load_profile(name)
    return load_profile("h100")


def profile_from_json(data: Any, name: str = "profile") -> Profile:
    """A profile from its JSON object; the inverse of ``profile_to_json``.

    Raises:
        ProfileError: a key is missing or holds something else.
    """
    try:
        if data["format"] != FORMAT:
            raise ProfileError(f"{name}: 'format' is {data['format']!r}, this version reads {FORMAT}")
        return Profile(
            name=data["name"],
            device=data["device"],
            source=data["source"],
            multiprocessors=int(data["multiprocessors"]),
            memory=data["memory_gb"] * GB,
            memory_bandwidth=data["memory_bandwidth_gb_per_s"] * GB,
            matmul=data["matmul_tflop_per_s"] * TERA,
            launch=data["launch_us"] * US,
            overlap=float(data["overlap"]),
            gpus_per_node=int(data["gpus_per_node"]),
            intra=_link(data["intra"]),
            inter=_link(data["inter"]),
            kernels=tuple(_kernel(kernel) for kernel in data["kernels"]),
            curves=tuple(
                Curve(c["op"], c["ranks"], tuple((int(b), ms * MS) for b, ms in c["bytes_ms"]), c.get("level", "group"))
                for c in data.get("collectives", ())
            ),
            host={name: HostTime(*(ms * MS for ms in times)) for name, times in data.get("host_ms", {}).items()},
            host_ranks=int(data.get("host_ranks", 1)),
            projections=tuple(Projection(*numbers) for numbers in data.get("projections", ())),
            products=tuple(
                Product(rows, inputs, outputs, ms * MS) for rows, inputs, outputs, ms in data.get("products", ())
            ),
            versions=dict(data.get("versions", {})),
        )
    except KeyError as error:
        raise ProfileError(f"{name}: the key {error} is missing") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"{name}: {error}") from error


def _link(data: Mapping[str, Any]) -> Link:
    shared = data.get("shared_gb_per_s")
    return Link(
        data["latency_us"] * US,
        data["message_us"] * US,
        data["gb_per_s"] * GB,
        None if shared is None else shared * GB,
    )


PRODUCT_KEYS = ("rows", "inputs", "outputs", "ms")
PROJECTION_KEYS = ("width", "head_dim", "forward_over_computed", "backward_over_computed")
POINT_KEYS = ("rows", "keys", "heads", "kv_heads", "seen", "drift", "forward_ms", "backward_ms")


def _kernel(data: Mapping[str, Any]) -> KernelRates:
    points = data.get("points", ())
    return KernelRates(
        name=data["kernel"],
        masked=data["masked"],
        head_dim=data["head_dim"],
        tile_rows=data["tile_rows"],
        tile_keys=data["tile_keys"],
        packed=data["packed"],
        splits_below=data["splits_below_tiles"],
        forward=data["forward_tflop_per_s"] * TERA,
        backward=data["backward_tflop_per_s"] * TERA,
        points=tuple(
            KernelPoint(rows, keys, heads, kv_heads, seen, drift, forward * MS, backward * MS)
            for rows, keys, heads, kv_heads, seen, drift, forward, backward in points
        ),
    )


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """The JSON object of a profile."""

    def link(x: Link) -> dict[str, Any]:
        shared = {} if x.shared is None else {"shared_gb_per_s": _short(x.shared / GB)}
        return {
            "latency_us": _short(x.latency / US),
            "message_us": _short(x.message / US),
            "gb_per_s": _short(x.bandwidth / GB),
            **shared,
        }

    def kernel(x: KernelRates) -> dict[str, Any]:
        return {
            "kernel": x.name,
            "masked": x.masked,
            "head_dim": x.head_dim,
            "tile_rows": x.tile_rows,
            "tile_keys": x.tile_keys,
            "packed": x.packed,
            "splits_below_tiles": x.splits_below,
            "forward_tflop_per_s": _short(x.forward / TERA),
            "backward_tflop_per_s": _short(x.backward / TERA),
            "point_keys": list(POINT_KEYS),
            "points": [
                [p.rows, p.keys, p.heads, p.kv_heads, _short(p.seen), _short(p.drift),
                 _short(p.forward / MS), _short(p.backward / MS)]
                for p in x.points
            ],
        }  # fmt: skip

    return {
        "format": FORMAT,
        "name": profile.name,
        "device": profile.device,
        "source": profile.source,
        "versions": dict(profile.versions),
        "multiprocessors": profile.multiprocessors,
        "memory_gb": _short(profile.memory / GB),
        "memory_bandwidth_gb_per_s": _short(profile.memory_bandwidth / GB),
        "matmul_tflop_per_s": _short(profile.matmul / TERA),
        "launch_us": _short(profile.launch / US),
        "overlap": _short(profile.overlap),
        "gpus_per_node": profile.gpus_per_node,
        "intra": link(profile.intra),
        "inter": link(profile.inter),
        "host_ranks": profile.host_ranks,
        "host_ms": {
            name: [_short(x / MS) for x in (t.forward, t.backward, t.repeated)] for name, t in profile.host.items()
        },
        "projection_keys": list(PROJECTION_KEYS),
        "projections": [[p.width, p.head_dim, _short(p.forward), _short(p.backward)] for p in profile.projections],
        "product_keys": list(PRODUCT_KEYS),
        "products": [[p.rows, p.inputs, p.outputs, _short(p.seconds / MS)] for p in profile.products],
        "collectives": [
            {"op": c.op, "ranks": c.ranks, "bytes_ms": [[b, _short(s / MS)] for b, s in c.points]}
            | ({} if c.level == "group" else {"level": c.level})
            for c in profile.curves
        ],
        "kernels": [kernel(k) for k in profile.kernels],
    }


def _short(x: float) -> float:
    return float(f"{x:.5g}")


def write_profile(profile: Profile, path: Path) -> None:
    """Write the JSON file, one list of numbers a line."""
    text = json.dumps(profile_to_json(profile), indent=1)
    path.write_text(_numbers_on_one_line(text) + "\n")


def _numbers_on_one_line(text: str) -> str:
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m.group(1)) + "]", text)
