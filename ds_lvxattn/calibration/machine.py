"""What one device is and does: memory, matrix products, the smallest kernel."""

from __future__ import annotations

import contextlib
import importlib.metadata
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

from ds_lvxattn.calibration.clock import Clock
from ds_lvxattn.groups import launched_ranks_of_host


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def memory(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def gpus_per_node(device: torch.device) -> int:
    there = torch.cuda.device_count() if device.type == "cuda" else dist.get_world_size()
    return launched_ranks_of_host() or there


def versions(device: torch.device) -> dict[str, str]:
    """Of the software that attention kernels on ``device`` come from, by name; without what is not installed."""
    found: dict[str, str] = {"torch": torch.__version__}
    if device.type == "cuda":
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    with contextlib.suppress(ImportError):
        import triton

        found["Triton"] = triton.__version__
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["flash-attn-4"] = importlib.metadata.version("flash-attn-4")
    return found


def first_of_host() -> bool:
    """Whether this is the first rank of its host; all ranks of the world call it."""
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts.index(socket.gethostname()) == dist.get_rank()


def small_kernel(device: torch.device) -> Callable[[], object]:
    x = torch.zeros(256, device=device)
    return lambda: x.add_(1.0)


def fastest_copy(clock: Clock, device: torch.device) -> float:
    """Bytes a second, read and written both counted."""
    source = torch.empty(1 << (28 if device.type == "cuda" else 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.seconds(lambda: target.copy_(source))


def matmul(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a projection of visual tokens."""
    tokens, width = (65536, 4096) if device.type == "cuda" else (512, 256)
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    w = torch.randn(width, width // 4, device=device, dtype=dtype)
    return 2.0 * tokens * width * (width // 4) / clock.seconds(lambda: x @ w)
