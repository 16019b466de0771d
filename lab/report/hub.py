"""Upload a finished run to the Hugging Face Hub: weights, settings, report, card and plots.

A repository that does not exist is created as private. Checkpoints, predictions and the plots that
show images of the dataset are not uploaded. config.json and the weights contain the path of the
data directory.
"""

import shlex

from lab import console
from lab.checkpoint.run_dir import BEST, CARD, CONFIG, PLOTS, REPORT, RunDir
from lab.config.schema import TrainConfig
from lab.errors import UserError

FILES = (BEST, CONFIG, REPORT, CARD)
PLOTS_WITHOUT_IMAGES = ("curves", "confusion_matrix", "per_class", "calibration")


def check_upload(config: TrainConfig, needed: bool = True) -> None:
    """Raise `UserError` if the run could not be uploaded to --push-to-hub."""
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


def upload(run: RunDir, config: TrainConfig) -> None:
    """Upload a finished run to --push-to-hub, if given, in one commit; a failure only warns."""
    name = config.push_to_hub
    if not (name and run.is_main_process):
        return
    from huggingface_hub import CommitOperationAdd, HfApi

    plots = [f"{PLOTS}/{plot.name}" for plot in run.plot_files if plot.stem in PLOTS_WITHOUT_IMAGES]
    try:
        with console.status(f"uploading to {name}"):
            added = [CommitOperationAdd(file, str(run.path / file)) for file in (*FILES, *plots)]
            repository = HfApi().create_repo(name, private=True, exist_ok=True)
            HfApi().create_commit(repository.repo_id, added, commit_message="Upload a run of lab")
        console.info(f"uploaded: {repository}")
    except Exception as error:  # of the network, the Hub or their clients
        command = ["python", "train.py", "--resume", str(run.path), "--push-to-hub", name]
        console.warn(
            f"{run.path} could not be uploaded ({error}). Try again: {shlex.join(command)}."
        )
