"""benchmarks/gpu.py runs through on a CPU, on tiny data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def benchmark(*words):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_through_on_tiny_data(tmp_path):
    found = benchmark("--device", "cpu", "--quick", "--json", tmp_path / "gpu.json")
    assert found.returncode == 0, found.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    failed = {
        name: row["error"]
        for part in ("ceilings", "synchronisation", "epochs", "pipeline", "steps")
        for name, row in report[part].items()
        if "error" in row
    }
    assert failed == {}
    assert "random" in found.stdout.splitlines()[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_p7_the_gpu_benchmark_needs_a_gpu():
    found = benchmark()
    assert found.returncode == 2
    message = "error: there is no CUDA GPU. Give --device cpu --quick to test the script.\n"
    assert found.stderr == message
