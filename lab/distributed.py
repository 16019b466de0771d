"""Where a run takes place: the Accelerator, precision and threads; what processes must agree on."""

import ctypes
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast_object_list,
    gather_object,
)

from lab import console
from lab.errors import UserError


@cache
def has_native_bf16(device_type: str) -> bool:
    """Whether the device has bfloat16 arithmetic; emulated, it is slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


@contextmanager
def no_cudnn_benchmark() -> Iterator[None]:
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


COMM_HOOKS = {
    "none": DDPCommunicationHookType.NO,
    "fp16": DDPCommunicationHookType.FP16,
    "bf16": DDPCommunicationHookType.BF16,
    "powersgd": DDPCommunicationHookType.POWER_SGD,
}


def build_accelerator(
    *,
    training: bool = True,
    mixed_precision: str = "auto",
    trained_precision: str | None = None,
    benefits_from_bf16: bool = False,
    cpu_bf16: bool = True,
    threads: int = 0,
    deterministic: bool = False,
    comm_hook: str = "none",
    timeout_seconds: int = 600,
    quiet: bool = False,
    cpu: bool = False,
) -> Accelerator:
    """The Accelerator of this process, joined with the others that its launcher started.

    Raises `UserError` where the launcher's processes would each train alone, and for a precision
    that the device lacks.
    """
    device_type = init_distributed(timeout_seconds, quiet, cpu).device.type
    precision = choose_precision(
        mixed_precision, device_type, benefits_from_bf16, trained_precision, cpu_bf16
    )
    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=device_type == "cpu",
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                comm_hook=COMM_HOOKS[comm_hook],
                # PyTorch's own default, 1,000, would leave short runs uncompressed.
                comm_state_option={"start_powerSGD_iter": 10} if comm_hook == "powersgd" else {},
            ),
        ],
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "lab does not train under FSDP yet", "Launch with accelerate_configs/multi_gpu.yaml"
        )
    keep_freed_memory()
    torch.set_num_threads(threads or default_threads())
    if device_type == "cuda":
        # TensorFloat-32 unless float32 was asked for by name.
        tf32 = mixed_precision != "no"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        # Kernels chosen by timing differ from run to run: for training only.
        torch.backends.cudnn.benchmark = training and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    return accelerator


def init_distributed(
    timeout_seconds: int = 600, quiet: bool = False, cpu: bool = False
) -> PartialState:
    """The world of processes that the launcher started, which this one has joined.

    Raises `UserError` where the launcher's processes would each train alone.
    """
    _refuse_a_lone_launch()
    _refuse_restarts_in_an_old_store()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but MASTER_ADDR is not set",
            "Start with accelerate launch or torchrun, or unset WORLD_SIZE",
        )
    found = torch.accelerator.current_accelerator(check_available=True)
    # Without it, a CPU world started by torchrun or a MULTI_GPU file is one world a process.
    world = PartialState(
        cpu=cpu or found is None or _flag("ACCELERATE_USE_CPU"),
        timeout=timedelta(seconds=timeout_seconds),
    )
    if world.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes, but they do not form one world "
            f"(this one sees {world.num_processes})",
            "Launch with `accelerate launch --config_file accelerate_configs/multi_cpu.yaml`",
        )
    console.configure(main_process=world.is_main_process, quiet=quiet)
    return world


def choose_precision(
    requested: str,
    device_type: str,
    benefits_from_bf16: bool,
    trained_precision: str | None = None,
    cpu_bf16: bool = True,
) -> str:
    """The precision "no", "bf16" or "fp16"; raises `UserError` for fp16 on a CPU.

    "auto" is what the weights were `trained_in`; else what `accelerate launch --mixed_precision`
    names; else bfloat16 where the hardware multiplies it and the network gains (CPU: `cpu_bf16`).
    """
    if requested == "auto" and trained_precision:
        return "no" if trained_precision == "fp16" and device_type == "cpu" else trained_precision
    if requested == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched in ("bf16", "fp16"):
            requested = launched
        else:
            gains = benefits_from_bf16 and (cpu_bf16 or device_type != "cpu")
            requested = "bf16" if gains and has_native_bf16(device_type) else "no"
    if requested == "fp16" and device_type == "cpu":
        raise UserError(
            "--mixed-precision fp16: a CPU cannot train in fp16",
            "Give --mixed-precision bf16 or no",
        )
    return requested


def local_world_size() -> int:
    """Processes of this run on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """CPU threads of a process: what the user's OMP_NUM_THREADS says, else its share of the cores.

    Launchers set OMP_NUM_THREADS=1 on their own: a 1 under a launcher is not the user's word.
    A process that notebook_launcher forked has one: had the notebook computed with more, they are
    not in the copy, which would wait for them for ever.
    """
    if type(multiprocessing.current_process()).__name__ == "ForkProcess":
        return 1
    launched = {"LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) > (1 if launched else 0):
        return int(chosen)
    return max(1, num_cores() // local_world_size())


def memory_for_data(device: torch.device) -> float:
    """Return how many bytes of decoded images a process may hold, those of all splits together.

    Half of its share of what is available on the host, and of what is free on its GPU.
    """
    free = available_memory() / local_world_size()
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free / 2


def describe(accelerator: Accelerator) -> dict[str, Any]:
    """Where this run takes place, as config.json keeps it."""
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = str(torch.cpu.get_capabilities().get("cpu_name", platform.machine()))
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    float32 = "float32 (TF32 products)" if tf32 else "float32"
    precision = {"no": float32, "bf16": "bfloat16", "fp16": "float16"}
    return {
        "device": device.type,
        "device_name": name,
        "world_size": accelerator.num_processes,
        "precision": precision[accelerator.mixed_precision],
        "threads": torch.get_num_threads(),
    }


@contextmanager
def raise_on_all_ranks(world: Accelerator | PartialState) -> Iterator[None]:
    """A stretch that all processes pass or none: a `UserError` on one is raised on every process.

    So the main process can print it, whoever met it, and no process waits for one that is gone.
    """
    mistake: UserError | None = None
    try:
        yield
    except UserError as error:
        mistake = error
    if world.num_processes > 1:
        mistakes = gather_object([(mistake.what, mistake.hint) if mistake else None])
        others = next((m for m in mistakes if m), None)
        if mistake is None and others:
            mistake = UserError(*others)
    if mistake:
        raise mistake


def check_same_data(
    world: Accelerator | PartialState,
    fingerprints: Mapping[str, str],
    list_samples: Callable[[], Any],
) -> None:
    """Raise `UserError` on every process where one has other data than the main process.

    Called by all processes together. `fingerprints` are this process's; where they differ,
    `list_samples` reads a `lab.data.fingerprint.Listing`, which says in what.
    """
    if world.num_processes == 1:
        return
    gathered = gather_object([dict(fingerprints)])
    others = [str(rank) for rank, found in enumerate(gathered) if found != gathered[0]]
    if not others:
        return
    with raise_on_all_ranks(world):
        mine = list_samples()
    reference = broadcast_object_list([mine])[0]
    differences = gather_object([reference.first_difference(mine)])
    rank, difference = next(
        ((rank, text) for rank, text in enumerate(differences) if text),
        (others[0], "the splits differ, the files do not"),
    )
    shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    raise UserError(
        f"{f'process {shown} has' if len(others) == 1 else f'processes {shown} have'} other data "
        f"than process 0 (on process {rank}, {difference})",
        "Give every machine a copy of the same files",
    )


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _refuse_restarts_in_an_old_store() -> None:
    """Raises where a restarted world would find the addresses of its dead processes.

    torchrun's store outlives them unless it is told otherwise, and a new process now and then reads
    what an old one wrote (https://github.com/pytorch/pytorch/issues/135712).
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and _flag("TORCHELASTIC_USE_AGENT_STORE"):
        raise UserError(
            "--max-restarts would start anew with the addresses of the processes that died",
            "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and give torchrun --standalone, or "
            "--rdzv-backend c10d for several machines",
            rank_local=True,
        )


def _refuse_a_lone_launch() -> None:
    """Raises where `accelerate launch --cpu --num_processes N` started one process instead of N.

    Its simple launcher takes that path in silence (Accelerate 1.15) and leaves no trace in the
    environment, so the parent's command line is read.
    """
    if "WORLD_SIZE" in os.environ or not _flag("ACCELERATE_USE_CPU"):
        return
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return
    for i, word in enumerate(words):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes":
            count = value or "".join(words[i + 1 : i + 2])
            if count.isdigit() and int(count) > 1:
                raise UserError(
                    f"accelerate launch --cpu --num_processes {count} started one process",
                    "Launch with `--config_file accelerate_configs/multi_cpu.yaml`, or torchrun",
                )
