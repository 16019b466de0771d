"""Terminal output: messages, progress and tables. Only the main process prints."""

import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cache
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

# Class names and paths come from files: they must not control the terminal.
_CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
UNLIMITED = 10_000  # width of a log file, in which nothing is wrapped or cut

_main_process: bool | None = None
_quiet = False
_live_line = False
_header_printed = False


def configure(*, main_process: bool, quiet: bool = False) -> None:
    """Set which process prints, and print the header again with the next epoch row.

    Before the first call, the main process is the one whose RANK is unset or 0.
    """
    global _main_process, _quiet, _header_printed
    _main_process, _quiet, _header_printed = main_process, quiet, False


def info(text: str) -> None:
    """Print a line on standard output, unless quiet."""
    if is_verbose():
        print_line(text)


def warn(text: str) -> None:
    """Print one line, `warning: TEXT`, on standard error, even if quiet."""
    _stderr_line(f"warning: {text}")


def error(text: str) -> None:
    """Print one line, `error: TEXT`, on standard error, even if quiet."""
    _stderr_line(f"error: {text}")


def settings(title: str, rows: Mapping[str, object]) -> None:
    """Print a title, then one line per setting."""
    if is_verbose():
        print_line(title, "bold")
        print_line(_pairs(rows, indent="  "))


def run_summary(config: Any, splits: Any, loader: Any, device: Mapping[str, Any]) -> None:
    """Print the data, hyperparameters and devices of a run, and the class counts of a folder.

    Warn, even if quiet, of unbalanced classes.

    `config` is a `TrainConfig`, `splits` a `lab.data.splits.Splits`, `loader` that of the training
    split, `device` the result of `lab.distributed.describe`.
    """
    num_train, num_val, num_test = (
        f"{len(split.labels):,}" for split in (splits.train, splits.val, splits.test)
    )
    limits = {
        "--max-train-samples": config.max_train_samples,
        "--max-eval-samples": config.max_eval_samples,
    }
    limited = ", ".join(f"{flag} {limit}" for flag, limit in limits.items() if limit)
    rows = {
        "samples": f"{num_train} train, {num_val} {splits.selection_split}, {num_test} test"
        + (f" ({limited})" if limited else ""),
        "recipe": f"{config.recipe}: {config.epochs} epoch{'s' if config.epochs > 1 else ''}"
        + (f", at most {config.max_steps} steps" if config.max_steps else "")
        + f", batch size {config.batch_size}, {config.optimizer}, "
        f"lr {config.lr:g} {config.schedule}, augment {config.augment}",
        "loader": loader.description,
        "device": device_summary(device),
    }
    settings(f"{config.model_title} on {config.dataset_title}", rows)
    if splits.train.paths is not None:
        class_counts(splits.train.class_names, splits.class_counts())
    for warning in splits.balance_warnings():
        warn(warning)


def device_summary(device: Mapping[str, Any]) -> str:
    """Return the result of `lab.distributed.describe` as one line."""
    return (
        f"{device['world_size']} x {device['device']} ({device['device_name']}), "
        f"CPU threads: {device['threads']}, {device['precision']}"
    )


@contextmanager
def status(text: str) -> Iterator[None]:
    """Show a spinner during a slow operation; without a terminal, print one line."""
    if is_verbose() and out().is_terminal:
        spinner = Spinner("dots", text=literal(text), style="cyan")
        with _live(lambda: spinner, per_second=8):
            yield
    else:
        info(f"{text} ...")
        yield


class Progress:
    """The progress of a loop. `update` only stores numbers; rich's refresh thread calls `draw`."""

    def __init__(self, title: str, num_steps: int):
        self.title, self.num_steps, self.step = title, num_steps, 0
        self.images_per_second: float | None = None
        self.loss: float | None = None
        self.first: tuple[int, float] | None = None  # step and clock of the first update

    def update(
        self, step: int, images_per_second: float | None = None, loss: float | None = None
    ) -> None:
        """Store that `step` steps are done; None keeps the previous number."""
        self.step = step
        if self.first is None:
            self.first = step, time.monotonic()
        if images_per_second is not None:
            self.images_per_second = images_per_second
        if loss is not None:
            self.loss = loss

    def draw(self) -> Table:
        """Return one line: title, bar, steps, speed, loss, remaining time."""
        step, first = self.step, self.first
        facts = [f"{step:>{len(str(self.num_steps))}}/{self.num_steps}"]
        if self.images_per_second is not None:
            facts.append(f"{self.images_per_second:,.0f} images/s")
        if self.loss is not None:
            facts.append(f"loss {_decimals(self.loss)}")
        # Estimated from the first update on, because the first step is slow.
        if first is not None and step > first[0]:
            seconds = (time.monotonic() - first[1]) / (step - first[0]) * (self.num_steps - step)
            facts.append(f"{timedelta(seconds=max(0, round(seconds)))} left")
        right = "  ".join(facts)
        width = max(4, min(40, out().width - len(self.title) - len(right) - 3))
        line = Table.grid("", "", "", padding=(0, 1))
        for column in line.columns:
            column.no_wrap = True
        bar = ProgressBar(max(1, self.num_steps), step, width=width)
        line.add_row(literal(self.title, "bold"), bar, right)
        return line


