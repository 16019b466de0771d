"""Tables: a report's numbers by class and its confusion matrix; runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from lab import console

LABEL = 24  # characters that the names of a confusion matrix's rows have at least


def class_table(report: Mapping[str, Any]) -> None:
    """Prints precision, recall, F1 and support of every class; the lowest F1 is marked yellow."""
    if not console.chatty():
        return
    lowest = min((row["f1"] for row in report["per_class"]), default=0.0)
    rows = [
        (row["class"], *(f"{row[key]:.4f}" for key in ("precision", "recall", "f1")),
         f"{row['support']:,}")
        for row in report["per_class"]
    ]  # fmt: skip
    console.print_table(
        ("class", "precision", "recall", "F1", "support"),
        rows,
        order=[(1, 2, 3, 4)],
        styles=["yellow" if row["f1"] == lowest < 1 else "" for row in report["per_class"]],
    )


def class_counts(class_names: Sequence[str], counts: Mapping[str, Sequence[int]]) -> None:
    """Print the number of images of every class, a column for each split in `counts`, and totals.

    Of more than 20 classes the first and last eight are printed, and the range of the others.
    """
    if not console.chatty():
        return
    table = console.number_table("class", *counts)
    rows = list(zip(class_names, *counts.values(), strict=True))
    hidden = rows[8:-8] if len(rows) > 20 else []
    for row in rows[:8] if hidden else rows:
        table.add_row(*_count_cells(*row))
    if hidden:
        columns = (values[8:-8] for values in counts.values())
        ranges = [f"{min(column):,} to {max(column):,}" for column in columns]
        table.add_row(console.literal(f"... {len(hidden):,} more"), *ranges)
        for row in rows[-8:]:
            table.add_row(*_count_cells(*row))
    total = f"total ({len(rows):,} classes)"
    table.add_row(*_count_cells(total, *map(sum, counts.values())), style="bold")
    console.out().print(table)


def _count_cells(name: str, *counts: int) -> list[Any]:
    return [console.literal(name), *(f"{count:,}" for count in counts)]


def confusion_matrix(report: Mapping[str, Any]) -> None:
    """Prints the matrix, a row a true class and a column a predicted one.

    Columns are headed by class names where these fit, else by class numbers. With more than 20
    classes, or too wide for the terminal, the 10 most frequent confusions are listed instead.
    """
    if not console.chatty():
        return
    matrix, names, out = report["confusion_matrix"], report["class_names"], console.out()
    if len(names) <= 20:
        room = out.width if out.is_terminal else 120  # wider is unreadable in a log, too
        numbered = [f"{k} {name}" for k, name in enumerate(names)]
        for labels, heads in (names, names), (numbered, range(len(names))):
            table = _matrix_table(matrix, labels, heads)
            if out.is_terminal:  # a longer name is wrapped
                table.columns[0].max_width = LABEL
            unlimited = out.options.update(width=console.UNLIMITED)
            spare = room - out.measure(table, options=unlimited).maximum
            if spare >= 0:
                if out.is_terminal:
                    table.columns[0].max_width = LABEL + spare
                return out.print(table)
    errors = [(n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if n and i != j]
    errors.sort(key=lambda error: -error[0])
    title = "most frequent confusions, true -> predicted" if errors else "no confusions"
    console.print_line(title, "bold")
    for count, i, j in errors[:10]:
        share = f" ({100 * count / sum(matrix[i]):.1f} % of true)"
        pair = console.literal(f"  {names[i]} -> {names[j]}: ")
        number = console.literal(f"{count:,}", "bold red")
        console.print_line(pair + number + console.literal(share))


def _matrix_table(
    matrix: Sequence[Sequence[int]], labels: Sequence[str], heads: Sequence[object]
) -> Any:
    width = max((len(f"{count:,}") for row in matrix for count in row), default=1)
    table = console.number_table("true \\ predicted", *heads)
    for i, row in enumerate(matrix):
        cells = []
        for j, count in enumerate(row):
            style = "bold green" if i == j else _error_style(count / max(1, sum(row)))
            cells.append(console.literal(f"{count:>{width},}", style))
        table.add_row(console.literal(labels[i]), *cells)
    return table


def _error_style(share: float) -> str:
    """Redder, the larger the share of a class that is taken for one other; full at a quarter."""
    if share < 0.02:
        return "red" if share else "dim"
    return f"white on rgb({110 + int(120 * min(1, 4 * share))},0,0)"


# Columns of a comparison, the most important first: those that fit are shown. What a run's best
# epoch was selected on comes early, because without it an optimistic accuracy looks like any other.
IMPORTANCE = ("accuracy", "chosen on", "to best", "data set", "macro-F1", "model", "seconds",
              "parameters", "epochs", "images/s", "multiply-adds")  # fmt: skip


def runs(rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows of text, all with the columns of the first one; the column "run" is the key."""
    heads = list(rows[0])
    console.print_table(
        heads,
        [list(row.values()) for row in rows],
        order=[(heads.index(name),) for name in IMPORTANCE],
    )


def predictions(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> None:
    """Print the likeliest classes of each picture with their softmax, as many as there is room for.

    The file name and the likeliest class are always shown.
    """
    if rows:
        ranks = range(1, len(rows[0][1]) + 1)
        ordinals = ["", *(f" {k}" for k in ranks[1:])]
        heads = [word + ordinal for ordinal in ordinals for word in ("class", "confidence")]
        console.print_table(
            ["picture", *heads],
            [
                [path, *(cell for name, value in classes for cell in (name, f"{value:.4f}"))]
                for path, classes in rows
            ],
            order=[(2 * k - 1, 2 * k) for k in ranks],
            wrapped=(1,),
        )
