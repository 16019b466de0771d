"""Extract the commands, inline code and links of the documentation."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "accelerate", "torchrun", "make", "pip", "sbatch", "export", "find", "srun")
# Placeholders in commands, and values for them.
PLACEHOLDERS = {"IP": "10.0.0.1", "RANK": "0", "RUN": "runs/trial", "NAME": "trial"}
PLACEHOLDERS |= {"WEIGHTS": "best.safetensors", "FILE": "classes.csv", "N": "3"}


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the content of a page's fenced blocks in these languages; "" matches no language."""
    matches = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [body for language, body in matches if language in languages]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def inline(page: Path) -> list[str]:
    """Return the inline code of a page, with line breaks replaced by spaces."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> Iterator[str]:
    """Yield the lines of `sh` blocks, and what looks like a command in other code."""
    for body in blocks(page, "sh"):
        yield from _lines(body)
    for body in blocks(page, "", "text"):
        yield from filter(_is_command, _lines(body))
    for code in inline(page):
        options = any(word.startswith("-") or "." in word for word in code.split()[1:])
        if _is_command(code) and (options or code.startswith("make ")):
            yield code


def _lines(body: str) -> Iterator[str]:
    """Yield the lines of a block without comments, with continued lines joined."""
    for line in re.sub(r"\s*\\\n\s*", " ", body).splitlines():
        line = re.split(r"\s{2,}|\s+#", line.strip())[0]
        if line and not line.startswith("#"):
            yield line


def _is_command(text: str) -> bool:
    words = itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), text.split())
    return next(words, "") in PROGRAMS


def words_of(command: str) -> list[str]:
    """Split a command into words: its last part after `|`, without variables and placeholders."""
    words = shlex.split(command.rpartition(" | ")[2])
    words = [PLACEHOLDERS.get(word, word) for word in words]
    return list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, heading) of the links and images of a page within the repository."""
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not re.match(r"https?:", target):
            path, _, heading = target.partition("#")
            yield path, heading


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
