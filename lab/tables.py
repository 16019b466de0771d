"""Tables: a report's numbers by class and its confusion matrix; runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from lab import console


def class_table(report: Mapping[str, Any]) -> None:
    """Prints precision, recall, F1 and support of every class; the lowest F1 is marked yellow."""
    if not console.chatty():
        return
    lowest = min((row["f1"] for row in report["per_class"]), default=0.0)
    table = console.number_table("class", "precision", "recall", "F1", "support")
    for row in report["per_class"]:
        numbers = [f"{row[key]:.4f}" for key in ("precision", "recall", "f1")]
        style = "yellow" if row["f1"] == lowest < 1 else ""
        table.add_row(console.literal(row["class"]), *numbers, f"{row['support']:,}", style=style)
    console.out().print(table)


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
            unlimited = out.options.update(width=console.UNLIMITED)
            if out.measure(table, options=unlimited).maximum <= room:
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


def runs(rows: Sequence[Mapping[str, str]]) -> None:
    """Prints rows of texts, all with the columns of the first; the first column holds names."""
    table = console.number_table(*rows[0])
    for row in rows:
        table.add_row(*(console.literal(cell) for cell in row.values()))
    console.out().print(table)


def predictions(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> None:
    """Prints the likeliest classes of each picture, with their softmax."""
    if rows:
        heads = [word for _ in rows[0][1] for word in ("class", "confidence")]
        table = console.number_table("picture", *heads)
        for path, classes in rows:
            cells = [cell for name, value in classes for cell in (name, f"{value:.4f}")]
            line = path.replace("\n", "?")
            table.add_row(console.literal(line), *map(console.literal, cells))
        console.out().print(table)
