"""A folder of pictures as a data set: CLASS/*, or {train,val,test}/CLASS/*."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from lab.data.decode import FileImages
from lab.data.types import RawSplits, Split, normalized
from lab.errors import UserError

if TYPE_CHECKING:
    from lab.data import DataConfig


SPLIT_FOLDERS = {  # the names that a split's folder may have, in any case
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def read_folder(config: DataConfig) -> RawSplits:
    """Return the splits of a folder: the class folders of its `train`, `val` and `test`; or one.

    Folder names of splits may have any of the usual spellings (SPLIT_FOLDERS), in any case. Class
    names are the sorted folder names in Unicode's composed form (NFC); names that begin with a dot
    are ignored. Raises `UserError` for a folder that is missing, unreadable or ambiguous, for no
    classes, an empty class, and classes of `val` or `test` that are not those of `train`.
    """
    root = Path(config.data_dir)
    folders = _split_folders(root)
    class_folders = {name: _class_folders(folder) for name, folder in folders.items()}
    class_names = tuple(class_folders["train"])
    if not class_names:
        raise UserError(
            f"{folders['train']} holds no class folders",
            "Put the pictures of each class into a folder of its own",
        )
    others: list[str] = []
    parts = {}
    for name, found in class_folders.items():
        _check_same_classes(folders[name], found, class_names)
        paths, labels = _list_split(found, others)
        files = FileImages(tuple(paths), config.image_size)
        parts[name] = Split(files, torch.tensor(labels), class_names, files.paths, str(root))
    warnings = []
    beside = [name for name in _list_folder(folders["train"])[1] if _is_image(name)]
    if beside:
        warnings.append(
            f"{len(beside)} pictures are left out, as {folders['train'] / beside[0]}: "
            "in no class folder"
        )
    if others:
        warnings.append(
            f"{len(others)} of the files in class folders are left out, as {min(others)}: "
            f"not {', '.join(SUFFIXES)}"
        )
    return RawSplits(**parts, warnings=tuple(warnings))


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split; the root as "train" alone where it holds the classes.

    Raises `UserError` where the names allow more than one reading.
    """
    names, _ = _list_folder(root)
    found = {
        split: [name for name in names if name.lower() in spellings]
        for split, spellings in SPLIT_FOLDERS.items()
    }
    for spelled in found.values():
        if len(spelled) > 1:
            raise UserError(
                f"{root} has both {spelled[0]} and {spelled[1]}, two names of one split",
                "Keep one of them",
            )
    present = {split: spelled[0] for split, spelled in found.items() if spelled}
    if not present:
        return {"train": root}
    if "train" not in present:
        [name, *_] = present.values()
        raise UserError(
            f"{root} has a folder {name}, but no folder train",
            f"Call the folder to train on train; if {name} is a class, move all class folders "
            "into a folder train",
        )
    rest = [name for name in names if name not in present.values()]
    # Whatever cannot be read there, such as lost+found, is not part of the data.
    with_pictures = (n for n in rest if any(pictures(root / n, on_error=lambda _: None)))
    if (beside := next(with_pictures, None)) is not None:
        raise UserError(
            f"{root} has the folder {present['train']} and, beside it, {beside}, which holds "
            f"pictures too: {present['train']} may be a split or a class",
            f"Move {beside} elsewhere; if both are classes, move all class folders into a folder "
            "train",
        )
    return {split: root / name for split, name in present.items()}


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """Return the folders of each class by its name, sorted.

    A class has several where its name was written composed (NFC) and decomposed (NFD), as after a
    copy from another system; they look the same.
    """
    found: dict[str, list[Path]] = {}
    for name in _list_folder(root)[0]:
        found.setdefault(normalized(name), []).append(root / name)
    return dict(sorted(found.items()))


def _check_same_classes(root: Path, found: Iterable[str], class_names: Iterable[str]) -> None:
    for problem, names in (
        ("has classes that are not trained on", set(found) - set(class_names)),
        ("lacks classes that are trained on", set(class_names) - set(found)),
    ):
        if names:
            raise UserError(
                f"{root} {problem}: {', '.join(sorted(names))}",
                "Every split needs the same class folders",
            )


def _list_split(
    class_folders: Mapping[str, Sequence[Path]], others: list[str]
) -> tuple[list[str], list[int]]:
    """Return the paths of a split's images, sorted within a class, and their labels."""
    paths: list[str] = []
    labels: list[int] = []
    for label, folders in enumerate(class_folders.values()):
        found = [path for folder in folders for path in pictures(folder, others)]
        if not found:
            raise UserError(
                f"the class folder {folders[0]} holds no pictures",
                f"Add some ({', '.join(SUFFIXES)}) or delete the folder",
            )
        paths += sorted(found, key=normalized)
        labels += [label] * len(found)
    return paths, labels


def pictures(
    root: Path,
    others: list[str] | None = None,
    on_error: Callable[[OSError], None] | None = None,
) -> Iterator[str]:
    """Yield the paths of the images at any depth below a folder; hidden ones are ignored.

    Files of other types are added to `others`, except those that file managers leave. A folder
    that cannot be read raises `UserError`, unless `on_error` takes the error.
    """
    seen = set()
    for folder, folders, files in os.walk(root, onerror=on_error or _refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link back up would list all again
            folders.clear()
            continue
        seen.add(real)
        # Editors keep copies of pictures in hidden folders. In place: os.walk then skips them.
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.startswith("."):
                continue
            if _is_image(name):
                yield os.path.join(folder, name)
            elif others is not None and name.lower() not in ("thumbs.db", "desktop.ini"):
                others.append(os.path.join(folder, name))


def _list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and of the other entries; hidden ones are ignored."""
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise UserError(
                f"there is no folder {folder}", "Give --data-dir a folder of CLASS/pictures"
            ) from error
        _refuse(error)
    return sorted(folders), sorted(files)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"cannot read the folder {error.filename} ({error.strerror})", "Mend its permissions"
    ) from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
