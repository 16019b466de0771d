"""Cross-validation: train one run for each fold, so that every image is tested once.

  python cross_validate.py --dataset IMAGES --folds 5 --name mine
  python cross_validate.py --dataset digits --model lenet5
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml cross_validate.py --folds 5

The options are those of train.py; --folds is 5 by default. The training images are divided into
folds by class, and files with the same content are in the same fold. Run NAME/fold-I is tested on
fold I and trained on the others, of which --val-fraction is held out to select the best epoch. The
test split of a dataset that has one is not used.

The script prints the mean and the standard deviation of accuracy and macro-F1 over the folds. It
writes the report, the confusion matrix and other plots of the predictions of all folds to NAME/.
After an interruption the same command continues: finished folds are not trained again.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import train
from lab.checkpoint.run_dir import CONFIG
from lab.config.cli import parse_arguments, read_config
from lab.config.recipes import resolve
from lab.config.schema import AUTOMATIC, TASK, TRAINING, TrainConfig, flag
from lab.errors import UserError, run_script

# These options would apply to one run, or are set here.
NOT_ACCEPTED = ("fold", "resume", "overwrite", "push_to_hub", "print_config")
DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainConfig)} | {"print_config": False}
# These settings differ between folds, or do not change the result.
NOT_COMPARED = ("fold", "revision", "data_dir")


def main(argv: list[str] | None = None) -> int:
    """Cross-validate with the arguments `argv`; return the exit code. Raises `UserError`."""
    start_time = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    overrides = parse_arguments(TrainConfig, argv, prog="cross_validate.py", description=__doc__)
    for name in NOT_ACCEPTED:  # --config may contain their defaults
        if overrides.get(name, DEFAULTS[name]) != DEFAULTS[name]:
            raise UserError(f"{flag(name)} is not an option of cross_validate.py", "Leave it out")
    num_folds = overrides.get("folds") or 5
    config = resolve(overrides | {"folds": num_folds, "fold": 1})
    default = f"{config.model_title}-{config.dataset_title}-{num_folds}-folds".replace(":", "-")
    directory = Path(config.output_dir) / (config.name or default)
    if (directory / CONFIG).exists():
        raise UserError(
            f"{directory} is a run, whose test results would be replaced", "Give another --name"
        )
    words = [*argv, "--folds", str(num_folds), "--output-dir", str(directory), "--resume", "auto"]
    check_same_settings(directory, config, overrides)
    runs = []
    for fold in range(1, num_folds + 1):
        hours = 0.0  # no limit; a fold that is resumed would continue with the rest of its own
        if config.max_hours:  # for all folds together
            hours = max(1e-9, config.max_hours - (time.monotonic() - start_time) / 3600)
        words += ["--max-hours", str(hours)]
        run = train.main([*words, "--fold", str(fold), "--name", f"fold-{fold}"])
        if run.interrupted:
            return run.exit_code
        runs.append(run)
    if runs[0].is_main_process:
        from lab.report.cross_validation import write_results  # imports PyTorch

        write_results(directory, [run.path for run in runs])
    return 0


def check_same_settings(directory: Path, config: TrainConfig, overrides: dict[str, Any]) -> None:
    """Raise `UserError` if a fold was trained with other settings.

    train.py compares only those that are given. A setting that is left out is that of the recipe
    for a new fold, but that of its own run for a fold that is resumed.
    """
    compared = [
        f.name for f in dataclasses.fields(TrainConfig) if f.metadata["group"] in (TASK, TRAINING)
    ]
    for path in sorted(directory.glob(f"fold-*/{CONFIG}")):
        stored = read_config(path)
        for name in sorted({*compared} - {*overrides, *NOT_COMPARED}):
            value = getattr(config, name)
            if value != AUTOMATIC.get(name) and stored.get(name, value) != value:
                raise UserError(
                    f"{path.parent} was trained with {flag(name)} {stored[name]}, not {value}",
                    "Give the same options for all folds, or another --name",
                )


if __name__ == "__main__":
    sys.exit(run_script(main))
