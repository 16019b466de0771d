"""Evaluates saved weights on a split: exact numbers, per-class table, confusion matrix.

  python evaluate.py runs/lenet5-mnist                   the test split of what it was trained on
  python evaluate.py best.safetensors --split val        another split, from the file alone
  python evaluate.py best.safetensors --dataset folder --data-dir PICTURES --split all
  python evaluate.py runs/alexnet-cifar10 --tta flip     ... and with mirror images, reported apart
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml evaluate.py runs/lenet5-mnist

Writes report.json and predictions.csv. The numbers do not depend on the number of processes.
"""

import sys
from contextlib import closing
from functools import partial

from lab import console, tables
from lab.commandline import parse_arguments
from lab.config import EvalConfig
from lab.errors import run_script


def main(argv: list[str] | None = None) -> None:
    """Evaluates as the command line `argv` says; raises `UserError`."""
    config = EvalConfig(**parse_arguments(EvalConfig, argv, prog="evaluate.py", about=__doc__))

    # PyTorch takes seconds to import: --help and a mistyped option are answered before.
    import torch

    from lab import checkpoint, rundir
    from lab.data import DataConfig, list_samples, load_split, require_data_dir_is_read
    from lab.data.augment import Preprocess
    from lab.data.fingerprint import changed_splits
    from lab.data.loaders import build_loader
    from lab.distributed import (
        build_accelerator,
        check_same_data,
        loader_place,
        place_line,
        together,
    )
    from lab.engine import lay_out
    from lab.evaluation import eval_batch_size, predict_all
    from lab.metrics import caveat
    from lab.models import build_model

    path = checkpoint.find_weights(config.weights)
    about = checkpoint.read_info(path)
    model = about["model"]["name"]
    accelerator = build_accelerator(
        training=False,
        mixed_precision=config.mixed_precision,
        trained_in=about["precision"],
        threads=config.threads,
        timeout_seconds=config.timeout_seconds,
        quiet=config.quiet,
    )
    place = loader_place(accelerator, config.loader, config.workers)
    data = DataConfig(**about["data"] | config.data_overrides())
    require_data_dir_is_read(data.dataset, config.data_dir)
    with together(accelerator):
        network = build_model(**about["model"])
        checkpoint.load_weights(path, network)
        with console.working(f"reading {data.dataset}"):
            split, fingerprint = load_split(
                data, config.split, place["memory"], torch.get_num_threads()
            )
    check_same_data(
        accelerator, {config.split: fingerprint}, partial(list_samples, data, config.split)
    )
    with together(accelerator):
        checkpoint.require_same_classes(path, about, split)
        plain = Preprocess(about["mean"], about["std"], (), accelerator.device)
        size = config.batch_size or eval_batch_size(
            accelerator.device, about["model"]["image_size"]
        )
        loader = build_loader(split, plain, batch_size=size, seed=None, **place)
        writes = accelerator.is_main_process
        outputs = {  # the plain result comes first, whatever else is asked for
            tta: rundir.evaluation_dir(path, config.part(about["data"]), config.output, writes, tta)
            for tta in dict.fromkeys(("none", config.tta))
        }
    if config.same_samples and changed_splits(about["fingerprints"], {config.split: fingerprint}):
        console.warn(
            f"the {config.split} split has changed since the training (files added, removed, "
            "renamed or replaced): it may hold samples that were trained on"
        )
    console.settings(
        f"{model} of {path}",
        {
            "data": f"{config.split} of {data.dataset}: {len(split.labels):,} samples",
            "place": place_line(accelerator),
        },
    )
    network = lay_out(network, model, accelerator.device)
    for tta, output in outputs.items():
        with closing(loader):
            predictions = predict_all(accelerator, network, loader, tta)
        report = {
            "split": config.split,
            **predictions.report(),
            "best_epoch": about["best_epoch"],
            "selected_on": about["selected_on"],
        }
        title = f"{model} on {data.dataset}"
        if tta != "none":
            report["tta"] = tta
            title += f", apart: mean over each picture and its mirror image (--tta {tta})"
        with together(accelerator):  # the report last: where it is, all is
            output.write_predictions(predictions.csv(split.files()))
            output.write_report(report)
        if tta == "none":
            tables.class_table(report)
            tables.confusion_matrix(report)
        console.report(
            report,
            title=title,
            files={"weights": str(path), "report": str(output.path)},
            note=caveat(config.split, None if config.other_data else about["selected_on"]),
        )
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_script(main))
