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
from dataclasses import replace
from functools import partial

from lab import console, tables
from lab.commandline import parse_arguments
from lab.config import EvalConfig
from lab.errors import name_some, run_script


def main(argv: list[str] | None = None) -> None:
    """Evaluates as the command line `argv` says; raises `UserError`."""
    config = EvalConfig(**parse_arguments(EvalConfig, argv, prog="evaluate.py", about=__doc__))

    # PyTorch takes seconds to import: --help and a mistyped option are answered before.
    import torch

    from lab import checkpoint, rundir
    from lab.data import (
        DataConfig,
        list_samples,
        load_fingerprints,
        load_split,
        require_data_dir_is_read,
    )
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
    limits = {name: about["data"][name] for name in ("limit_train", "limit_eval")}
    as_trained = replace(data, **limits)  # the data given, with the number of samples in training
    require_data_dir_is_read(data.dataset, config.data_dir)
    with together(accelerator):
        network = checkpoint.load_model(path, about)
        with console.working(f"reading {data.dataset}"):
            # The metadata may be a stranger's: only a folder that the user names is written to.
            download = config.data_dir is not None
            split, fingerprint = load_split(
                data, config.split, place["memory"], torch.get_num_threads(), download
            )
            current = {config.split: fingerprint}
            if config.split == "all" or data != as_trained:
                current = load_fingerprints(as_trained, download, torch.get_num_threads())
            if config.split != "all":
                current = {config.split: current[config.split]}
            changed = bool(changed_splits(about["fingerprints"], current))
    check_same_data(
        accelerator, {config.split: fingerprint}, partial(list_samples, data, config.split)
    )
    with together(accelerator):
        split = checkpoint.align_classes(path, about, split)
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
    if changed:
        console.warn(
            f"{'the data' if config.split == 'all' else f'the {config.split} split'} has changed "
            "since the training (files added, removed, renamed or replaced), or is other data: it "
            "may hold samples that were trained on"
        )
    if missing := split.missing_classes():
        console.warn(
            f"the data has no samples of {len(missing)} of the {len(split.class_names)} classes "
            f"({name_some(missing)}): macro-F1 leaves out those that are not predicted either"
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
            note=caveat(config.split, None if changed else about["selected_on"]),
        )
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_script(main))
