"""Classifies pictures with saved weights, preprocessed as in evaluation.

  python predict.py runs/alexnet-folder PICTURE.jpg            its three likeliest classes
  python predict.py best.safetensors FOLDER --csv classes.csv
  find . -name '*.png' | python predict.py best.safetensors - --json - --top-k 1
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml predict.py WEIGHTS FOLDER

A picture or folder that cannot be read is named in a warning and in the output; the others are
classified, and the exit code is 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from lab import console
from lab.checkpoint.atomic_io import check_output_file
from lab.config.cli import parse_arguments
from lab.config.schema import MACHINE, REPORT, TTA, WEIGHTS, check_fields, option
from lab.errors import UserError, run_script


@dataclass(frozen=True)
class PredictConfig:
    """The settings of a prediction."""

    # fmt: off
    weights: str = option("", WEIGHTS,
        "a run's folder or a .safetensors file that train.py wrote", positional=True)
    pictures: tuple[str, ...] = option((), WEIGHTS,
        "pictures, folders of them, or - for paths on standard input", positional=True, nargs="*")
    top_k: int = option(3, REPORT, "likeliest classes of each picture", low=1)
    json: str = option("", REPORT,
        "a JSON object a line, into this file; - is standard output", metavar="FILE")
    csv: str = option("", REPORT, "the same as CSV", metavar="FILE")
    tta: str = option("none", WEIGHTS,
        "flip: the mean softmax of each picture and its mirror image", choices=TTA)
    batch_size: int = option(100, MACHINE, "pictures a forward pass", low=1)
    device: str = option("auto", MACHINE,
        "auto: an accelerator where there is one", choices=("auto", "cpu"))
    workers: int = option(-1, MACHINE, "processes that decode; -1: by cores", low=-1, high=256)
    threads: int = option(0, MACHINE,
        "CPU threads a process; 0: cores / processes on this host", low=0, high=1024)
    quiet: bool = option(False, REPORT, "print no table")
    debug: bool = option(False, REPORT, "show the traceback of an error")
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.pictures:
            raise UserError("there are no pictures to classify", "Name some, or a folder of them")
        if self.json and self.json == self.csv:
            raise UserError(f"--json and --csv both go to {self.json}", "Name two files")


def main(argv: list[str] | None = None) -> int:
    """Classifies as the command line `argv` says; the exit code. Raises `UserError`."""
    config = PredictConfig(
        **parse_arguments(PredictConfig, argv, prog="predict.py", description=__doc__)
    )

    # PyTorch takes seconds to import: --help and a mistyped option are answered before.
    from accelerate.utils import broadcast_object_list

    from lab import inference
    from lab.checkpoint import weights as weights_module
    from lab.data.loaders import LoaderOptions
    from lab.distributed import build_accelerator, raise_on_all_ranks
    from lab.engine.training import to_device

    files = {file: flag for flag, file in (("--json", config.json), ("--csv", config.csv)) if file}
    for file, flag in files.items():
        if file != "-":
            check_output_file(flag, Path(file))
    path = weights_module.find_weights(config.weights)
    metadata = weights_module.read_metadata(path)
    model_name = metadata["model"]["name"]
    accelerator = build_accelerator(
        training=False,
        trained_precision=metadata["precision"],
        threads=config.threads,
        quiet=config.quiet,
        cpu=config.device == "cpu",
    )
    with raise_on_all_ranks(accelerator):
        model = weights_module.load_model(path, metadata)
        listed = inference.find_images(config.pictures) if accelerator.is_main_process else None
    paths, unreadable = broadcast_object_list([listed])[0]
    model = to_device(model, model_name, accelerator.device)
    options = LoaderOptions.create(accelerator, "streaming", config.workers)
    with console.progress("pictures", -(-len(paths) // accelerator.num_processes)) as progress:
        found = inference.predict_files(
            accelerator,
            model,
            metadata,
            paths,
            batch_size=config.batch_size,
            num_workers=options.num_workers,
            top_k=config.top_k,
            tta=config.tta,
            on_batch=progress.update,
        )
    found += unreadable
    failed = [one for one in found if one.error]
    for one in failed:
        console.warn(one.error)
    if console.is_main_process():
        if config.json:
            inference.write_output(config.json, inference.json_lines(found))
        if config.csv:
            inference.write_output(config.csv, inference.csv_rows(found, config.top_k))
        if "-" not in files:  # standard output is the answer's alone
            for file in files:
                console.info(f"written: {file}")
        if not (config.json or config.csv or config.quiet):
            console.predictions_table([(one.path, one.classes) for one in found if one.classes])
    accelerator.end_training()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
