"""Check a directory of images, or a manifest, before training: files, classes, exact duplicates.

  python check_data.py IMAGES                      writes check_data.html, too
  python check_data.py IMAGES --image-size 64      if you train at 64 pixels

Problems make a result wrong or stop a training; all of them are printed: files that cannot be read,
also truncated ones, and images with exactly the same pixels in several splits or classes, or in
files that a held-out split may separate. Warnings are about other duplicates, small or animated
images, and small or unbalanced classes. The page also shows samples of each class. The exit code is
1 if there are problems, 0 if there are only warnings. A second check of unchanged files is fast.
"""

import sys
from pathlib import Path

from lab import console
from lab.checkpoint.atomic_io import check_output_file
from lab.config.cli import parse_arguments
from lab.config.schema import CheckConfig, TrainConfig
from lab.errors import run_script
from lab.report import html


def main(argv: list[str] | None = None) -> int:
    """Check images as the command line `argv` says. Return the exit code. Raises `UserError`."""
    config = CheckConfig(
        **parse_arguments(CheckConfig, argv, prog="check_data.py", description=__doc__)
    )
    output = Path(config.output)
    check_output_file("--output", output)

    # Importing PyTorch takes seconds: --help and command-line mistakes are answered before.
    import torch

    from lab.data import TITLES, DataConfig
    from lab.data.checks import check
    from lab.data.splits import read_dataset

    settings = TrainConfig(
        dataset=config.dataset, image_column=config.image_column, label_column=config.label_column
    )
    with console.status(f"checking {config.dataset}"):
        raw = read_dataset(DataConfig.of(settings))
        found = check(raw, config.image_size, config.threads or torch.get_num_threads())
    console.class_counts(found.class_names, {TITLES[k]: v for k, v in found.counts.items()})
    console.settings("images", found.facts)
    for warning in found.warnings[len(raw.warnings) :]:  # `read_dataset` printed those
        console.warn(warning)
    for problem in found.problems:
        console.print_line(f"problem: {problem}", "red")
    html.write_check(output, config.dataset, found)
    console.print_line(f"problems: {len(found.problems)}, warnings: {len(found.warnings)}")
    console.print_line(f"written: {output}")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
