"""Writes docs/commands.md: the --help of every script in the repository's root.

  python docs/make_commands.py

tests/unit/test_docs.py fails while the page is not what this gives.
"""

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "commands.md"
WIDTH = 100
HEAD = """\
# Commands

What `--help` prints, script by script. `python docs/make_commands.py` writes this page.

`[5]` is the default. `[recipe]`: the recipe of the model and data set gives it, and the command
line comes last. Where `--no-NAME` is listed beside `--NAME`, it turns off what a recipe, or the run
that is resumed, turned on. [training.md](training.md) says which options are worth knowing, and
[launching.md](launching.md) what may stand in place of `python`.
"""


def page() -> str:
    """The text of docs/commands.md."""
    scripts = sorted(path.stem for path in ROOT.glob("*.py"))
    parts = [f"\n## {name}.py\n\n```text\n{help_of(name)}\n```\n" for name in scripts]
    return HEAD + "".join(parts)


def help_of(name: str) -> str:
    """What `python NAME.py --help` prints, without the line of usage, which repeats every option.

    That line is also what Python's versions wrap in different ways.
    """
    script = importlib.import_module(name)
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.suppress(SystemExit),
        mock.patch.dict(os.environ, COLUMNS=str(WIDTH + 2)),
    ):
        script.main(["--help"])
    _, _, text = printed.getvalue().partition("\n\n")
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
