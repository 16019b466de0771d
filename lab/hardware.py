"""What the hardware multiplies fast, and how this process deals with its memory."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

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
