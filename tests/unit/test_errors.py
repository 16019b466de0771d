"""P7: what a user can get wrong ends in one `error: WHAT. HINT.`, code 2, and touches no file."""

import errno
import os
import pickle
import resource
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from mistakes import FULL, NO_FOLDER

import train
from export import ExportConfig
from lab import console, distributed
from lab.checkpoint.atomic_io import os_errors_as_user_errors
from lab.checkpoint.run_dir import RunDir
from lab.config import recipes
from lab.config.cli import parse_arguments
from lab.config.schema import EvalConfig
from lab.data import DATASETS
from lab.distributed import build_accelerator
from lab.errors import UserError, as_user_error, first_line, run_script
from lab.models import MODELS
from lab.report.compare import CompareConfig
from predict import PredictConfig

DIGITS = ("--dataset", "digits", "--recipe", "smoke", "--quiet")
OWN = '{"versions": {"lab": "0"}}'  # the settings of a run
HELP = "See `python train.py --help`."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--model vgg",
            f"unknown model vgg. Known: {', '.join(MODELS)}, torchvision:NAME, timm:NAME.",
        ),
        ("--model alexnt", "unknown model alexnt. Did you mean alexnet or lenet5?"),
        ("--dataset minst", "unknown dataset minst. Did you mean mnist?"),
        # The dataset first: looking up a model may import torchvision, which takes seconds.
        ("--dataset minst --model nope", "unknown dataset minst. Did you mean mnist?"),
        (
            "--dataset birds",
            f"unknown dataset birds. Known: {', '.join(DATASETS)}, a directory of images.",
        ),
        (
            "--data-dir pics",
            "digits is not read from --data-dir pics. "
            "Leave it out; for a directory of images, give --dataset DIRECTORY.",
        ),
        ("--recipe x", f"unknown recipe x. Known: {', '.join(recipes.RECIPES)}."),
        ("--epoch 3", "unknown option --epoch. Did you mean --epochs?"),
        ("--wandb", f"unknown option --wandb. {HELP}"),
        ("alexnet", f"unexpected argument alexnet. {HELP}"),
        ("--lr fast", "invalid --lr 'fast': expected a number."),
        ("--lr", f"argument --lr: expected one argument. {HELP}"),
        ("--lr nan", "invalid --lr nan: expected a finite number."),
        ("--epochs -1", "invalid --epochs -1: expected at least 0."),
        (
            "--augment crop,rotate",
            "invalid --augment 'crop,rotate': expected none or a comma-separated list of "
            "crop, flip, cutout, mixup, cutmix, resized-crop, trivialaugment, randaugment, "
            "erasing.",
        ),
        ("--augment mixup --mixup-alpha 0", "invalid --mixup-alpha 0.0: expected more than 0."),
        ("--name=", "--name is empty. Give a value, or leave out the option."),
        ("--resume=", "--resume is empty. Give a value, or leave out the option."),
        ("--name a/b", "--name a/b is a path. Give the parent directory with --output-dir."),
        ("--image-size 27", "lenet5 cannot take images of 27 pixels. Give 28 or more."),
        (
            "--mixed-precision fp16",
            "--mixed-precision fp16: a CPU cannot train in fp16. "
            "Give --mixed-precision bf16 or no.",
        ),
        (
            "--sync-bn --name own --overwrite",  # which replaces a run, but not after an error
            "--sync-bn needs GPUs. Leave it out on other devices.",
        ),
        ("--output-dir file", f"cannot write file/lenet5-digits (Not a directory). {NO_FOLDER}"),
        (
            "--output-dir /proc/runs",
            "cannot write /proc/runs/lenet5-digits (No such file or directory). "
            "Create its directory first, or give another one.",
        ),
        (
            f"--name {'n' * 300}",
            f"cannot write runs/{'n' * 300} (File name too long). Give a shorter name.",
        ),
        (
            "--name taken",
            "the run runs/taken exists. Give another --name, or --overwrite to replace it.",
        ),
        (
            "--name taken --overwrite",
            "runs/taken is not the directory of a run. Give another --name.",
        ),
        (
            "--dataset ./data",
            "there is no directory data. Set --dataset to a directory with "
            "the images of each class in a subdirectory.",
        ),
    ],
)
def test_p7_train_refuses(fails, tmp_path, words, message):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, config in (
        ("taken", None),
        ("model", '{"architectures": ["Stranger"]}'),
        ("own", OWN),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "precious.txt").write_text("x")
        if config:
            (tmp_path / "runs" / name / "config.json").write_text(config)
    (tmp_path / "runs/file").write_text("x")
    (tmp_path / "runs/own/checkpoints").mkdir()
    (tmp_path / "runs/own/checkpoints/.lock").touch()
    assert fails(train, *DIGITS, *words.split()) == message


