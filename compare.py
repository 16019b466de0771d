"""Compares finished runs: one table, and what of a difference may be chance.

  python compare.py runs/*                 what has been trained
  python compare.py runs/lenet5-mnist      one run: its plots and page again

Writes comparison.md, comparison.csv, comparison.png and compare.html, a page of them all, to
--output. Of one run it draws plots/ and report.html again, in the run's folder, and writes the
model card README.md if there is none. A terminal shows the columns that it has room for, the
files have all of them.
"""

import sys
from pathlib import Path

from lab import card, comparison, console, plots, report, scatter, tables
from lab.commandline import parse_arguments
from lab.comparison import CompareConfig
from lab.errors import UserError, run_script
from lab.rundir import CARD, PAGE, PLOTS, RunDir


def main(argv: list[str] | None = None) -> int:
    """Compares as the command line `argv` says; the exit code. Raises `UserError`."""
    config = CompareConfig(**parse_arguments(CompareConfig, argv, prog="compare.py", about=__doc__))
    if len(config.runs) == 1:
        return draw_again(config)
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


def draw_again(config: CompareConfig) -> int:
    """Write the plots and the page of a run again, and its model card if it has none."""
    if config.output != CompareConfig.output:
        raise UserError("--output is for several runs", "Name more of them, or leave it out")
    run = RunDir(config.runs[0])
    written = [run.path / PLOTS, run.path / PAGE]
    plots.draw(run.path)
    report.write(run.path)
    if not (run.path / CARD).exists():  # what was edited in one is not lost
        card.write(run)
        written.append(run.path / CARD)
    for path in written:
        console.print_line(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