@contextmanager
def progress(title: str, num_steps: int) -> Iterator[Progress]:
    """Yield a Progress to update every step; its line is erased at the end."""
    line = Progress(title, num_steps)
    shown = is_verbose() and out().is_terminal
    with _live(line.draw, per_second=4) if shown else nullcontext():
        yield line


def epoch_row(row: Mapping[str, Any], best: bool, selection_split: str) -> None:
    """Print a line of history.jsonl, with a star if it is the best so far; first a header.

    Warn, even if quiet, if steps of the epoch were skipped.
    """
    global _header_printed
    if row.get("skipped_steps"):
        warn(
            f"epoch {row['epoch']}: {row['skipped_steps']} steps were skipped because a "
            "gradient was not finite"
        )
    if not is_verbose():
        return
    split = "val" if selection_split == "validation" else selection_split
    seconds = (row.get("train_seconds") or 0.0) + (row.get("eval_seconds") or 0.0)
    columns = {  # columns are as wide as their names
        "epoch": str(row["epoch"]),
        "train loss": _decimals(row.get("train_loss")),
        "train acc": _decimals(row.get("train_accuracy")),
        f"{split} loss": _decimals(row.get("val_loss")),
        f"{split} acc": _decimals(row.get("val_accuracy")),
        f"{split} F1".rjust(6): _decimals(row.get("val_macro_f1")),
        "     lr": _formatted(row.get("learning_rate"), ".2g"),
        "  img/s": _formatted(row.get("images_per_second"), ",.0f"),
        "  time": duration(seconds),
    }
    gap = "  " if out().width >= sum(len(name) + 2 for name in columns) else " "
    if not _header_printed:
        print_line(gap.join(columns), "bold cyan")
        _header_printed = True
    star = (" ★" if out().is_terminal else " *") if best else ""
    cells = gap.join(cell.rjust(len(name)) for name, cell in columns.items())
    print_line(literal(cells) + literal(star, "bold yellow"))


def report(
    report: Mapping[str, Any],
    *,
    title: str,
    files: Mapping[str, str],
    command: str | None = None,
    note: str = "",
) -> None:
    """Print the metrics of a report, the paths of its files and the command to reproduce it.

    Prints even if quiet. Paths and command are not broken, so that they can be copied.
    """
    if not is_main_process():
        return
    facts = {name: report[key] for key, name in METRICS.items() if report.get(key) is not None}
    print_line(title, "bold")
    _print_facts({name: _metric(value) for name, value in facts.items()})
    if note:
        print_line(f"note: {note}", "yellow")
    _print_facts({**files, "reproduce": command} if command else files)


# Keys of a report, in the order in which they are printed, with the names to print.
METRICS = {
    "accuracy": "accuracy",
    "accuracy_interval": "accuracy, 95 % interval",
    "macro_f1": "macro-F1",
    "macro_f1_interval": "macro-F1, 95 % interval",
    "balanced_accuracy": "balanced accuracy",
    "top5_accuracy": "top-5 accuracy",
    "roc_auc": "ROC-AUC",
    "loss": "loss",
    "calibration_error": "calibration error",
    "temperature": "temperature",
    "num_samples": "samples",
    "split": "split",
    "best_epoch": "best epoch",
    "selection_split": "selection split",
}