def test_fp8_of_the_launcher_is_refused(fails, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    message = "accelerate launch --mixed_precision fp8 is not supported. Give bf16, fp16 or no."
    assert fails(train, *DIGITS) == message


@pytest.mark.parametrize(
    ("config", "words", "expected"),
    [
        (PredictConfig, "RUN --top-k 1 X Y", {"weights": "RUN", "top_k": 1, "images": ["X", "Y"]}),
        (PredictConfig, "--quiet RUN X --csv f Y", {"images": ["X", "Y"], "csv": "f"}),
        (PredictConfig, "RUN --top-k 1 -", {"images": ["-"]}),
        (CompareConfig, "A --output o B", {"runs": ["A", "B"], "output": "o"}),
        (EvalConfig, "A --split val B --quiet", {"weights": ["A", "B"], "split": "val"}),
        (ExportConfig, "--softmax RUN --format onnx", {"weights": "RUN", "softmax": True}),
    ],
)
def test_an_option_may_stand_anywhere(config, words, expected):
    settings = parse_arguments(config, words.split(), prog="x.py", description="")
    assert {name: settings.get(name) for name in expected} == expected


def test_p7_an_unknown_option_is_named_wherever_it_stands():
    for words in ("--topk 1 RUN X", "RUN --topk 1 X", "RUN X --topk=1"):
        with pytest.raises(UserError, match=r"unknown option --topk\. Did you mean --top-k\?"):
            parse_arguments(PredictConfig, words.split(), prog="predict.py", description="")


def test_p7_a_traceback_comes_with_debug_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "x", "--debug"])
    assert run_script(train.main) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: unknown model x. Known:")


def test_p7_the_reason_of_an_error_without_a_message_is_its_type():
    assert first_line(TimeoutError()) == first_line(TimeoutError("...")) == "TimeoutError"
    assert first_line(ValueError(" one.\ntwo")) == "one"


def test_p7_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(UserError("a.", "b.", rank_local=True)))
    assert (error.what, error.hint, error.rank_local, str(error)) == ("a", "b", True, "a. b.")


@pytest.mark.parametrize("own", [UserError("what", "Hint"), None])
def test_p7_a_mistake_of_one_process_is_raised_on_all(monkeypatch, own):
    """On the process that made it, and on the other, which learns of it by gathering."""
    gathered = [("what", "Hint"), None]  # by rank

    def gather_object(said):
        assert said == (gathered[:1] if own else gathered[1:])
        return gathered

    monkeypatch.setattr(distributed, "gather_object", gather_object)
    with pytest.raises(UserError, match=r"^what\. Hint\.$"):  # noqa: SIM117, PT012
        with distributed.raise_on_all_ranks(SimpleNamespace(num_processes=2)):
            if own:
                raise own


@pytest.mark.parametrize("is_main", [False, True])
def test_p7_the_main_process_alone_prints_an_error(monkeypatch, capsys, is_main):
    world = SimpleNamespace(num_processes=2, is_main_process=is_main)
    monkeypatch.setattr(distributed, "PartialState", lambda **_: world)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("MASTER_ADDR", "localhost")
        distributed.init_distributed()

    def fail():
        raise UserError("what", "Hint")

    try:
        assert run_script(fail) == 2
    finally:
        console.configure(main_process=True)
    assert capsys.readouterr().err == "error: what. Hint.\n" * is_main


def test_p7_asking_for_too_much_memory_is_a_users_mistake(capsys):
    def ask():
        torch.empty(2**50, dtype=torch.uint8)

    assert run_script(ask) == 2
    assert capsys.readouterr().err == (
        f"error: out of memory (tried to allocate {2**50} bytes). "
        "Lower --batch-size or --image-size, or raise --grad-accum-steps.\n"
    )


# What a disk refuses

