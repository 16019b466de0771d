"""Make the pictures of the documentation: docs/console.svg, report.png, lesson.svg, attention.svg.

  python docs/make_pictures.py console                       trains LeNet-5 on the bundled digits
  python docs/make_pictures.py report runs/lenet5-mnist      the finished run whose page is shown
  python docs/make_pictures.py lesson                        draws results/lesson/ablations.json
  python docs/make_pictures.py attention                     draws results/lesson/attention.json

The second needs Playwright and Chromium.
"""

import io
import os
import re
import shutil
import statistics
import sys
import tempfile
from contextlib import chdir, nullcontext
from pathlib import Path
from unittest import mock

DOCS = Path(__file__).resolve().parent
SVG = {"svg.fonttype": "none", "svg.hashsalt": "lesson", "font.size": 9}
CELL = "4,9"  # true and predicted class of the cell to click


def console_svg() -> str:
    """Return the output of a training run on a terminal of 100 columns, as SVG."""
    from rich.console import Console

    import train
    from lab import console

    terminal = Console(force_terminal=True, record=True, width=100, file=io.StringIO())
    with (
        tempfile.TemporaryDirectory() as directory,
        chdir(directory),
        mock.patch.object(console, "out", return_value=terminal),
        mock.patch.object(console, "_live", return_value=nullcontext()),  # no progress bars
    ):
        terminal.print("[bold green]$[/] [bold]python train.py --dataset digits[/]")
        train.main(["--dataset", "digits"])
        terminal.print()
    # Remove rich's web fonts, so that the image loads nothing from the network.
    return re.sub(r"@font-face {.*?}\s*", "", terminal.export_svg(title="lab"), flags=re.DOTALL)


def report_png(run: Path, target: Path) -> None:
    """Save a screenshot of a run's page with a cell of the confusion matrix selected."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1100, "height": 1463})
        page.goto((run / "report.html").resolve().as_uri())
        page.click(f"#matrix button[data-cell='{CELL}']")
        page.mouse.move(0, 0)  # no cell is highlighted
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=target)
        browser.close()


def lesson_svg(target: Path) -> None:
    """Draw the ablations of docs/architectures.md."""
    import make_tables
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from lab.report.plots import STYLE

    with rc_context(STYLE | SVG):
        figure = Figure(figsize=(9, 3), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, data in zip(panels, ("digits", "photographs"), strict=True):
            for offset, base in ((-0.2, "LeNet-5"), (0.2, "AlexNet")):
                gains = [
                    statistics.mean(make_tables.gains(data, base, factor))
                    for factor in make_tables.SHORT_TITLES
                ]
                positions = [i + offset for i in range(len(gains))]
                axes.barh(positions, gains, height=0.38, label=f"in {base}")
            axes.axvline(0, color="#888888", linewidth=0.8)
            axes.set_title(f"gain in accuracy, {data}")
        titles = make_tables.SHORT_TITLES.values()
        panels[0].set_yticks(range(len(titles)), titles)
        panels[0].invert_yaxis()
        panels[0].legend()
        figure.savefig(target, metadata={"Date": None})


def attention_svg(target: Path) -> None:
    """Draw a digit of each class, and the attention of a ViT's class token to its patches."""
    import make_tables
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from lab.report.plots import STYLE

    rows = [row for row in make_tables.lesson("attention") if row["digit"] is not None]
    with rc_context(STYLE | SVG):
        figure = Figure(figsize=(9, 2), layout="constrained")
        panels = figure.subplots(2, len(rows))
        for (above, below), row in zip(panels.T, rows, strict=True):
            for axes, values, colors in (
                (above, "pixels", "gray_r"),
                (below, "attention", "viridis"),
            ):
                squares = [row[values][i : i + 8] for i in range(0, 64, 8)]
                axes.imshow(squares, cmap=colors, vmin=0)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(visible=False)
        panels[0, 0].set_ylabel("patches")
        panels[1, 0].set_ylabel("attention")
        figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Make the picture of the first argument."""
    if sys.argv[1] == "report":
        report_png(Path(sys.argv[2]), DOCS / "report.png")
    elif sys.argv[1] == "console":
        (DOCS / "console.svg").write_text(console_svg())
    elif sys.argv[1] == "attention":
        attention_svg(DOCS / "attention.svg")
    elif sys.argv[1] == "lesson":
        lesson_svg(DOCS / "lesson.svg")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))  # lab and the scripts, installed or not
    os.environ.pop("NO_COLOR", None)
    main()
