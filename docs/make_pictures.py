"""Make the screenshots of the README: docs/console.svg and docs/report.png.

  python docs/make_pictures.py runs/lenet5-mnist     the finished run whose page is shown

The first shows the output of training LeNet-5 on the bundled digits, which this script runs. The
second shows the page of the run and needs Playwright and Chromium.
"""

import io
import os
import re
import shutil
import sys
import tempfile
from contextlib import chdir, nullcontext
from pathlib import Path
from unittest import mock

DOCS = Path(__file__).resolve().parent
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


def main() -> None:
    """Write both files."""
    report_png(Path(sys.argv[1]), DOCS / "report.png")
    (DOCS / "console.svg").write_text(console_svg())


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))  # lab and the scripts, installed or not
    os.environ.pop("NO_COLOR", None)
    main()
