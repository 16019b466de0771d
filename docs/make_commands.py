"""Write docs/commands.md: the --help of every script in the root directory.

  python docs/make_commands.py

tests/unit/test_docs.py fails if the page is not up to date.
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

The output of `--help` for every script. `python docs/make_commands.py` writes this page.

`[5]` is a default. The default of an option marked `[recipe]` comes from the recipe for the model
and dataset. The settings file of `--config` overrides the recipe, and the command line overrides
both. `--no-NAME` turns off what a recipe, a settings file or the resumed run turned on.
[training.md](training.md) explains the most useful options, and [launching.md](launching.md) how to
launch several processes.
"""


def page() -> str:
    """Return the text of docs/commands.md."""
    scripts = sorted(path.stem for path in ROOT.glob("*.py"))
    parts = [f"\n## {name}.py\n\n```text\n{help_of(name)}\n```\n" for name in scripts]
    return HEAD + "".join(parts)


def help_of(name: str) -> str:
    """Return the output of `python NAME.py --help` without the usage line.

    That line repeats every option, and versions of Python wrap it differently.
    """
    script = importlib.import_module(name)
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.suppress(SystemExit),
        mock.patch.dict(os.environ, COLUMNS=str(WIDTH + 2)),
    ):
        script.main(["--help"])
    _, _, text = printed.getvalue().partition("\n\n")
    if name == "cross_validate":  # its options are those of train.py
        text, _, _ = text.partition("\noptions:")
    return "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
