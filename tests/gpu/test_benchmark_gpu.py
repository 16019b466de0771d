"""benchmarks/gpu.py runs through on a CPU, on tiny data."""

import json

import pytest
from worlds import python, run

SCRIPT = "benchmarks/gpu.py"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_through_on_tiny_data(tmp_path):
    words = ("--device", "cpu", "--quick", "--json", tmp_path / "gpu.json")
    ended = run(python(SCRIPT, *words), limit=300)
    assert ended.code == 0, ended.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    failed = {
        name: row["error"]
        for part in ("ceilings", "synchronisation", "epochs", "pipeline", "steps")
        for name, row in report[part].items()
        if "error" in row
    }
    assert failed == {}
    assert "random" in ended.stdout.splitlines()[0]


def test_p7_the_gpu_benchmark_needs_a_gpu():
    ended = run(python(SCRIPT), limit=200)
    assert ended.code == 2
    message = "error: there is no CUDA GPU. Give --device cpu --quick to test the script.\n"
    assert ended.stderr == message
