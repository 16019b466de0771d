"""accelerate_configs/slurm.sbatch with substitutes for srun, scontrol and python."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from worlds import ROOT

from lab.config.cli import parse_arguments
from lab.config.schema import TrainConfig

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "accelerate_configs" / "slurm.sbatch"
SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done      # options of srun
SLURM_PROCID=11 SLURM_LOCALID=3 exec "$@"        # one task of sixteen; a signal reaches it
"""
SCONTROL = """
if [ "$1" = show ]; then printf '%s\\n' node7 node8; else echo "$@" > requeued; fi
"""
TRAINING = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))  # a shell cannot trap it
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
with open("environment", "w") as file:
    print(*(os.environ[name] for name in names), file=file)
with open("arguments", "w") as file:
    print(*sys.argv[1:], sep="\\n", file=file)
if os.environ["ENDS_WITH"]:
    sys.exit(int(os.environ["ENDS_WITH"]))
time.sleep(60)
"""


@pytest.fixture
def job(tmp_path):
    """A function that runs the script, with SIGUSR1 if `warn`, and returns the exit code."""
    programs = {"srun": SRUN, "scontrol": SCONTROL, "python": TRAINING}
    for name, text in programs.items():
        interpreter = sys.executable if name == "python" else "/bin/bash"
        (tmp_path / name).write_text(f"#!{interpreter}\n{text}")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_CPUS_PER_TASK": "8",
    }

    def run(ends_with: str = "", warn: bool = False) -> int:
        process = subprocess.Popen(
            ["bash", str(SCRIPT)], cwd=tmp_path, env=env | {"ENDS_WITH": ends_with}
        )
        try:
            while warn and not (tmp_path / "arguments").exists() and process.poll() is None:
                time.sleep(0.02)
            if warn:
                process.send_signal(signal.SIGUSR1)
            return process.wait(30)
        finally:
            process.kill()

    return run


def test_a_job_that_is_warned_is_requeued(job, tmp_path):
    assert job(warn=True) == 143
    assert (tmp_path / "requeued").read_text() == "requeue 123456\n"


@pytest.mark.parametrize("code", ["0", "2", "143"])
def test_a_job_that_ends_otherwise_is_not_requeued(job, tmp_path, code):
    assert job(ends_with=code) == int(code)
    assert not (tmp_path / "requeued").exists()


def test_a_task_gets_its_rank_and_valid_options(job, tmp_path):
    job(ends_with="0")
    assert (tmp_path / "environment").read_text() == "11 3 16 8 node7 23456\n"
    script, *options = (tmp_path / "arguments").read_text().splitlines()
    assert script == "train.py"
    overrides = parse_arguments(TrainConfig, options, prog=script, description="")
    assert overrides["resume"] == "auto"
    assert overrides["name"]


def test_sbatch_options_come_before_the_first_command():
    """Slurm ignores later ones."""
    lines = [line for line in Path(SCRIPT).read_text().splitlines() if line.strip()]
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:USR1@120" in lines[:first]
    assert "#SBATCH --requeue" in lines[:first]