def _metric(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "{:.4f} to {:.4f}".format(*value)
    return _formatted(value, ".4f" if isinstance(value, float) else "," * isinstance(value, int))


def _print_facts(rows: Mapping[str, object]) -> None:
    """Print one line per row: aligned on a terminal, otherwise `KEY: VALUE`."""
    if rows and out().is_terminal:
        print_line(_pairs(rows))
        return
    for key, value in rows.items():
        print_line(f"{key}: {value}")


def is_main_process() -> bool:
    """Return whether this process prints."""
    if _main_process is not None:
        return _main_process
    # Before processes are connected, one of each machine: only that machine may have the mistake.
    rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    # A leftover RANK has no meaning in a world of one process.
    return os.environ.get("WORLD_SIZE", "1") == "1" or rank == "0"


def is_verbose() -> bool:
    """Return whether this process prints more than the result."""
    return is_main_process() and not _quiet


@cache
def out() -> Console:
    """Return the console of standard output; it is colored and live if `is_terminal`."""
    # As for standard error: a name that the encoding does not contain must not end a training.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
    if sys.stdout.isatty() and utf8 and os.environ.get("TERM") not in ("dumb", "unknown"):
        return Console(force_terminal=True)
    # Also in a notebook: rich output of forked processes is lost there.
    return Console(force_terminal=False, force_jupyter=False, color_system=None, width=UNLIMITED)


def literal(value: object, style: str = "") -> Text:
    """Return a value as literal text, without markup and control codes."""
    text = str(value).encode(errors="backslashreplace").decode()  # a path need not be UTF-8
    return value if isinstance(value, Text) else Text(_CONTROL_CODES.sub("?", text), style)


def _pairs(rows: Mapping[str, object], indent: str = "") -> Text:
    """Return one line per row: the padded key and its value."""
    width = max(map(len, rows), default=0)
    lines = [
        Text.assemble(
            literal(f"{indent}{key:<{width}}  ", "cyan"), literal("-" if value is None else value)
        )
        for key, value in rows.items()
    ]
    return literal("\n").join(lines)


def print_line(value: object, style: str = "") -> None:
    """Print a line that the terminal may wrap, but that is copied as one line."""
    out().print(literal(value, style), soft_wrap=True)


def _stderr_line(text: str) -> None:
    if not is_main_process():
        return
    text = " ".join(line.strip() for line in text.splitlines() if line.strip())
    # The live line, if any, is erased first; the next refresh draws it again below.
    erase = "\r\x1b[2K" if _live_line and sys.stderr.isatty() else ""
    print(erase + _CONTROL_CODES.sub("?", text), file=sys.stderr, flush=True)


@contextmanager
def _live(draw: Callable[[], RenderableType], per_second: int) -> Iterator[None]:
    global _live_line
    # No redirection: a worker that is forked while rich holds its lock would hang on a print.
    live = Live(
        get_renderable=draw,
        console=out(),
        refresh_per_second=per_second,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with suppress(RuntimeError):  # no thread can be started: continue without the line
        live.start()
        _live_line = True
    try:
        yield
    finally:
        _live_line = False
        live.stop()


def number_table(first: object, *further: object, folded: Collection[int] = ()) -> Table:
    """Return a table with a first column of names and further columns of numbers.

    Names, and columns whose indices are in `folded`, continue on the next line if they are too
    long for the terminal.
    """
    box = SIMPLE_HEAD if out().is_terminal else None
    table = Table(box=box, pad_edge=False, padding=(0, 1 if box else 2, 0, 0))
    table.add_column(literal(first), overflow="fold")
    for index, name in enumerate(further, 1):
        if index in folded:
            table.add_column(literal(name), overflow="fold")
        else:
            table.add_column(literal(name), justify="right", no_wrap=True)
    return table


def print_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    folded: Collection[int] = (),
    styles: Sequence[str] | None = None,
) -> None:
    """Print rows of names and numbers; see `number_table`."""
    table = number_table(*heads, folded=folded)
    for row, style in zip(rows, styles or [""] * len(rows), strict=True):
        table.add_row(*map(_one_line, row), style=style)
    out().print(table)


def _one_line(value: object) -> Text:
    return literal(str(value).replace("\n", "?").replace("\t", " "))


def _formatted(value: Any, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _decimals(value: float | None) -> str:
    """Format with four decimals; large values, such as a diverging loss, with an exponent."""
    return _formatted(value, ".4f" if value is None or abs(value) < 1000 else ".1e")


def duration(seconds: float) -> str:
    """Format a duration in at most six characters: 12.3s, 4m05s, 2h07m."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def class_table(report: Mapping[str, Any]) -> None:
    """Print precision, recall, F1 and support of every class; the lowest F1 is yellow."""
    if not is_verbose():
        return
    lowest = min((row["f1"] for row in report["per_class"]), default=0.0)
    rows = [
        (row["class"], *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1")),
         f"{row['support']:,}")
        for row in report["per_class"]
    ]  # fmt: skip
    print_table(
        ("class", "precision", "recall", "F1", "support"),
        rows,
        styles=["yellow" if row["f1"] == lowest < 1 else "" for row in report["per_class"]],
    )


def class_counts(class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> None:
    """Print the number of images of every class, with one column per split, and the totals.

    For more than 20 classes, print the first and last eight, and the range of the rest.
    """
    if not is_verbose():
        return
    columns = [[f"{count:,}" for count in values] for values in counts.values()]
    rows = list(zip(class_names, *columns, strict=True))
    if len(rows) > 20:
        hidden = [values[8:-8] for values in counts.values()]
        ranges = (f"{min(values):,} to {max(values):,}" for values in hidden)
        rows[8:-8] = [(f"... {len(class_names) - 16:,} more", *ranges)]
    total = f"total ({len(class_names):,} classes)"
    rows.append((total, *(f"{sum(values):,}" for values in counts.values())))
    print_table(("class", *counts), rows, styles=[""] * (len(rows) - 1) + ["bold"])


MAX_HEAD = 8  # characters of a class name above a column of the confusion matrix


def confusion_matrix(report: Mapping[str, Any]) -> None:
    """Print the matrix with one row per true class and one column per predicted class.

    Column heads are class numbers if the names are long. If there are more than 20 classes or the
    matrix is too wide, print the 10 most frequent confusions instead.
    """
    if not is_verbose():
        return
    matrix, names = report["confusion_matrix"], report["class_names"]
    if len(names) <= 20:
        labels, heads = names, names
        if max(map(len, names)) > MAX_HEAD:
            labels, heads = [f"{k} {name}" for k, name in enumerate(names)], range(len(names))
        table = _matrix_table(matrix, labels, heads)
        if out().measure(table).minimum <= out().width:
            return out().print(table)
    errors = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j]
    errors.sort(key=lambda error: -error[0])
    title = "most frequent confusions, true -> predicted" if errors else "no confusions"
    print_line(title, "bold")
    for count, i, j in errors[:10]:
        share = f" ({100 * count / sum(matrix[i]):.1f} % of true)"
        pair = literal(f"  {names[i]} -> {names[j]}: ")
        number = literal(f"{count:,}", "bold red")
        print_line(pair + number + literal(share))


def _matrix_table(
    matrix: Sequence[Sequence[int]], labels: Sequence[str], heads: Sequence[object]
) -> Any:
    width = max((len(f"{count:,}") for row in matrix for count in row), default=1)
    table = number_table("true \\ predicted", *heads)
    for i, row in enumerate(matrix):
        cells = []
        for j, count in enumerate(row):
            style = "bold green" if i == j else _error_style(count / max(1, sum(row)))
            cells.append(literal(f"{count:>{width},}", style))
        table.add_row(literal(labels[i]), *cells)
    return table


def _error_style(share: float) -> str:
    """Return a red that is stronger for a larger share of a class, and full from 25 % on."""
    if share < 0.02:
        return "red" if share else "dim"
    return f"white on rgb({110 + int(120 * min(1, 4 * share))},0,0)"


# Columns of a comparison that are printed. The split that selected the best epoch is among them,
# because an accuracy that was selected on the test split is optimistic.
RUN_COLUMNS = ("run", "accuracy", "macro-F1", "selected on", "vs. best")


def runs_table(rows: Sequence[Mapping[str, str]]) -> None:
    """Print the most important columns of a comparison of runs."""
    print_table(RUN_COLUMNS, [[row[name] for name in RUN_COLUMNS] for row in rows])


def predictions_table(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], undecided: Collection[str] = ()
) -> None:
    """Print the top classes of each image with their probabilities.

    A mark follows the path of those `undecided`.
    """
    cells = [
        (
            path + " (undecided)" * (path in undecided),
            first,
            f"{confidence:.4f}",
            ", ".join(f"{name} {value:.4f}" for name, value in others),
        )
        for path, ((first, confidence), *others) in rows
    ]
    num_columns = 4 if any(row[-1] for row in cells) else 3
    heads = ("image", "class", "confidence", "other classes")[:num_columns]
    if cells:
        print_table(heads, [row[:num_columns] for row in cells], folded=(1, 3))
