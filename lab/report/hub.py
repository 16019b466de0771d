"""Upload a finished run to the Hugging Face Hub: weights, settings, report, card and plots.

A repository that does not exist is created as private. Checkpoints and predictions are not
uploaded; plots that show images of the dataset are uploaded only with --hub-images. config.json and
the weights contain the path of the data directory.
"""

import shlex

from lab import console
from lab.checkpoint.run_dir import BEST, CARD, CONFIG, PLOTS, REPORT, RunDir
from lab.config.schema import TrainConfig
from lab.errors import UserError

FILES = (BEST, CONFIG, REPORT, CARD)
PLOTS_WITHOUT_IMAGES = tuple(
    f"{PLOTS}/{name}.png" for name in ("curves", "confusion_matrix", "per_class", "calibration")
)


def check_upload(config: TrainConfig, needed: bool = True) -> None:
    """Raise `UserError` if the run could not be uploaded to --push-to-hub, or if that is public.

    If the Hub cannot be reached, only warn: it may be reachable at the end of the training, and
    `push` checks again.
    """
    name = config.push_to_hub
    if not (name and needed):
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"invalid --push-to-hub {name!r} ({error})", "Give NAME or ORGANIZATION/NAME"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE disables the Hub", f"Unset it to upload to {name}")
    if not get_token():
        raise UserError(
            f"no login to the Hub for uploading to {name}", "Run hf auth login, or set HF_TOKEN"
        )
    try:
        check_private(name, config.hub_public)
    except UserError:
        raise
    except Exception as error:  # of the network, the Hub or their clients
        console.warn(f"the visibility of {name} will be checked before the upload ({error})")


def check_private(name: str, public: bool) -> None:
    """Raise `UserError` if the repository exists and is public, unless `public` allows that.

    Errors of the network or the Hub are raised unchanged.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if public:
        return
    api = HfApi()
    full_name = name if "/" in name else f"{api.whoami()['name']}/{name}"
    try:
        private = api.repo_info(full_name, timeout=10).private
    except RepositoryNotFoundError:
        return
    if not private:
        raise UserError(
            f"the repository {full_name} is public",
            "Give --hub-public to publish the run there, or give another --push-to-hub",
        )


def files(run: RunDir, images: bool) -> list[str]:
    """Return the files of a run to upload; plots that show images only if `images`."""
    plots = [path.relative_to(run.path).as_posix() for path in run.plot_files]
    return [*FILES, *(plot for plot in plots if images or plot in PLOTS_WITHOUT_IMAGES)]


def push(run: RunDir, name: str, *, images: bool = False, public: bool = False) -> str:
    """Upload the files of a run in one commit and return the repository's address.

    Raise `UserError` if the upload fails, or if the repository is public and `public` is False.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    names = files(run, images)
    try:
        check_private(name, public)
        added = [CommitOperationAdd(file, str(run.path / file)) for file in names]
        repository = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().create_commit(repository.repo_id, added, commit_message="Upload a run of lab")
    except UserError:
        raise
    except Exception as error:  # of the network, the Hub or their clients
        command = ["python", "train.py", "--resume", str(run.path), "--push-to-hub", name]
        command += ["--hub-images"] * images + ["--hub-public"] * public
        raise UserError(
            f"{run.path} could not be uploaded ({error})", f"Try again: {shlex.join(command)}"
        ) from error
    return str(repository)


def upload(run: RunDir, config: TrainConfig) -> None:
    """Upload a finished run to --push-to-hub, if given; a failure is only a warning."""
    name = config.push_to_hub
    if not (name and run.is_main_process):
        return
    try:
        with console.status(f"uploading to {name}"):
            address = push(run, name, images=config.hub_images, public=config.hub_public)
        console.info(f"uploaded: {address}")
    except UserError as error:
        console.warn(str(error))
