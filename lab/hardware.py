"""What the hardware multiplies fast, and how this process deals with its memory."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil
import torch


@cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Whether the device has bfloat16 arithmetic; emulated, it is slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


@contextmanager
def untimed_kernels() -> Iterator[None]:
    """cuDNN's own choice of kernels meanwhile, not the fastest of a trial: the same in each run."""
    timed = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = timed


def keep_freed_memory() -> None:
    """Has this process keep what a step frees, in large pages, for the next step's tensors.

    Else each step hands its memory back and gets it again page by page, zeroed: on a CPU up to a
    quarter of LeNet-5's time (benchmarks/RESULTS.md).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at PyTorch's first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # glibc's; malloc.h: the thresholds for a mapping of its own, for giving back
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the highest it takes
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that can be allocated on this host, or in the container if it has less.

    `root` is the directory that contains /proc and /sys.
    """
    return min([psutil.virtual_memory().available, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Yield what each control group that this process is in has left, up to the outermost.

    A limit of any of them holds. Within a container the path is often the host's, of which only
    the outermost directory is there. (Linux, Documentation/admin-guide/cgroup-v2.rst and -v1.)
    """
    mount = root / "sys/fs/cgroup"
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                mounts, files = [mount, mount / "unified"], ("max", "current", "inactive_file")
            elif "memory" in controllers.split(","):
                mounts = [mount / "memory"]
                files = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
            else:
                continue
            inner = Path(path.lstrip("/"))
            for directory in (base / part for base in mounts for part in (inner, *inner.parents)):
                with suppress(OSError, ValueError):  # of no limit, the text is "max"
                    limit, used = (
                        int((directory / f"memory.{name}").read_text()) for name in files[:2]
                    )
                    yield max(0, limit - used + _reclaimable(directory, files[2]))


def _reclaimable(directory: Path, name: str) -> int:
    """Return the bytes of cached files that the kernel drops before a group's limit is reached."""
    lines = (directory / "memory.stat").read_text().splitlines()
    return next((int(value) for key, value in map(str.split, lines) if key == name), 0)
