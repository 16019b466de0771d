"""escaped, table, code: Markdown from texts that may be anyone's."""

import re
import unicodedata
from collections.abc import Iterable, Sequence


def escaped(value: object) -> str:
    """A value as Markdown that shows it literally, on one line, in a table's cell, too.

    Every ASCII punctuation character but hyphen and comma has a backslash before it, which
    CommonMark takes away again. Control characters, those that turn the direction of writing, and
    halves of pairs become question marks.
    """
    text = " ".join(str(value).split())
    text = "".join("?" if unicodedata.category(c)[0] == "C" else c for c in text)
    return re.sub(r"([!-+./:-@\[-`{-~])", r"\\\1", text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; the columns but the first are numbers'."""
    rules = ["---", *("---:" for _ in heads[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rules, *rows))


def code(text: str, language: str) -> str:
    """A block of code, whose fence is longer than any within."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
