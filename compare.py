"""Compares finished runs: one table, and what of a difference may be chance.

  python compare.py runs/*                                   what has been trained
  python compare.py --train --models lenet5,alexnet --dataset digits --epochs 3

--train trains the models one after another, or goes on with what of them was stopped, and then
compares them. Writes comparison.md, comparison.csv, comparison.png and compare.html, a page of them
all, to --output.
"""

import sys
from pathlib import Path

import train
from lab import comparison, console, report, scatter, tables
from lab.commandline import parse_arguments
from lab.comparison import CompareConfig
from lab.errors import run_script


def main(argv: list[str] | None = None) -> int:
    """Compares as the command line `argv` says; the exit code. Raises `UserError`."""
    config = CompareConfig(**parse_arguments(CompareConfig, argv, prog="compare.py", about=__doc__))
    folder = Path(config.output)
    if config.train:  # mistakes, and what cannot be written, are told before hours of training
        for options in config.trainings().values():
            train.settings_of(options)
        comparison.make(folder)
    for name, options in config.trainings().items():
        console.say(f"\n{name}")
        if code := train.main(options):
            return code
    if not console.speaks():  # a process that only trained
        return 0
    runs = comparison.read_runs(config.folders())
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
