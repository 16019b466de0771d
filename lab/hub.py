"""Uploads a finished run to Hugging Face's Hub: weights, settings, report, card and pictures.

  python -m lab.hub runs/lenet5-mnist lenet5-mnist       your own NAME, or ORGANISATION/NAME

A repository that is not there yet is made, a private one; its settings on the Hub open it. States
and predictions stay here. config.json and the weights name the folder that the data lay in.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from lab import console
from lab.commandline import parse_arguments
from lab.config import OUTPUT
from lab.errors import UserError, run_script
from lab.options import option
from lab.rundir import BEST, CARD, CONFIG, REPORT, RunDir

UPLOADED = (BEST, CONFIG, REPORT, CARD)


def require_login(name: str, needed: bool = True) -> None:
    """Nothing; raises `UserError` where this process could not upload to the repository `name`.

    Asks no network: a machine that has none now may have it at the end.
    """
    if not (name and needed):
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name} is no name of a repository ({error})", "Give NAME, or ORGANISATION/NAME"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE keeps the Hub away", f"Unset it to upload to {name}")
    if not get_token():
        raise UserError(
            f"there is no login to upload to {name} with", "Run hf auth login, or set HF_TOKEN"
        )


def push(run: RunDir, name: str) -> str:
    """The address of the repository that now has the run, in one commit; raises `UserError`."""
    from huggingface_hub import CommitOperationAdd, HfApi

    if missing := [file for file in UPLOADED if not (run.path / file).is_file()]:
        raise UserError(
            f"{run.path} has no {', '.join(missing)}",
            f"Finish the run with train.py --resume, or write the card with python -m lab.card "
            f"{shlex.quote(str(run.path))}",
        )
    files = [run.path / file for file in UPLOADED] + run.pictures
    added = [CommitOperationAdd(path.relative_to(run.path).as_posix(), str(path)) for path in files]
    try:
        repository = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().create_commit(repository.repo_id, added, commit_message="Upload a run of lab")
    except Exception as error:  # of the network, the Hub, or the clients of both
        raise UserError(
            f"{run.path} could not be uploaded ({error})",
            f"Try again: {_command(run, name)}",
        ) from error
    return str(repository)


def upload(run: RunDir, name: str) -> None:
    """Uploads a run that has ended well to `name`, if any; a failure is a warning only."""
    if not (name and run.writes):
        return
    try:
        with console.working(f"uploading to {name}"):
            address = push(run, name)
        console.say(f"uploaded: {address}")
    except UserError as error:
        console.warn(str(error))


def _command(run: RunDir, name: str) -> str:
    return shlex.join(["python", "-m", "lab.hub", str(run.path), name])


@dataclass(frozen=True)
class HubConfig:
    """What to upload."""

    # fmt: off
    run: str = option("", OUTPUT, "the folder of a finished run", positional=True)
    name: str = option("", OUTPUT, "the repository, NAME or ORGANISATION/NAME", positional=True)
    debug: bool = option(False, OUTPUT, "show the traceback of an error")
    # fmt: on


def main(argv: list[str] | None = None) -> None:
    """Uploads as the command line `argv` says; raises `UserError`."""
    config = HubConfig(**parse_arguments(HubConfig, argv, prog="-m lab.hub", about=__doc__))
    if not Path(config.run).is_dir():
        raise UserError(f"there is no run {config.run}", "Give the folder of a finished run")
    require_login(config.name)
    console.print_line(f"uploaded: {push(RunDir(config.run), config.name)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
