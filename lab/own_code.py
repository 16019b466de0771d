"""Code of the user's that an option names as `FILE.py:FUNCTION`.

Loading a file from a stranger must not run code (promise P4): only what the user gave on the
command line may be imported.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.errors import UserError

OBJECT = "python.py:"  # begins the names of models and datasets that are passed to `train.main`
DATASETS = f"{OBJECT}datasets"
PASSED: dict[str, Any] = {}  # objects that are passed to `train.main`, by the name for them


def register(name: str, value: Any) -> str:
    """Keep an object that is passed to `train.main`, and return its name."""
    PASSED[name] = value
    return name


def file_sha256(name: str) -> str:
    """Return the SHA-256 of the file of `FILE.py:FUNCTION`, in hexadecimal. Raises `UserError`."""
    file = name.rpartition(":")[0]
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})", "Check the path") from error


def import_function(name: str) -> Callable[..., Any]:
    """Return the function of `FILE.py:FUNCTION`.

    Modules beside the file can be imported from it. Raises `UserError` if the file raises an
    exception or has no such function.
    """
    file, _, function_name = name.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.resolve().parent))
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise raised(file, error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{file} has no function {function_name}".rstrip(), "Check its name")
    return function


def raised(what: str, error: BaseException) -> UserError:
    """Return the error for an exception in the user's code."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".!: ")
    return UserError(f"{what} raised {reason}", "Correct it; --debug shows the traceback")
