"""What the console prints: plain lines without a terminal, colour and a live line on one."""

import io
import re
import time

import pytest
from rich.console import Console

from lab import console
from lab.engine.metrics import selection_bias_note

ROW = {
    "epoch": 1,
    "train_loss": 2.3,
    "train_accuracy": 0.1,
    "val_loss": 2.25,
    "val_accuracy": 0.2,
    "val_macro_f1": 0.15,
    "learning_rate": 0.001,
    "train_seconds": 61.0,
    "eval_seconds": 4.0,
    "images_per_second": 4400.4,
}
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


@pytest.fixture
def screen(monkeypatch, plain):
    """Return the stream of a terminal that is 80 columns wide."""
    out = Console(
        file=io.StringIO(), force_terminal=True, width=80, color_system="truecolor", _environ={}
    )
    monkeypatch.setattr(console, "out", lambda: out)
    return out.file


def without_codes(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


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
    assert out.count("[red]cat") == 3  # the class table, the matrix's row and its column
    assert all(line == line.rstrip() for line in out.splitlines() if "python x" not in line)


def test_epoch_rows_are_aligned_under_one_header(capsys):
    console.epoch_row(ROW, best=True, selection_split="validation")
    console.epoch_row(
        ROW | {"epoch": 20, "val_loss": None}, best=False, selection_split="validation"
    )
    header, first, second = capsys.readouterr().out.splitlines()
    assert "val loss" in header
    assert first.endswith(" *")
    assert "4,400" in first
    assert "1m05s" in first
    assert len(header) == len(first.removesuffix(" *")) == len(second)
    for name, cell in ("val loss", "2.2500"), ("val acc", "0.2000"), ("val F1", "0.1500"):
        end = header.index(name) + len(name)
        assert first[:end].endswith(cell)
    assert second[: header.index("val loss") + 8].endswith(" -")


def test_the_header_names_the_split(capsys):
    console.epoch_row(ROW, best=False, selection_split="test")
    out = capsys.readouterr().out
    assert "test loss" in out
    assert "val" not in out


def test_plain_report_keeps_long_lines_whole(capsys):
    console.report(REPORT, title="lenet5", files={"weights": LONG_PATH}, command="python x.py " * 9)
    lines = capsys.readouterr().out.splitlines()
    assert "accuracy: 0.9167" in lines
    assert "samples: 12,000" in lines
    assert "best epoch: 7" in lines
    assert f"weights: {LONG_PATH}" in lines
    assert "reproduce: " + "python x.py " * 9 in lines
    assert not any("optimistic" in line for line in lines)


@pytest.mark.parametrize("mode", ["plain", "screen"])
def test_p6_a_report_selected_on_the_test_split_says_so(mode, capsys, request):
    file = request.getfixturevalue(mode)
    note = selection_bias_note("test", "test")
    console.report(REPORT | {"selection_split": "test"}, title="", files={}, note=note)
    out = file.getvalue() if file else capsys.readouterr().out
    assert "selected on the test split (the notebooks' protocol): an optimistic number" in " ".join(
        without_codes(out).split()
    )


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


def test_plain_matrix_is_aligned(capsys):
    console.confusion_matrix(REPORT)
    assert capsys.readouterr().out.splitlines() == [
        "true \\ predicted  [red]cat    dog",
        "[red]cat             5,000  1,000",
        "dog                      0  6,000",
    ]


def test_many_classes_list_the_most_frequent_confusions(capsys):
    matrix = [[5 if i == j else 0 for j in range(21)] for i in range(21)]
    matrix[3][4], matrix[0][20] = 1, 15
    report = {"confusion_matrix": matrix, "class_names": [f"[c{k}]" for k in range(21)]}
    console.confusion_matrix(report)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  [c0] -> [c20]: 15 (75.0 % of true)",
        "  [c3] -> [c4]: 1 (16.7 % of true)",
    ]


def test_terminal_is_coloured_and_shows_names_literally(screen):
    say_everything()
    sent = screen.getvalue()
    text = without_codes(sent)
    assert "hello [bold]you[/bold]" in text
    assert text.count("[red]cat") == 3
    assert "1m05s ★" in text
    assert "  model  \x1b[0mlenet5" in sent  # a value is not coloured as its key
    assert re.search(r"\x1b\[1;32m *5,000", sent)  # the diagonal is green
    assert re.search(r"48;2;\d+;0;0m *1,000", sent)  # an error is red
    assert LONG_PATH in text  # unbroken, to be copied


def test_terminal_matrix_too_wide_for_names_is_headed_by_numbers(screen):
    names = [f"a long class name {k}" for k in range(6)]
    matrix = [[7] * 6 for _ in names]
    console.confusion_matrix({"confusion_matrix": matrix, "class_names": names})
    assert re.search(r"true \\ predicted +0 +1 +2 +3 +4 +5", without_codes(screen.getvalue()))


def test_live_line_shows_progress_and_disappears(screen):
    with console.progress("epoch 3/20", 469) as progress:
        progress.update(100)
        progress.update(120, images_per_second=4400.4, loss=0.1234)
        time.sleep(0.6)  # two refreshes
    sent = screen.getvalue()
    lines = [line for line in re.split(r"[\r\n]", without_codes(sent)) if "120/469" in line]
    assert re.match(r"epoch 3/20 ━.* 120/469  4,400 images/s  loss 0.1234  0:00:0\d left", lines[0])
    assert all(len(line) <= 80 for line in lines)
    assert sent.rstrip().endswith("\x1b[2K")  # erased


def test_update_is_cheap():
    progress = console.Progress("epoch 1/1", 1)
    start = time.perf_counter()
    for step in range(10_000):
        progress.update(step, 1.0, 1.0)
    assert (time.perf_counter() - start) / 10_000 < 20e-6


def test_class_counts_list_every_class_and_abbreviate_many(capsys):
    def printed(num_classes):
        names = [f"[red]class {k}" for k in range(num_classes)]
        counts = {"training": [1000 + k for k in range(num_classes)], "test": [7] * num_classes}
        console.class_counts(names, counts)
        return [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]

    assert printed(2) == [
        ["class", "training", "test"],
        ["[red]class 0", "1,000", "7"],
        ["[red]class 1", "1,001", "7"],
        ["total (2 classes)", "2,001", "14"],
    ]
    assert len(printed(20)) == 22
    lines = printed(1200)
    assert len(lines) == 19
    assert lines[8] == ["[red]class 7", "1,007", "7"]
    assert lines[9] == ["... 1,184 more", "1,008 to 2,191", "7 to 7"]
    assert lines[10] == ["[red]class 1192", "2,192", "7"]
    assert lines[-1] == ["total (1,200 classes)", "1,919,400", "8,400"]
    console.configure(main_process=True, quiet=True)
    assert printed(2) == []