MAY_NOT = "Give a directory with write permission."


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, FULL),
        (errno.EACCES, MAY_NOT),
        (errno.EISDIR, "Give a file, not a directory."),
        (errno.ENOENT, "Create its directory first, or give another one."),
    ],
)
def test_p7_the_hint_is_of_the_system_s_reason(number, hint):
    with pytest.raises(UserError) as caught, os_errors_as_user_errors(Path("x")):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"cannot write x ({os.strerror(number)}). {hint}"


@contextmanager
def largest_file(size: int):
    """Lets this process write files of at most `size` bytes: EFBIG, as a full disk is ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_p7_a_run_that_cannot_be_begun_leaves_no_folder(tmp_path):
    run_dir = RunDir(tmp_path / "runs" / "x")
    assert run_dir.make_directory()
    run_dir.lock()
    with largest_file(10), pytest.raises(UserError) as caught:
        run_dir.create({})
    run_dir.close()
    path = tmp_path / "runs/x/config.json"
    assert str(caught.value) == f"cannot write {path} (File too large). {FULL}"
    assert list(tmp_path.iterdir()) == []


def test_p7_no_line_is_half_written(tmp_path):
    rows = [{"step": step} for step in range(2)]
    path = tmp_path / "steps.jsonl"
    RunDir(tmp_path).add_steps(*rows)
    before = path.read_bytes()
    with largest_file(len(before) + 5), pytest.raises(UserError) as caught:
        RunDir(tmp_path).add_steps(*rows)
    assert str(caught.value) == f"cannot write {path} (No space left on device). {FULL}"
    assert path.read_bytes() == before


def test_p7_a_disk_that_fills_in_training_keeps_what_is_whole(fails, tmp_path):
    with largest_file(20_000):
        message = fails(train, *DIGITS, "--name", "x", leaves=("runs",), warnings=1)
    assert message == f"cannot write runs/x/best.safetensors (File too large). {FULL}"
    files = sorted(p.name for p in Path("runs/x").iterdir())
    assert files == ["checkpoints", "config.json", "history.jsonl", "steps.jsonl"]
    assert [p.name for p in Path("runs/x/checkpoints").iterdir()] == [".lock"]


# A launcher


def test_p7_accelerate_s_cpu_flag_starts_one_process(fails, monkeypatch):
    """Only the command line of the parent process shows it."""
    words = ["accelerate", "launch", "--cpu", "--num_processes", "2", "train.py"]
    parent = SimpleNamespace(parent=lambda: SimpleNamespace(cmdline=lambda: words))
    monkeypatch.setattr(distributed.psutil, "Process", lambda: parent)
    assert fails(train, *DIGITS) == (
        "accelerate launch --cpu --num_processes 2 started one process. "
        "Launch with `--config_file accelerate_configs/multi_cpu.yaml`, or torchrun."
    )


def test_p7_a_world_size_without_a_launcher(monkeypatch):
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as caught:
        build_accelerator()
    assert str(caught.value) == (
        "WORLD_SIZE is 2, but MASTER_ADDR is not set. "
        "Start with accelerate launch or torchrun, or unset WORLD_SIZE."
    )


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_p7_processes_that_cannot_connect(fails, monkeypatch, name):
    for variable in ("WORLD_SIZE", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(console, "_main_process", None)
    message = f"{name} is 2, but MASTER_ADDR is not set. Start with accelerate launch or torchrun, "
    assert fails(train, *DIGITS) == f"{message}or unset {name}."


def test_processes_of_srun_that_are_not_connected_are_a_warning(monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    distributed.init_distributed()
    line = "warning: srun started 2 processes without MASTER_ADDR: each runs alone. "
    assert capsys.readouterr().err.startswith(line)


def test_p7_two_processes_on_one_gpu():
    error = RuntimeError("Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000")
    assert str(as_user_error(error)).startswith("two processes were given the same GPU. Launch ")
    assert as_user_error(RuntimeError("another")) is None


def test_a_run_on_another_device_than_the_run_before_it(monkeypatch):
    """In a notebook; the GPU is made up."""
    assert distributed.init_distributed(cpu=True).device.type == "cpu"
    gpu = torch.device("cuda")
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", lambda **_: gpu)
        patch.setattr(PartialState, "default_device", gpu)
        assert distributed.init_distributed().device == gpu
        assert distributed.init_distributed(cpu=True).device.type == "cpu"
