"""The same command under python, torchrun and accelerate launch gives the same result."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from worlds import ROOT, accelerate, free_port, python, run, run_all, torchrun

import evaluate
from lab import distributed
from lab.errors import UserError

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
OPTIONS = [
    *("--recipe", "smoke", "--dataset", "digits"),
    *("--log-every", "1", "--threads", "1", "--quiet"),
]


def train(launcher, folder: Path, *launch_options: object) -> Path:
    """Train briefly with `launcher`, a function of worlds.py, and return the run's directory."""
    ended = run(launcher(*launch_options, "train.py", *options_for(folder)), limit=100)
    assert ended.code == 0, ended.stderr
    assert ended.left_behind == []
    return folder / "run"


def options_for(folder: Path) -> list[str]:
    return [*OPTIONS, "--output-dir", str(folder), "--name", "run"]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def check_same_run(run_dir: Path, expected: Path, world_size: int) -> None:
    """Check that the report is the same, and the losses within floating-point tolerance."""
    assert read_json(run_dir / "config.json")["world_size"] == world_size
    report, other = read_json(run_dir / "report.json"), read_json(expected / "report.json")
    assert report.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-4)
    assert report == other  # accuracy, F1, per class, confusion matrix, best epoch
    for name, keys in (("history.jsonl", ("train_loss", "val_loss")), ("steps.jsonl", ("loss",))):
        rows, others = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for folder in (run_dir, expected)
        )
        assert len(rows) == len(others)
        for key in keys:
            expected_losses = [row[key] for row in others]
            assert [row[key] for row in rows] == pytest.approx(expected_losses, rel=1e-4)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """The directory of a run of `python train.py`."""
    return train(python, tmp_path_factory.mktemp("single"))


@pytest.mark.slow
def test_torchrun(single, tmp_path):
    check_same_run(train(torchrun, tmp_path, 2), single, world_size=2)


@pytest.mark.parametrize(
    ("config", "world_size"),
    [pytest.param("single_cpu", 1, marks=pytest.mark.slow), ("multi_cpu", 2)],
)
def test_accelerate_launch(single, tmp_path, config, world_size):
    check_same_run(train(accelerate, tmp_path, config), single, world_size)


@pytest.mark.slow
def test_two_machines(single, tmp_path):
    port = free_port()
    commands = [
        accelerate(
            "multi_node",
            *("--num_machines", 2, "--num_processes", 2, "--machine_rank", machine),
            *("--main_process_ip", "127.0.0.1", "--main_process_port", port),
            *("train.py", *options_for(tmp_path)),
        )
        for machine in range(2)
    ]
    for ended in run_all(commands, limit=100):
        assert ended.code == 0, ended.stderr
        assert ended.left_behind == []
    check_same_run(tmp_path / "run", single, world_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_p1_evaluate_repeats_the_report(single, tmp_path, num_processes):
    argv = (single, "--output", tmp_path, "--threads", 1, "--quiet")
    if num_processes == 1:
        evaluate.main(list(map(str, argv)))
    else:
        ended = run(torchrun(2, "evaluate.py", *argv), limit=60)
        assert ended.code == 0, ended.stderr
    for name in ("report.json", "predictions.csv"):
        assert (tmp_path / name).read_bytes() == (single / name).read_bytes()


def test_two_runs_at_once_get_different_directories(tmp_path):
    options = [*OPTIONS, "--max-steps", "2", "--output-dir", str(tmp_path)]
    for ended in run_all([python("train.py", *options)] * 2, limit=60):
        assert ended.code == 0, ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"lenet5-digits", "lenet5-digits-2"}
    for path in tmp_path.iterdir():
        assert len((path / "steps.jsonl").read_text().splitlines()) == 2
        assert read_json(path / "report.json")["num_samples"] == 100


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_config_file(path):
    config = load_config_from_file(str(path))  # raises for an unknown key
    name = path.stem
    assert config.compute_environment.value == "LOCAL_MACHINE"
    assert config.use_cpu == ("cpu" in name)
    assert config.mixed_precision == ("bf16" if "bf16" in name else "no")
    assert config.machine_rank == 0
    assert config.num_processes % config.num_machines == 0
    if name.startswith("single"):
        assert config.distributed_type.value == "NO"
        assert (config.num_machines, config.num_processes) == (1, 1)
    else:
        assert config.distributed_type.value == "MULTI_GPU"
        assert config.num_processes > 1
    if name == "multi_node":
        assert config.num_machines == 2
        assert config.main_process_ip
        assert (
            config.main_process_port > 0
        )  # 0 would be any free port, but all machines must know it
    elif name.startswith("multi"):
        assert config.num_machines == 1
        assert config.main_process_port == 0
    assert f"accelerate_configs/{path.name}" in path.read_text()  # how to use it
    if name == "multi_cpu":
        assert config.gpu_ids == "-1,-1"


def test_there_are_config_files():
    assert {"single_cpu", "multi_cpu", "single_gpu", "multi_gpu", "multi_node"} <= {
        path.stem for path in CONFIGS
    }


def test_p7_a_launch_under_fsdp_is_rejected(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: sharded)
    with pytest.raises(UserError, match="does not support FSDP"):
        distributed.build_accelerator(quiet=True)
