"""Memory and threads of a process, and the settings of its Accelerator."""

import psutil
import pytest
import torch

from lab import distributed

GB = 10**9


@pytest.mark.parametrize(("limit", "expected"), [(None, 64), ("max", 64), ("100", 64), ("8", 3)])
def test_the_limit_of_a_container_applies(tmp_path, monkeypatch, limit, expected):
    """The container uses 6 GB, of which 1 GB are cached files."""
    free = psutil.virtual_memory()._replace(available=64 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    container = (str(tmp_path), "memory.max", "memory.current")
    monkeypatch.setattr(distributed, "CONTAINERS", (container,))
    (tmp_path / "memory.current").write_text(f"{6 * GB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {5 * GB}\ninactive_file {GB}\n")
    if limit:
        text = "max" if limit == "max" else str(int(limit) * GB)
        (tmp_path / "memory.max").write_text(f"{text}\n")
    assert distributed.available_memory() == expected * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    share = distributed.memory_for_data(torch.device("cpu"))
    assert share == expected * GB / 8  # half of a quarter


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 8),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "many"}, 8),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4"}, 2),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "4"}, 3),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 8),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
    ],
)
def test_a_process_takes_its_share_of_the_cores(monkeypatch, variables, expected):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "num_cores", lambda: 8)
    assert distributed.default_threads() == expected


def test_the_settings_of_a_run_replace_those_of_an_earlier_one(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # would divide the loss
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for threads, deterministic, precision in ((2, True, "bf16"), (1, False, "no")):
        accelerator = distributed.build_accelerator(
            threads=threads, deterministic=deterministic, mixed_precision=precision, quiet=True
        )
        assert torch.get_num_threads() == threads
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert accelerator.mixed_precision == precision
        assert accelerator.gradient_accumulation_steps == 1
