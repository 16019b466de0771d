"""README and docs/: commands run or are parsed; files, links, options and examples are correct."""

import doctest
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from mistakes import make_picture
from pages import PAGES, ROOT, blocks, commands, headings, inline, links, words_of
from safetensors.torch import save_file

import evaluate
import train
from lab import data, models
from lab.config import recipes, schema
from lab.config.cli import parse_arguments
from lab.config.schema import TrainConfig, is_own_dataset

SCRIPTS = {path.name: path.stem for path in sorted(ROOT.glob("*.py"))}
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
# Commands that are parsed but not run, and why.
NOT_RUN = {
    "accelerate": "many processes, GPUs or machines; test_launch.py and test_hosts.py start some",
    "torchrun": "the same",
    "--pretrained": "downloads weights; test_finetune.py has a stand-in for them",
    "efficientnet_lite0.safetensors": "is made of that package by benchmarks/pretrained.py",
    "--freeze": "needs pretrained weights, too",
    "tiny.py:tiny": "is code of the reader's; test_own_model.py has some",
    "timm:convnext_tiny": "downloads weights; test_timm.py has a stand-in for them",
    "timm:vit_small_patch16_224.augreg_in21k": "downloads weights, too",
    "--push-to-hub": "needs a login; test_hub.py has a stand-in for the server",
    "hf:NAME": "stands for any dataset; test_hf_data.py reads some",
    "my_data.py:birds": "is a file of the reader; test_the_code_to_add_your_own_works runs it",
    "--print-config": "exits; test_config.py runs it",
}
# Options that make the commands fast.
ALONE = ["--threads", "1", "--workers", "0", "--quiet"]
SHORT = [
    *("--recipe", "smoke", "--max-steps", "2"),
    *("--max-train-samples", "40", "--max-eval-samples", "20"),
]
SMALL = [
    *("--model", "lenet5", "--image-size", "32"),
    *("--batch-size", "8", "--grad-accum-steps", "1"),
]
CHEAP = {
    "train.py": [*SHORT, *SMALL, *ALONE, "--epochs", "6"],
    "evaluate.py": ALONE,
    "predict.py": ALONE,
    "compare.py": [],
    "check_data.py": ["--threads", "1"],
}


class Parsed(Exception):
    """Carry the parsed arguments of a script, and end it."""


def parse(script: str, words: list[str], monkeypatch) -> object:
    """Return the settings that a script resolves from its arguments. Raises `UserError`."""

    def stop(config, argv, **settings):
        values = parse_arguments(config, argv, **settings)
        values.pop("print_config", None)
        raise Parsed(config, values)

    module = importlib.import_module(SCRIPTS[script])
    with monkeypatch.context() as patch:
        patch.setattr(module, "parse_arguments", stop)
        with pytest.raises(Parsed) as caught:
            module.main(words)
    config, values = caught.value.args
    if script == "cross_validate.py":
        values = {"folds": 5, "fold": 1} | values
    return recipes.resolve(values) if config is TrainConfig else config(**values)


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, finished):
    """Return a function that creates a finished run in runs/NAME.

    The working directory contains the images, weights and settings that the commands name.
    """
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for name in ("IMAGES", "NEW_IMAGES", "FOLDER"):
            for i in range(20):
                make_picture(Path(name) / ("cat", "dog")[i % 2] / f"{i}.jpg")
        make_picture(Path("IMAGE.jpg"))
        Path("sweeps/lenet5").mkdir(parents=True)
        for name in ("settings.yaml", "sweeps/lenet5/trial-7.yaml"):
            Path(name).write_text("model: lenet5\n")
        words = ["--dataset", "IMAGES", *CHEAP["train.py"]]
        assert train.main([*words, "--name", "mine"]).exit_code == 0
        shutil.copy("runs/mine/best.safetensors", "best.safetensors")

        def make(name: str) -> None:
            if not Path("runs", name).exists():
                shutil.copytree(finished, Path("runs", name))

        yield make


