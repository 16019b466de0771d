"""Tables fit the terminal: what a row is about is always there, whole, and no number is cut."""

import io
import re

import pytest
from rich.console import Console

from lab import console

PATHS = [
    "IMG_0001.jpg",
    "photographs/2024-07 Dolomites/IMG_20240712_150000.jpg",
    "data/plantvillage/raw/color/Tomato___Tomato_Yellow_Leaf_Curl_Virus/00ea9e8b-2b8c-4ed2.JPG",
]
CLASSES = ["great white shark, white shark, man-eater", "tiger shark", "n01494475 hammerhead shark"]
RUNS = [
    "runs/lenet5-mnist",
    "runs/efficientnet-cifar100-default-seed3",
    "/home/someone/experiments/2024/leaves/runs/torchvision-convnext_tiny-folder-seed-42",
]
RUN = {
    "model": "efficientnet", "dataset": "cifar100", "accuracy": "0.8123", "macro-F1": "0.8110",
    "vs. best": "-0.0123 [-0.0201, -0.0045]", "selected on": "validation",
    "parameters": "14,859,082", "MACs": "416,520,000", "epochs": "100",
    "images/s": "1,234", "seconds": "12,345",
}  # fmt: skip


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard output a terminal of a width; returns the lines that it is sent."""
    console.configure(main_process=True)

    def of(width, write):
        file = io.StringIO()
        out = Console(file=file, force_terminal=True, width=width, color_system=None, _environ={})
        monkeypatch.setattr(console, "out", lambda: out)
        write()
        lines = file.getvalue().splitlines()
        *table, note = lines if lines[-1].startswith("columns that do not fit: ") else [*lines, ""]
        assert max(map(len, table)) <= width
        assert "\u2026" not in file.getvalue()
        return table, note.removeprefix("columns that do not fit: ")

    yield of
    console._main_process, console._quiet = None, False


def whole(lines, text):
    """Return whether a text is in the lines, which may wrap it, regardless of spaces."""
    letters = [re.escape(c) for c in re.sub(r"\s", "", text)]
    return re.search(r"\s*".join(letters), "\n".join(lines)) is not None


def first_column(lines, width):
    """Return the first `width` characters of a table's lines below the rule."""
    rule = next(k for k, line in enumerate(lines) if "\u2500" in line)
    return [line[:width] for line in lines[rule + 1 :]]


def key_width(lines, second_head):
    """Characters before the second column begins."""
    head = next(line for line in lines if second_head in line)
    return head.index(second_head)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_predictions_show_each_file_and_its_likeliest_class(terminal, width):
    answers = [(path, [(n, 0.9 / (k + 1)) for k, n in enumerate(CLASSES)]) for path in PATHS]
    table, left_out = terminal(width, lambda: console.predictions_table(answers))
    names = first_column(table, key_width(table, "class"))
    assert all(whole(names, path) for path in PATHS)
    assert sum("0.9000" in line for line in table) == len(PATHS)
    for k in (2, 3):  # a class is not shown without its confidence
        shown = f"confidence {k}" in "".join(table)
        assert shown == (f"class {k}" in "".join(table)) == (f"class {k}" not in left_out)
        assert sum(f"{0.9 / k:.4f}" in line for line in table) == shown * len(PATHS)


def test_a_wide_terminal_shows_all_predictions(terminal):
    answers = [(path, [(name, 0.5) for name in CLASSES]) for path in PATHS]
    table, left_out = terminal(300, lambda: console.predictions_table(answers))
    assert left_out == ""
    assert all(any(path in line for line in table) for path in PATHS)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, {"accuracy", "selected on"}),
        (100, {"accuracy", "selected on"}),
        (140, {"accuracy", "selected on", "vs. best"}),
        (300, set(RUN)),
    ],
)
def test_a_comparison_shows_each_run_and_the_columns_that_matter(terminal, width, shown):
    rows = [{"run": run} | RUN for run in RUNS]
    table, left_out = terminal(width, lambda: console.runs_table(rows))
    head = next(line for line in table if line.startswith(" run"))
    found = {name for name in RUN if f" {name} " in head}
    assert found >= shown
    assert set(filter(None, left_out.split(", "))) == set(RUN) - found
    second = min(found, key=head.index)
    names = first_column(table, head.index(second) - 1)
    assert all(whole(names, run) for run in RUNS)
    for name in found:
        assert sum(RUN[name] in line for line in table) == len(RUNS)


def test_short_names_leave_room_for_more(terminal):
    narrow, _ = terminal(80, lambda: console.runs_table([{"run": "runs/a"} | RUN] * 2))
    assert all(name in "".join(narrow) for name in ("vs. best", "selected on", "accuracy"))


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("name", ["class {}", "n0149{} great white shark, white shark, man-eater, "
                                  "man-eating shark, Carcharodon carcharias"])  # fmt: skip
def test_a_hundred_classes_are_named_with_all_their_numbers(terminal, width, name):
    names = [name.format(k) for k in range(100)]
    rows = [{"class": n, "precision": 0.5, "recall": 0.25, "f1": 0.3333 + k / 1e4, "support": 1234}
            for k, n in enumerate(names)]  # fmt: skip
    table, left_out = terminal(width, lambda: console.class_table({"per_class": rows}))
    assert left_out == ""
    for k in range(100):
        assert sum(f"{0.3333 + k / 1e4:.4f}" in line for line in table) == 1
    numbers = re.compile(r"0\.5000  0\.2500  0\.\d{4}    1,234")
    assert sum(numbers.search(line) is not None for line in table) == 100
    column = first_column(table, key_width(table, "precision"))
    assert all(whole(column, n) for n in names)


@pytest.mark.parametrize("width", [100, 140])
def test_a_matrix_of_long_names_keeps_them(terminal, width):
    names = [f"{k}th of the classes whose names are much too long for a table" for k in range(10)]
    matrix = [[1000 if i == j else 7 for j in range(10)] for i in range(10)]
    report = {"confusion_matrix": matrix, "class_names": names}
    table, _ = terminal(width, lambda: console.confusion_matrix(report))
    assert sum("1,000" in line for line in table) == 10
    column = first_column(table, width - 10 * len("  1,000") - 1)
    assert all(whole(column, f"{k} {n}") for k, n in enumerate(names))
