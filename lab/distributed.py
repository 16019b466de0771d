"""Processes and hardware: the Accelerator, precision, threads, memory, and errors on all ranks."""

import ctypes
import gc
import multiprocessing
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, gather_object

from lab import console
from lab.errors import UserError, name_some


@cache
def has_native_bf16(device_type: str) -> bool:
    """Return whether the device has bfloat16 arithmetic; emulated, it is slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


@contextmanager
def no_cudnn_benchmark() -> Iterator[None]:
    """Disable cuDNN's benchmark in the block, so that it uses the same kernels in each run."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def keep_freed_memory() -> None:
    """Keep the memory that a step frees, in large pages, for the tensors of the next step.

    Otherwise each step returns its memory to the system and gets it back page by page, zeroed. On a
    CPU this takes up to a quarter of LeNet-5's time (benchmarks/RESULTS.md).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at PyTorch's first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # glibc only; the constants are in malloc.h
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, its maximum
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


# Version 2 and 1 of control groups: the directory, and its files with the limit and the use.
CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available_memory() -> int:
    """Return the bytes that are available on this host, or in the container if they are fewer."""
    memory = psutil.virtual_memory().available
    for directory, limit, use in CONTAINERS:
        with suppress(OSError, ValueError):  # without a limit, the text is "max"
            free = int(Path(directory, limit).read_text()) - int(Path(directory, use).read_text())
            lines = Path(directory, "memory.stat").read_text().splitlines()
            sizes = dict(line.split(maxsplit=1) for line in lines)
            # Cached files, which the system can drop.
            free += int(sizes.get("total_inactive_file") or sizes.get("inactive_file", "0"))
            memory = min(memory, max(0, free))
    return memory


def build_accelerator(
    *,
    training: bool = True,
    mixed_precision: str = "auto",
    trained_precision: str | None = None,
    benefits_from_bf16: bool = False,
    cpu_bf16: bool = True,
    threads: int = 0,
    deterministic: bool = False,
    timeout_seconds: int = 600,
    quiet: bool = False,
    cpu: bool = False,
) -> Accelerator:
    """Return the Accelerator of this process, connected to all processes of its launcher.

    Raises `UserError` if the launcher's processes would each train alone, or the device does not
    support the precision.
    """
    device_type = init_distributed(timeout_seconds, quiet, cpu).device.type
    precision = choose_precision(
        mixed_precision, device_type, benefits_from_bf16, trained_precision, cpu_bf16
    )
    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=device_type == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    # The user's environment may set it; then `backward` would divide the loss by it.
    accelerator.gradient_accumulation_steps = 1
    torch.set_num_threads(threads or default_threads())
    if device_type == "cuda":
        tf32 = mixed_precision != "no"  # "no" requests float32 explicitly
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        # Kernels chosen by benchmarks differ from run to run: for training only.
        torch.backends.cudnn.benchmark = training and not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)  # imports torch._inductor: seconds
    return accelerator


def init_distributed(
    timeout_seconds: int = 600, quiet: bool = False, cpu: bool = False
) -> PartialState:
    """Connect this process to all processes of its launcher, and return their shared state.

    Raises `UserError` if the launcher's processes would each train alone, or each have a part of
    the model.
    """
    keep_freed_memory()
    _check_sharding()
    _check_cpu_launch()
    _check_restarts()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    _check_address(world_size)
    device = torch.accelerator.current_accelerator(check_available=True)
    # Without cpu=True, each CPU process of torchrun or a MULTI_GPU file would be its own world.
    cpu = cpu or device is None or _flag("ACCELERATE_USE_CPU")
    if world_size == 1:  # an earlier run in this process may have had another device
        earlier = PartialState._shared_state.get("device")
        if earlier and cpu != (earlier.type == "cpu"):
            PartialState._reset_state()
    world = PartialState(cpu=cpu, timeout=timedelta(seconds=timeout_seconds))
    if world.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes, but they are not connected (the world "
            f"size of this one is {world.num_processes})",
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
    """Return the precision "no", "bf16" or "fp16". Raises `UserError` for fp16 on a CPU, and fp8.

    "auto" is the precision in which the weights were trained, if any; or else that of `accelerate
    launch --mixed_precision`; or else bfloat16 if the device has it natively and it makes the model
    faster (on a CPU: `cpu_bf16`).
    """
    if requested == "auto" and trained_precision:
        return "no" if trained_precision == "fp16" and device_type == "cpu" else trained_precision
    if requested == "auto":
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched == "fp8":
            raise UserError(
                "accelerate launch --mixed_precision fp8 is not supported",
                "Give bf16, fp16 or no",
            )
        if launched in ("bf16", "fp16"):
            requested = launched
        else:
            is_faster = benefits_from_bf16 and (cpu_bf16 or device_type != "cpu")
            requested = "bf16" if is_faster and has_native_bf16(device_type) else "no"
    if requested == "fp16" and device_type == "cpu":
        raise UserError(
            "--mixed-precision fp16: a CPU cannot train in fp16",
            "Give --mixed-precision bf16 or no",
        )
    return requested


def local_world_size() -> int:
    """Return the number of processes of this run on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Return the user's OMP_NUM_THREADS, or this process's share of the cores if it is not set.

    Launchers set OMP_NUM_THREADS=1 themselves, so a 1 is ignored under a launcher. A process forked
    by notebook_launcher has one thread: it would wait forever for the threads that the notebook had
    started, as a fork does not copy them.
    """
    if type(multiprocessing.current_process()).__name__ == "ForkProcess":
        return 1
    launched = {"LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > (1 if launched else 0):
        return int(threads)
    return max(1, num_cores() // local_world_size())


def memory_for_data(device: torch.device) -> float:
    """Return the bytes of decoded images of all splits that a process may hold in memory.

    This is half of its share of the host's available memory, and at most half of its GPU's free
    memory.
    """
    free = available_memory() / local_world_size()
    if device.type == "cuda":
        gc.collect()  # the data of an earlier run in this process
        torch.cuda.empty_cache()
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free / 2


def describe(accelerator: Accelerator) -> dict[str, Any]:
    """Return the device, world size, precision and threads for config.json."""
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
    """Raise a `UserError` of the block on all processes if it is raised on any of them.

    So the main process can print it, and no process waits for one that has ended.
    """
    mistake: UserError | None = None
    try:
        yield
    except UserError as error:
        mistake = error
    if world.num_processes > 1:
        mistakes = gather_object([(mistake.what, mistake.hint) if mistake else None])
        first = next((m for m in mistakes if m), None)
        if mistake is None and first:
            mistake = UserError(*first)
    if mistake:
        raise mistake


def check_same_data(world: Accelerator | PartialState, fingerprints: Mapping[str, str]) -> None:
    """Raise `UserError` on every process if one has other data than the main process.

    All processes must call it, with the fingerprints of their splits.
    """
    if world.num_processes == 1:
        return
    gathered = gather_object([dict(fingerprints)])
    ranks = [str(rank) for rank, values in enumerate(gathered) if values != gathered[0]]
    if ranks:
        raise UserError(
            f"processes with other data than process 0: {name_some(ranks, 8)}",
            "Give every machine a copy of the same files",
        )


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


# Variables of mpirun with the number of processes, which Accelerate reads as well.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def _check_address(world_size: int) -> None:
    """Raise `UserError` if the environment is that of several processes that cannot connect.

    Warns if Slurm started several processes that would each train alone.
    """
    if "MASTER_ADDR" in os.environ:
        return
    names = [name for name in MPI_SIZES if os.environ.get(name, "1") != "1"]
    names += ["LOCAL_RANK"] if "LOCAL_RANK" in os.environ else []
    names = ["WORLD_SIZE"] if world_size > 1 else names
    if names:
        raise UserError(
            f"{names[0]} is {os.environ[names[0]]}, but MASTER_ADDR is not set",
            f"Start with accelerate launch or torchrun, or unset {names[0]}",
        )
    num_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if num_tasks != "1":
        console.warn(
            f"srun started {num_tasks} processes without MASTER_ADDR: each runs alone. "
            "docs/clusters.md shows how to connect them."
        )


# What Accelerate's configuration files and options may ask for, by the variable that they set.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


def _check_sharding() -> None:
    """Raise `UserError` if the launcher's configuration divides the model among the processes."""
    for variable, name in SHARDING.items():
        if _flag(variable):
            raise UserError(
                f"the launcher's configuration asks for {name}, but lab gives each process the "
                "whole model",
                "Launch with accelerate_configs/multi_gpu.yaml; docs/launching.md says how to save "
                "memory",
                rank_local=True,  # the launcher may stop process 0 before it has printed
            )


