"""Tables fit the terminal: names are printed in full, on several lines if necessary."""

import io
import re

import pytest
from rich.console import Console

from lab import console

PATHS = [
    "IMG_0001.jpg",
    "data/plantvillage/raw/color/Tomato___Tomato_Yellow_Leaf_Curl_Virus/00ea9e8b-2b8c-4ed2.JPG",
]
CLASSES = ["great white shark, white shark, man-eater", "tiger shark", "n01494475 hammerhead shark"]
RUN = {
    "model": "efficientnet", "dataset": "cifar100", "accuracy": "0.8123", "macro-F1": "0.8110",
    "vs. best": "-0.0123 [-0.0201, -0.0045]", "selected on": "validation", "epochs": "100",
}  # fmt: skip


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that returns the lines that a call prints on a terminal of a width."""
    console.configure(main_process=True)

    def of(width, write):
        file = io.StringIO()
        out = Console(file=file, force_terminal=True, width=width, color_system=None, _environ={})
        monkeypatch.setattr(console, "out", lambda: out)
        write()
        lines = file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert "\u2026" not in file.getvalue()
        return lines

    yield of
    console._main_process, console._quiet = None, False


def letters(text):
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("width", [80, 140])
def test_predictions_show_each_file_and_its_classes(terminal, width):
    answers = [(path, [(n, 0.9 / (k + 1)) for k, n in enumerate(CLASSES)]) for path in PATHS]
    lines = terminal(width, lambda: console.predictions_table(answers))
    for value in ("0.9000", "0.4500", "0.3000"):
        assert sum(value in line for line in lines) == len(PATHS)
    width = next(line for line in lines if "class" in line).index("class")
    assert letters("".join(line[:width] for line in lines)).endswith(letters("".join(PATHS)))
    lines = terminal(width, lambda: console.predictions_table([("a.png", [("b", 0.5)])]))
    assert "other classes" not in "".join(lines)


def test_a_comparison_shows_each_run_with_its_interval(terminal):
    runs = ["runs/lenet5-mnist", "/home/someone/experiments/runs/convnext_tiny-folder-seed-42"]
    lines = terminal(80, lambda: console.runs_table([{"run": run} | RUN for run in runs]))
    width = next(line for line in lines if "accuracy" in line).index("accuracy")
    assert letters("".join(line[:width] for line in lines)).endswith(letters("".join(runs)))
    for name in ("accuracy", "selected on", "vs. best"):
        assert sum(RUN[name] in line for line in lines) == len(runs)


@pytest.mark.parametrize("width", [80, 140])
def test_a_hundred_classes_are_named_with_all_their_numbers(terminal, width):
    names = [f"n0149{k} great white shark, white shark, man-eater, " * 2 for k in range(100)]
    rows = [{"class": n, "precision": 0.5, "recall": 0.25, "f1": 0.3333, "support": 1234}
            for n in names]  # fmt: skip
    lines = terminal(width, lambda: console.class_table({"per_class": rows}))
    numbers = re.compile(r"0\.5000  0\.2500  0\.3333    1,234")
    assert sum(numbers.search(line) is not None for line in lines) == 100
    column = next(line for line in lines if "precision" in line).index("precision")
    assert letters("".join(line[:column] for line in lines)).endswith(letters("".join(names)))


def test_a_matrix_of_long_names_keeps_them(terminal):
    names = [f"{k}th of the classes whose names are much too long for a table" for k in range(10)]
    matrix = [[1000 if i == j else 7 for j in range(10)] for i in range(10)]
    report = {"confusion_matrix": matrix, "class_names": names}
    lines = terminal(100, lambda: console.confusion_matrix(report))
    assert sum("1,000" in line for line in lines) == 10
    column = letters("".join(line[: 100 - 10 * len("  1,000") - 1] for line in lines))
    assert all(letters(f"{k} {name}") in column for k, name in enumerate(names))
