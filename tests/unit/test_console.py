"""What the console prints: plain lines without a terminal, and tables that fit one."""

import io

import pytest
from rich.console import Console

from lab import console
from lab.engine.metrics import selection_bias_note

ROW = {
    "epoch": 1, "train_loss": 2.3, "train_accuracy": 0.1, "val_loss": 2.25, "val_accuracy": 0.2,
    "val_macro_f1": 0.15, "learning_rate": 0.001, "train_seconds": 61.0, "eval_seconds": 4.0,
    "images_per_second": 4400.4,
}  # fmt: skip
NAMES = ["[red]cat", "dog"]
REPORT = {
    "split": "test",
    "num_samples": 12000,
    "loss": 0.5,
    "accuracy": 0.91666,
    "macro_f1": 0.9,
    "per_class": [
        {"class": name, "precision": 0.5, "recall": 1.0, "f1": 0.66667, "support": 6000}
        for name in NAMES
    ],
    "confusion_matrix": [[5000, 1000], [0, 6000]],
    "class_names": NAMES,
    "best_epoch": 7,
    "selection_split": "validation",
}
LONG_PATH = "/data/" + "deep [folder]/" * 30 + "best.safetensors"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """The console of a main process whose standard output is no terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # some CI services set it
    console.out.cache_clear()
    console.configure(main_process=True)
    yield
    monkeypatch.undo()
    console.out.cache_clear()
    console._main_process, console._quiet = None, False


def say_everything(report=REPORT):
    console.info("hello [bold]you[/bold]")
    console.settings("training", {"model": "lenet5", "seed": None})
    with console.status("reading digits"):
        pass
    with console.progress("epoch 1/2", 10) as progress:
        progress.update(1)
        progress.update(5, images_per_second=4400.0, loss=0.1234)
    console.epoch_row(ROW, best=True, selection_split="validation")
    console.epoch_row(
        ROW | {"epoch": 2, "val_loss": None}, best=False, selection_split="validation"
    )
    console.class_table(report)
    console.confusion_matrix(report)
    console.report(report, title="lenet5", files={"weights": LONG_PATH}, command="python x.py " * 9)


def test_plain_output_has_no_control_codes_and_no_markup(capsys):
    say_everything()
    out, err = capsys.readouterr()
    assert "\x1b" not in out
    assert "\r" not in out
    assert err == ""
    assert "hello [bold]you[/bold]\n" in out
    assert "training\n  model  lenet5\n  seed   -\n" in out
    assert "reading digits ...\n" in out
    assert "  1m05s *\n" in out  # training and evaluation
    assert out.count("[red]cat") == 3  # the class table, the matrix's row and its column
    assert all(line == line.rstrip() for line in out.splitlines() if "python x" not in line)


def test_the_remaining_time_is_that_of_the_steps_after_the_first_update(monkeypatch):
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    progress = console.Progress("epoch 1/2", 10)
    progress.update(1)
    now += 4
    progress.update(3)
    [facts] = progress.draw().columns[2].cells
    assert facts == " 3/10  0:00:14 left"


def test_the_header_names_the_split(capsys):
    console.epoch_row(ROW, best=False, selection_split="test")
    out = capsys.readouterr().out
    assert "test loss" in out
    assert "val" not in out


def test_p6_a_report_selected_on_the_test_split_says_so(capsys):
    note = selection_bias_note("test", "test")
    console.report(REPORT | {"selection_split": "test"}, title="", files={}, note=note)
    out = " ".join(capsys.readouterr().out.split())
    assert "selected on the test split (the notebooks' protocol): an optimistic number" in out


def test_off_the_main_process_all_is_silent(capsys):
    console.configure(main_process=False)
    say_everything()
    console.warn("w")
    console.error("e")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("rank", "world_size", "spoken"),
    [(None, None, True), ("0", "2", True), ("1", "2", False), ("1", None, True)],
)
def test_before_configure_the_rank_in_a_world_decides(
    rank, world_size, spoken, capsys, monkeypatch
):
    monkeypatch.setattr(console, "_main_process", None)
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    console.error("e")
    assert capsys.readouterr().err == ("error: e\n" if spoken else "")


def test_quiet_leaves_the_report_and_the_warnings(capsys):
    console.configure(main_process=True, quiet=True)
    say_everything()
    console.warn("w")
    out, err = capsys.readouterr()
    assert out.startswith("lenet5\naccuracy: ")
    assert "hello" not in out
    assert "epoch  " not in out
    assert err == "warning: w\n"


def test_p7_an_error_is_one_line(capsys):
    console.error("no file '[x]'.\nTry --data\x1b[31m. " + "word " * 90)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: no file '[x]'. Try --data?[31m. word")
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_a_name_that_the_log_cannot_encode_ends_nothing(monkeypatch):
    log = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", log)
    console.info("猫")
    assert log.buffer.getvalue() == b"\\u732b\n"


RUN = {
    "model": "efficientnet", "dataset": "cifar100", "accuracy": "0.8123", "macro-F1": "0.8110",
    "vs. best": "-0.0123 [-0.0201, -0.0045]", "selected on": "validation",
    "parameters": "14,859,082", "MACs": "416,520,000", "epochs": "100",
    "images/s": "1,234", "seconds": "12,345",
}  # fmt: skip
LONG_RUN = "/home/someone/experiments/leaves/runs/torchvision-convnext_tiny-folder-seed-42"


def test_a_comparison_fits_the_terminal_with_whole_names_and_numbers(monkeypatch):
    file = io.StringIO()
    out = Console(file=file, force_terminal=True, width=80, color_system=None, _environ={})
    monkeypatch.setattr(console, "out", lambda: out)
    console.runs_table([{"run": "runs/lenet5-mnist"} | RUN, {"run": LONG_RUN} | RUN])
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    end = next(line for line in lines if "accuracy" in line).index("accuracy")
    assert LONG_RUN in "".join(line[:end].strip() for line in lines)  # in several lines
    for name in ("accuracy", "selected on", "vs. best"):
        assert sum(RUN[name] in line for line in lines) == 2


@pytest.mark.parametrize(
    ("environment", "prints"),
    [
        ({}, True),
        ({"RANK": "3"}, True),  # left over: there is one process
        ({"WORLD_SIZE": "4", "RANK": "1"}, False),
        ({"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}, True),  # the first of a machine
    ],
)
def test_p7_before_processes_are_connected_one_of_each_machine_prints(
    monkeypatch, environment, prints
):
    """A mistake such as a missing file may exist on one machine only."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(console, "_main_process", None)
    assert console.is_main_process() == prints