def _check_restarts() -> None:
    """Raise `UserError` if a restarted world would read the addresses of its old processes.

    By default torchrun's store outlives the processes, and a new process sometimes reads what an
    old one wrote (https://github.com/pytorch/pytorch/issues/135712).
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and _flag("TORCHELASTIC_USE_AGENT_STORE"):
        raise UserError(
            "after a restart by --max-restarts, processes may use the addresses of the old ones",
            "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and give torchrun --standalone, or "
            "--rdzv-backend c10d for several machines",
            rank_local=True,
        )


def _check_cpu_launch() -> None:
    """Raise `UserError` if `accelerate launch --cpu --num_processes N` started a single process.

    Accelerate 1.15 does so silently, and nothing in the environment shows it, so this function
    reads the command line of the parent process.
    """
    if "WORLD_SIZE" in os.environ or not _flag("ACCELERATE_USE_CPU"):
        return
    try:
        parent = psutil.Process().parent()
        arguments = parent.cmdline() if parent else []
    except psutil.Error:
        return
    for i, argument in enumerate(arguments):
        name, _, value = argument.replace("-", "_").partition("=")
        if name == "__num_processes":
            count = value or "".join(arguments[i + 1 : i + 2])
            if count.isdigit() and int(count) > 1:
                raise UserError(
                    f"accelerate launch --cpu --num_processes {count} started one process",
                    "Launch with `--config_file accelerate_configs/multi_cpu.yaml`, or torchrun",
                )
