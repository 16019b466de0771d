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

from lab import console
from lab.checkpoint.run_dir import CARD, PAGE, PLOTS, RunDir
from lab.config.cli import parse_arguments
from lab.errors import UserError, run_script
from lab.report import compare, html, model_card, plots
from lab.report.compare import CompareConfig


def main(argv: list[str] | None = None) -> int:
    """Compares as the command line `argv` says; the exit code. Raises `UserError`."""
    config = CompareConfig(
        **parse_arguments(CompareConfig, argv, prog="compare.py", description=__doc__)
    )
    if len(config.runs) == 1:
        return draw_again(config)
    folder = Path(config.output)
    runs = compare.read_runs(config.runs)
    rows = compare.rows(runs)
    console.runs_table([{name: compare.text(name, row[name]) for name in row} for row in rows])
    compare.make(folder)
    compare.write(folder, runs, rows)
    plots.accuracy_against_cost(rows, folder / compare.COMPARISON_PLOT)
    html.write_comparison(folder, runs, rows)
    console.print_line(compare.INTERVAL)
    console.print_line(f"written: {folder}")
    return 0


def draw_again(config: CompareConfig) -> int:
    """Write the plots and the page of a run again, and its model card if it has none."""
    if config.output != CompareConfig.output:
        raise UserError("--output is for several runs", "Name more of them, or leave it out")
    run = RunDir(config.runs[0])
    written = [run.path / PLOTS, run.path / PAGE]
    plots.draw(run.path)
    html.write(run.path)
    if not (run.path / CARD).exists():  # what was edited in one is not lost
        model_card.write(run)
        written.append(run.path / CARD)
    for path in written:
        console.print_line(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
