"""Measure the settings that lab selects: precision, memory format, threads, torch.compile, memory.

  python benchmarks/choices.py               both models, about four minutes on 2 CPU cores
  python benchmarks/choices.py --compile     with torch.compile too, which needs a C++ compiler
  python benchmarks/choices.py --parts muon  one part of it

Times whole training steps on a prepared batch of 128 images. All variants of a model are built once
and timed in turn in one process, those in bfloat16 only if the device has native bfloat16. `auto`
marks what `--mixed-precision auto` and `to_device` select; --compile compiles that variant. Then
`auto` is timed in its own process, with and without keeping freed memory. The last part times
Muon's iterations on the kernels of AlexNet in both precisions.
"""

import argparse
import itertools
import json
import time
from functools import partial

from common import child, in_turn, ratios, spread, write_json

BATCH_SIZE = 128
STEPS = {"lenet5": 100, "alexnet": 8}
CHANNELS = {"lenet5": 1, "alexnet": 3}


def step_timer(
    model: str,
    precision: str,
    channels_last: bool,
    threads: int,
    compiled: bool,
):
    """Return a function that runs some training steps and returns images per second."""
    import torch
    import torch.nn.functional as F

    from lab.config.recipes import resolve
    from lab.engine.optimizer import build_optimizer
    from lab.models import build_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    built_model = build_model(model, num_classes=10, in_chans=CHANNELS[model], image_size=32)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    built_model = built_model.to(device, memory_format=layout)
    if compiled:
        built_model.compile()
    optimizer = build_optimizer(built_model, resolve({"model": model, "recipe": "notebook"}))
    images = torch.randn(BATCH_SIZE, CHANNELS[model], 32, 32, device=device)
    labels = torch.randint(10, (BATCH_SIZE,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = built_model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def run() -> dict:
        torch.set_num_threads(threads)
        for _ in range(3):  # the first steps ask the system for their memory
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS[model]):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"images_per_second": STEPS[model] * BATCH_SIZE / (time.perf_counter() - start)}

    start = time.perf_counter()
    run()  # selects kernels and compiles code
    first_run = time.perf_counter() - start
    return lambda: {**run(), "first_run_seconds": first_run}


def muon_timer(bfloat16: bool, threads: int):
    """Return a function that orthogonalizes AlexNet's Muon updates and returns updates/s."""
    import torch

    from lab.engine import muon
    from lab.models import build_model

    model = build_model("alexnet", num_classes=10, in_chans=3, image_size=32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrices = [w.detach().flatten(1).to(device) for w in muon.muon_parameters(model)]

    def run() -> dict:
        torch.set_num_threads(threads)
        muon.has_native_bf16 = lambda device_type: bfloat16
        start = time.perf_counter()
        for matrix in matrices:
            muon.zeropower_via_newtonschulz(matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"updates_per_second": 1 / (time.perf_counter() - start)}

    run()
    return run


def run_one(model: str, variant: str) -> dict:
    """Return the images per second of lab's settings, changed by `variant`, in this process."""
    from lab.distributed import choose_precision, keep_freed_memory, num_cores
    from lab.models import MODELS

    if variant != "freed memory given back":
        keep_freed_memory()
    large = MODELS[model].benefits_from_bf16
    precision = choose_precision("auto", "cpu", large)
    run = step_timer(model, precision, True, num_cores(), False)
    run()
    return run()


def table(results: dict[str, list], selected: str, field: str = "images_per_second") -> str:
    """Return the speeds as Markdown, and their ratios to the `selected` contender's."""
    lines = [f"\n| | {field.replace('_per_second', '/s')} | / auto |", "| --- | --- | --- |"]
    for name, rows in results.items():
        against = spread(ratios(results, name, selected, field))
        speed = spread([row[field] for row in rows], ",.2f" if field.startswith("up") else ",.0f")
        lines.append(f"| {name} | {speed} | {against} |")
    return "\n".join(lines)


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parts = [*STEPS, "muon"]
    parser.add_argument("--parts", type=lambda words: words.split(","), default=parts)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(*args.one)))
        return

    import torch

    from lab.distributed import choose_precision, has_native_bf16, keep_freed_memory, num_cores
    from lab.models import MODELS

    keep_freed_memory()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    threads = sorted({1, num_cores()}) if device_type == "cpu" else [1]
    output = {}
    for model in [name for name in STEPS if name in args.parts]:
        large = MODELS[model].benefits_from_bf16
        channels_last = large or device_type == "cpu"
        auto = (choose_precision("auto", device_type, large), channels_last, threads[-1], False)
        precisions = ("no", "bf16") if has_native_bf16(device_type) else ("no",)
        variants = [*itertools.product(precisions, (False, True), threads, (False,))]
        variants += [(*auto[:3], True)] * args.compile
        contenders = {}
        for variant in variants:
            precision, channels_last, count, compiled = variant
            words = ["float32" if precision == "no" else "bfloat16"]
            words += ["channels_last"] * channels_last + [f"{count} threads"]
            words += ["compiled"] * compiled + ["(auto)"] * (variant == auto)
            contenders[", ".join(words)] = step_timer(model, *variant)
        print(model)
        results = in_turn(contenders, args.rounds, show="images_per_second")
        selected = next(name for name in results if name.endswith("(auto)"))
        print(table(results, selected))
        output[model] = results
        if device_type == "cpu":
            others = ["auto", "freed memory given back"]
            contenders = {name: partial(child, __file__, "--one", model, name) for name in others}
            results = in_turn(contenders, args.rounds, show="images_per_second")
            print(table(results, "auto"))
            output[f"{model}, in processes of their own"] = results
    if "muon" in args.parts:
        native = has_native_bf16(device_type)
        names = {bf16: "bfloat16" if bf16 else "float32" for bf16 in (False, True)}
        names[native] += " (auto)"
        timers = {name: muon_timer(bf16, threads[-1]) for bf16, name in names.items()}
        results = in_turn(timers, args.rounds, show="updates_per_second")
        print(table(results, names[native], "updates_per_second"))
        output["muon"] = results
    write_json(args.json, {"results": output})


if __name__ == "__main__":
    main()
