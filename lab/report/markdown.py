"""Format Markdown from text that may come from strangers: class names, paths, settings."""

import re
import unicodedata
from collections.abc import Iterable, Sequence


def escaped(value: object) -> str:
    """Return Markdown that shows a value literally on one line, also in a table cell.

    Put a backslash, which CommonMark removes, before every ASCII punctuation character except
    hyphen and comma. Replace control characters, characters that change the writing direction and
    lone surrogates by question marks.
    """
    text = " ".join(str(value).split())
    text = "".join("?" if unicodedata.category(c)[0] == "C" else c for c in text)
    return re.sub(r"([!-+./:-@\[-`{-~])", r"\\\1", text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose cells are Markdown; all columns but the first are aligned right."""
    rules = ["---", *("---:" for _ in heads[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rules, *rows))


def code(text: str, language: str) -> str:
    """Return a fenced code block; `text` contains no fence."""
    return f"```{language}\n{text}\n```"
