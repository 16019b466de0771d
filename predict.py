"""Classify images with saved weights, preprocessed as in evaluation.

  python predict.py runs/mine IMAGE.jpg                the top three classes
  python predict.py best.safetensors IMAGES --csv classes.csv
  python predict.py best.safetensors IMAGES --min-confidence 0.8
  python predict.py runs/mine IMAGES --explain out     also write Grad-CAM overlays to out/
  find . -name '*.png' | python predict.py best.safetensors - --json - --top-k 1
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml predict.py WEIGHTS IMAGES

If a file or directory cannot be read, a warning and the output report it, the other images are
classified, and the exit code is 1.
"""

import os
import sys
from dataclasses import dataclass

from lab import console
from lab.config.cli import parse_arguments
from lab.config.schema import (
    DEBUG,
    MACHINE,
    OWN_MODEL,
    QUIET,
    REPORT,
    THREADS,
    TRAINED_WEIGHTS,
    TTA,
    WEIGHTS,
    WORKERS,
    check_fields,
    option,
)
from lab.errors import UserError, run_script


@dataclass(frozen=True)
class PredictConfig:
    """The settings of a prediction."""

    # fmt: off
    weights: str = TRAINED_WEIGHTS()
    model: str = OWN_MODEL()
    images: tuple[str, ...] = option((), WEIGHTS,
        "image files, directories, or - for paths on standard input", positional=True, nargs="*")
    top_k: int = option(3, REPORT, "number of classes to output per image", low=1)
    min_confidence: float = option(0.0, REPORT,
        "mark an image as undecided if the confidence of its first class is lower; the coverage "
        "table in report.html shows what a threshold costs", low=0.0, high=1.0)
    json: str = option("", REPORT,
        "write one JSON object per line to this file; - is standard output", metavar="FILE")
    csv: str = option("", REPORT,
        "write CSV to this file; - is standard output", metavar="FILE")
    explain: str = option("", REPORT,
        "write each image, with the regions that raised the score of its class in color (Grad-CAM),"
        " to a PNG file in this directory, new or empty; needs pip install -e '.[explain]'",
        metavar="DIR")
    tta: str = TTA()
    batch_size: int = option(100, MACHINE, "images per forward pass", low=1)
    device: str = option("auto", MACHINE,
        "device; auto: an accelerator if one is available", choices=("auto", "cpu"))
    workers: int = WORKERS()
    threads: int = THREADS()
    quiet: bool = QUIET(group=REPORT)
    debug: bool = DEBUG(group=REPORT)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.images:
            raise UserError(
                "there are no images to classify",
                "Give image files, or directories that contain some",
            )
        if self.json and self.csv and os.path.realpath(self.json) == os.path.realpath(self.csv):
            raise UserError(f"--json and --csv both write {self.json}", "Give different files")


def main(argv: list[str] | None = None) -> int:
    """Classify images with the arguments `argv`. Return the exit code. Raises `UserError`."""
    config = PredictConfig(
        **parse_arguments(PredictConfig, argv, prog="predict.py", description=__doc__)
    )

    # Importing PyTorch takes seconds: --help and command-line mistakes are answered before.
    from accelerate.utils import broadcast_object_list

    from lab import inference
    from lab.checkpoint import weights
    from lab.data.workers import choose_num_workers
    from lab.distributed import build_accelerator, check_same_data, raise_on_all_ranks
    from lab.engine.training import to_device
    from lab.report.explain import OverlayWriter

    # Weights
    files = {file: flag for flag, file in (("--json", config.json), ("--csv", config.csv)) if file}
    for file, flag in files.items():
        inference.check_output(flag, file)
    path = weights.find_weights(config.weights)
    metadata = weights.read_metadata(path, config.model)

    # Distributed setup
    accelerator = build_accelerator(
        training=False,
        trained_precision=metadata["precision"],
        threads=config.threads,
        quiet=config.quiet,
        cpu=config.device == "cpu",
    )

    # Model and images
    with raise_on_all_ranks(accelerator):
        model = weights.load_model(path, metadata)
        listed = inference.find_images(config.images) if accelerator.is_main_process else None
    check_same_data(accelerator, {"weights": metadata.get("sha256", "")})
    paths, unreadable = broadcast_object_list([listed])[0]
    model = to_device(model, metadata["model"]["name"], accelerator.device)
    write_overlays = None
    if config.explain:
        with raise_on_all_ranks(accelerator):
            write_overlays = OverlayWriter(config.explain, paths, model, metadata)

    # Prediction
    with console.progress("images", -(-len(paths) // accelerator.num_processes)) as progress:
        predictions = inference.predict_files(
            accelerator,
            model,
            metadata,
            paths,
            batch_size=config.batch_size,
            num_workers=choose_num_workers(config.workers),
            top_k=config.top_k,
            tta=config.tta,
            on_batch=progress.update,
            on_images=write_overlays,
        )

    # Output
    predictions += unreadable
    errors = [p.error for p in predictions if p.error]
    for error in errors:
        console.warn(error)
    with raise_on_all_ranks(accelerator):  # the launcher ends all processes after one with code 1
        if config.json and accelerator.is_main_process:
            lines = inference.json_lines(predictions, config.min_confidence)
            inference.write_output(config.json, lines)
        if config.csv and accelerator.is_main_process:
            rows = inference.csv_rows(predictions, config.top_k, config.min_confidence)
            inference.write_output(config.csv, rows)
    if accelerator.is_main_process:
        if "-" not in files:  # standard output has nothing but the predictions
            for file in (*files, *filter(None, [config.explain])):
                console.info(f"wrote {file}")
        undecided = [p for p in predictions if p.is_undecided(config.min_confidence)]
        if not (config.json or config.csv or config.quiet):
            console.predictions_table(
                [(p.path, p.classes) for p in predictions if p.classes],
                {p.path for p in undecided},
            )
        if config.min_confidence and "-" not in files:
            console.info(
                f"undecided: {len(undecided):,} of {len(predictions) - len(errors):,} images, with "
                f"a confidence below {config.min_confidence:g}"
            )
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
