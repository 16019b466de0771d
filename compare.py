"""Compares finished runs: one table, and what of a difference may be chance.

  python compare.py runs/*

Writes comparison.md, comparison.csv, comparison.png and compare.html, a page of them all, to
--output.
"""

import sys
from pathlib import Path

from lab import comparison, console, report, scatter, tables
from lab.commandline import parse_arguments
from lab.comparison import CompareConfig
from lab.errors import run_script


def main(argv: list[str] | None = None) -> int:
    """Compares as the command line `argv` says; the exit code. Raises `UserError`."""
    config = CompareConfig(**parse_arguments(CompareConfig, argv, prog="compare.py", about=__doc__))
    folder = Path(config.output)
    runs = comparison.read_runs(config.runs)
    rows = comparison.rows(runs)
    tables.runs([{name: comparison.text(name, row[name]) for name in row} for row in rows])
    comparison.make(folder)
    comparison.write(folder, runs, rows)
    scatter.accuracy_against_cost(rows, folder / comparison.PICTURE)
    report.write_comparison(folder, runs, rows)
    console.print_line(comparison.INTERVAL)
    console.print_line(f"written: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
