"""Compare finished runs, or draw the plots and the page of one run again.

  python compare.py runs/*                 a table of runs, with 95 % confidence intervals
  python compare.py runs/lenet5-mnist      the plots and the page of one run

Several runs: prints the most important columns, and writes all of them, with the recall of each
class, to comparison.md and comparison.csv in --output.
One run: writes plots/ and report.html in its directory again, and README.md, its model card, if it
has none.
"""

import sys
from pathlib import Path

from lab import console
from lab.checkpoint.run_dir import CARD, PAGE, PLOTS, RunDir
from lab.config.cli import parse_arguments
from lab.errors import UserError, run_script
from lab.report import compare, html, model_card, plots
from lab.report.compare import CompareConfig


def main(argv: list[str] | None = None) -> None:
    """Compare runs as the command line `argv` says. Raises `UserError`."""
    config = CompareConfig(
        **parse_arguments(CompareConfig, argv, prog="compare.py", description=__doc__)
    )
    if len(config.runs) == 1:
        redraw(config)
        return
    output = Path(config.output)
    runs = compare.read_runs(config.runs)
    rows = compare.rows(runs)
    console.runs_table([{name: compare.text(name, row[name]) for name in row} for row in rows])
    compare.write(output, runs, rows)
    console.print_line(compare.INTERVAL_NOTE)
    console.print_line(f"written: {output}")


def redraw(config: CompareConfig) -> None:
    """Write the plots and the page of one run again, and its model card if it has none."""
    if config.output != CompareConfig.output:
        raise UserError(
            "invalid --output: it applies to several runs", "Give several runs, or omit --output"
        )
    run = RunDir(config.runs[0])
    written = [run.path / PLOTS, run.path / PAGE]
    plots.draw(run.path)
    html.write(run.path)
    if not (run.path / CARD).exists():  # an existing card may have been edited
        model_card.write(run)
        written.append(run.path / CARD)
    for path in written:
        console.print_line(f"written: {path}")


if __name__ == "__main__":
    sys.exit(run_script(main))