def run(script: str, words: list[str], config) -> None:
    """Run a script with additional options that make it fast."""
    extra = list(CHEAP[script])
    if script == "train.py" and config.resume:
        extra = ["--max-steps", "13", *ALONE]
    elif script == "train.py":
        extra += ["--name", config.name or f"{config.model}-{config.dataset_title}", "--overwrite"]
        extra += [] if is_own_dataset(config.dataset) else ["--dataset", "digits"]
    paths = {word: sorted(map(str, Path().glob(word))) for word in words if "*" in word}
    words = [path for word in words for path in paths.get(word, [word])]
    result = importlib.import_module(SCRIPTS[script]).main([*words, *extra])
    assert getattr(result, "exit_code", result) in (None, 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_or_is_parsed(command, make_run, monkeypatch):
    pipe = io.TextIOWrapper(io.BytesIO(b"IMAGE.jpg\n"))
    monkeypatch.setattr(sys, "stdin", pipe)
    program, *words = words_of(command)
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        parser, words = launch_command_parser(), words[1:]
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parser = get_args_parser()
    if program in ("accelerate", "torchrun"):
        # The launch table's rows end where the script's name follows.
        script_named = any(word in SCRIPTS for word in words)
        launched = parser.parse_args(words if script_named else [*words, "train.py"])
        if program == "accelerate" and launched.config_file:
            assert (ROOT / launched.config_file).is_file()
        words = [launched.training_script, *launched.training_script_args]
    elif program != "python":
        return check_other_program(program, words)
    script, *words = words
    if script == "-m":
        assert importlib.util.find_spec(words[0])
    elif script not in SCRIPTS:  # of benchmarks/ and docs/: takes minutes, or writes pages
        assert (ROOT / script).is_file()
    else:
        for word in words:
            if word.startswith("runs/"):
                make_run(Path(word.replace("*", "0")).parts[1])
        config = parse(script, words, monkeypatch)
        if script in CHEAP and not NOT_RUN.keys() & {program, *words}:
            if script == "train.py" and config.resume == "auto":
                make_run(config.name)
            run(script, words, config)


def check_other_program(program: str, words: list[str]) -> None:
    """Check a command that does not start Python."""
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets)
    elif program == "pip":  # downloads
        assert words[0] == "install"
    elif program in ("sbatch", "sky", "kubectl"):  # test_slurm.py, test_launch_files.py
        assert (ROOT / words[-1]).is_file()
    elif program == "docker":
        assert (ROOT / "Dockerfile").is_file()
    else:
        assert program == "export"
        assert re.fullmatch(r"[A-Z_]+=\w+", words[0])


def test_every_option_exists():
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    text = (ROOT / "docs" / "commands.md").read_text()
    known = set(re.findall(r"--[\w-]+", text))
    for parser in (launch_command_parser(), get_args_parser()):
        known |= set(parser._option_string_actions)
    known |= {"--signal", "--requeue", "--gpus-per-task"}  # Slurm's
    known |= {"--shm-size"}  # Docker's
    for page in PAGES:
        named = {word for code in inline(page) for word in re.findall(r"(?<!\S)--[\w-]+", code)}
        assert named <= known, page.name


