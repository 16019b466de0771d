"""The same command under python and accelerate launch gives the same result."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from test_lost import rows, steps_taken
from worlds import ROOT, accelerate, python, run, run_all, torchrun

import evaluate
import train
from lab import distributed
from lab.errors import UserError

OTHER_LAUNCHERS = ("sky.yaml", "trainjob.yaml")
CONFIGS = sorted(
    path
    for path in (ROOT / "accelerate_configs").glob("*.yaml")
    if path.name not in OTHER_LAUNCHERS
)
OPTIONS = [
    *("--recipe", "smoke", "--dataset", "digits"),
    *("--log-every", "1", "--threads", "1", "--quiet"),
]


def options_for(folder: Path) -> list[str]:
    return [*OPTIONS, "--output-dir", str(folder), "--name", "run"]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def check_same_run(run_dir: Path, expected: Path, world_size: int) -> None:
    """Check that the report is the same, and the losses within floating-point tolerance."""
    assert read_json(run_dir / "config.json")["world_size"] == world_size
    report, other = read_json(run_dir / "report.json"), read_json(expected / "report.json")
    for key in ("loss", "calibration_error"):
        assert report.pop(key) == pytest.approx(other.pop(key), rel=1e-4)
    for row, other_row in zip(report.pop("coverage"), other.pop("coverage"), strict=True):
        assert row == pytest.approx(other_row, rel=1e-4)
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
def multi_cpu(tmp_path_factory) -> Path:
    """The directory of a run of `accelerate launch` on two processes."""
    folder = tmp_path_factory.mktemp("multi_cpu")
    ended = run(accelerate("multi_cpu", "train.py", *options_for(folder)), limit=200)
    assert ended.code == 0, ended.stderr
    assert ended.left_behind == []
    return folder / "run"


def test_p2_accelerate_launch_trains_as_one_process_does(multi_cpu, tmp_path):
    train.main(options_for(tmp_path))
    check_same_run(multi_cpu, tmp_path / "run", world_size=2)
    for name in ("report.json", "predictions.csv"):
        evaluate.main([str(tmp_path / "run"), "--threads", "1", "--quiet"])
        again = tmp_path / "run" / "evaluate-test" / name
        assert again.read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_p3_p7_a_crashed_process_ends_the_world_which_torchrun_restarts(multi_cpu, tmp_path):
    """--resume auto continues the run, which ends as an uninterrupted one."""
    script = ("tests/helpers/checks_failures.py", "crash", *options_for(tmp_path))
    command = torchrun(2, *script, "--resume", "auto", "--checkpoint-every", 2, max_restarts=1)
    ended = run(command, limit=200, env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    assert ended.code == 0, ended.stderr
    assert ended.left_behind == []
    assert ended.stdout.count("fault at") == 1
    # Only the process at fault prints a traceback of lab, with the reason; torchrun stopped the
    # other one before it printed that it had lost the connection.
    assert ended.stderr.count("in run_script") == 1
    assert "RuntimeError: a fault on rank 1" in ended.stderr
    assert ended.errors == []
    first, second = steps_taken(ended)
    assert first == second < 20
    for name in ("best.safetensors", "report.json", "predictions.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (multi_cpu / name).read_bytes()
    for name in ("history.jsonl", "steps.jsonl"):
        assert rows(tmp_path / "run" / name) == rows(multi_cpu / name)


def test_two_runs_at_once_get_different_directories(tmp_path):
    options = [*OPTIONS, "--max-steps", "2", "--output-dir", str(tmp_path)]
    for ended in run_all([python("train.py", *options)] * 2, limit=200):
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


@pytest.mark.parametrize("variable", distributed.SHARDING)
def test_p7_a_launch_that_divides_the_model_is_rejected(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"asks for {distributed.SHARDING[variable]}, but lab"):
        distributed.init_distributed(quiet=True)


def test_p7_the_launcher_sets_the_variables_that_are_rejected():
    config = str(ROOT / "accelerate_configs" / "multi_gpu.yaml")
    options = ["--config_file", config, "--use_fsdp", "--fsdp_version", "2", "train.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
    environment = prepare_multi_gpu_env(arguments)
    assert environment.keys() & distributed.SHARDING.keys() == {"ACCELERATE_USE_FSDP"}