@pytest.mark.parametrize("code", [c for c in inline(ROOT / "docs/training.md") if c[:2] == "--"])
def test_options_of_the_training_page_are_valid(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("settings.yaml", "FILE"):
        Path(name).write_text("batch_size: 64\n")
    settings = parse_arguments(TrainConfig, with_value(code), prog="train.py", description="")
    settings.pop("print_config", None)
    if settings.keys() & {"pretrained", "freeze", "linear_probe"}:
        settings |= {"pretrained": True, "model": "efficientnet_b0"}
    recipes.resolve(settings)


def with_value(code: str) -> list[str]:
    """Return the words of options; a single one that needs a value gets its default."""
    words = code.split()
    defaults = {f.name: f.default for f in TrainConfig.__dataclass_fields__.values()}
    defaults |= {"config": "settings.yaml", "print_config": False}
    default = defaults[words[0][2:].replace("-", "_").removeprefix("no_")]
    needs_value = len(words) == 1 and not isinstance(default, bool)
    return [*words, str(default)] if needs_value else words


@pytest.mark.parametrize("page", [*PAGES, ROOT / "results/README.md"], ids=lambda p: p.name)
def test_links_and_files_exist(page):
    for path, heading in links(page):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not heading or heading in headings(target), f"{path}#{heading}"
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for code in inline(page):
        if re.fullmatch(r"test_\w+", code):
            assert f"def {code}(" in tests, code
        elif re.fullmatch(FILE, code) and code not in OF_THE_READER | WRITTEN:
            folders = ("lab", "tests", "benchmarks", "accelerate_configs")
            exists = any(list((ROOT / folder).rglob(code)) for folder in folders)
            assert exists or list(ROOT.glob(code)), code


FILE = r"[\w/.*-]+\.(py|md|yaml|sbatch|json|txt|svg)|(lab|docs)/[\w/.*-]+"
OF_THE_READER = {"tiny.py", "my_data.py", "lab/models/tiny.py", "lab/data/tensors.py"}
WRITTEN = {"config.json", "report.json", "state.json", "history.jsonl", "log.txt",
           "lab.json", "comparison.md", "trial-N.yaml"}  # fmt: skip


def test_the_tree_of_the_readme_is_complete():
    [tree] = [body for body in blocks(ROOT / "README.md", "") if body.startswith("train.py ")]
    paths = set(re.findall(r"^(\S+)", tree, re.MULTILINE))
    assert all((ROOT / path).exists() for path in paths)
    modules = {f"lab/{p.name}" for p in (ROOT / "lab").glob("*.py") if p.name != "__init__.py"}
    packages = {f"lab/{p.parent.name}/" for p in (ROOT / "lab").glob("*/__init__.py")}
    assert paths >= SCRIPTS.keys() | modules | packages


def test_commands_md_is_what_help_prints():
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make_commands.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    page = make.PAGE.read_text()
    assert page == make.page(), "run: python docs/make_commands.py"
    for name in SCRIPTS:
        assert f"\n## {name}\n" in page


def test_the_code_to_add_your_own_works(tmp_path, monkeypatch):
    model, model_line, own, reader, reader_line, recipe = blocks(
        ROOT / "docs/extending.md", "python"
    )
    for name, code in {"lab.models.tiny": model, "lab.data.tensors": reader}.items():
        module = types.ModuleType(name)
        exec(code, vars(module))
        monkeypatch.setitem(sys.modules, name, module)
    for registry, line, place in (
        (models.MODELS, model_line, models),
        (data.DATASETS, reader_line, data),
        (recipes.RECIPES, recipe, recipes),
    ):
        [(name, entry)] = eval("{" + line + "}", vars(place)).items()
        monkeypatch.setitem(registry, name, entry)
    monkeypatch.setattr(schema, "NAMED_DATASETS", (*schema.NAMED_DATASETS, "tensors"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    words = "--model tiny --dataset tensors --data-dir . --recipe long --max-steps 2 --batch-size 8"
    with pytest.raises(ValueError, match=r"^there is no file tensors\.safetensors\. Give"):
        train.main([*words.split(), *ALONE])
    save_file({"images": images, "labels": torch.arange(40) % 2}, "tensors.safetensors")
    assert train.main([*words.split(), *ALONE]).exit_code == 0
    config = json.loads(Path("runs/tiny-tensors/config.json").read_text())
    assert (config["epochs"], config["ema_decay"], config["image_size"]) == (40, 0.999, 32)
    evaluate.main(["runs/tiny-tensors", *ALONE])
    report = json.loads(Path("runs/tiny-tensors/evaluate-test/report.json").read_text())
    assert (report["class_names"], report["num_samples"]) == (["cat", "dog"], 8)
    project = types.ModuleType("my_project")
    project.Birds = lambda _: [(image, i % 2) for i, image in enumerate(images)]
    monkeypatch.setitem(sys.modules, "my_project", project)
    Path("my_data.py").write_text(own)
    assert train.main([*words.split()[:2], "--dataset", "my_data.py:birds", *ALONE]).exit_code == 0
    assert Path("runs/tiny-my_data-birds/report.json").exists()


METRICS = ROOT / "docs" / "metrics.md"


def test_the_python_code_of_metrics_md_prints_its_output():
    text = "\n".join(blocks(METRICS, "python"))
    example = doctest.DocTestParser().get_doctest(text, {}, METRICS.name, str(METRICS), 0)
    assert len(example.examples) > 8
    assert doctest.DocTestRunner().run(example).failed == 0


# PyTorch threads do not survive a fork: forked processes must not wait for them.
COMPUTES = """
import torch
torch.set_num_threads(2)
torch.randn(600, 600) @ torch.randn(600, 600)
"""


@pytest.mark.slow
def test_the_notebook_runs_after_a_cell_that_computed(tmp_path, monkeypatch):
    nbformat, nbclient = map(pytest.importorskip, ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # more than one on a machine of one core too
    book = nbformat.read(ROOT / "docs" / "notebook.ipynb", 4)
    assert not any(cell.get("outputs") for cell in book.cells)
    book.cells.insert(0, nbformat.v4.new_code_cell(COMPUTES))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=100, resources=resources).execute()  # raises as cells do
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    sizes = [json.loads((run / "config.json").read_text())["world_size"] for run in (one, two)]
    assert sizes == [1, 2]
    losses = [
        [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    printed = "".join(
        output.get("text", "") for cell in book.cells for output in cell.get("outputs", ())
    )
    assert "2 x cpu" in printed  # printed by a forked process
    assert "unknown option --epoch. Did you mean --epochs?" in printed
    assert os.fspath(one.relative_to(tmp_path)) in printed
