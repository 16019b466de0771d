"""The model card: valid metadata, the exact metrics of the run, and escaped names."""

import json
import re
from html import unescape

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lab.checkpoint.run_dir import RunDir
from lab.errors import UserError
from lab.report import model_card

HOSTILE = (
    "a|b", "<script>x</script>", "[x](http://x.yz)", "---\nlicense: mit\n---", "*`_~", "\u202ex",
    "\udc80", "# h", "é 猫", "$x$",
)  # fmt: skip


def update_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def read_json(path):
    return json.loads(path.read_text())


def test_the_card_has_valid_metadata_and_the_exact_metrics(finished):
    content, report = (finished / "README.md").read_text(), read_json(finished / "report.json")
    assert content == model_card.card(finished)  # depends on the files of the run only
    card = ModelCard(content)
    results = {(r.metric_type, r.metric_name): r for r in card.data.eval_results}
    assert results["accuracy", None].metric_value == report["accuracy"]
    assert results["f1", "macro-F1"].metric_value == report["macro_f1"]
    assert {(r.dataset_name, r.dataset_split) for r in results.values()} == {("digits", "test")}
    data = card.data.to_dict()
    assert data["pipeline_tag"] == "image-classification"
    assert {"lenet5", "pytorch"} <= set(data["tags"])
    assert "license" not in data
    assert "datasets" not in data  # the bundled digits are not on the Hub
    for row in report["per_class"]:
        numbers = [f"{row[key]:.4f}" for key in ("precision", "recall", "f1")]
        assert " | ".join(["", row["class"], *numbers, f"{row['support']} |"]).strip() in content
    num_correct = sum(row[k] for k, row in enumerate(report["confusion_matrix"]))
    assert f"{num_correct} of the 100 samples of a subset of the test split correctly" in content
    assert "on the validation split. The test split was used once" in content
    assert "optimistic" not in content
    assert "](plots/confusion_matrix.png)" in content
    assert str(finished.parent) not in content


def test_p6_the_card_says_on_which_split_the_epoch_was_selected(copied):
    update_json(copied / "report.json", selection_split="test")
    update_json(copied / "config.json", recipe="notebook")
    text = model_card.card(copied)
    assert "on this same test split (the protocol of the recipe notebook)" in text
    assert "so these results are optimistic.**" in text
    assert "used once" not in text


def test_names_cannot_inject_yaml_or_markdown(copied):
    report = read_json(copied / "report.json")
    for row, name in zip(report["per_class"], HOSTILE, strict=True):
        row["class"] = name
    update_json(copied / "report.json", per_class=report["per_class"], class_names=list(HOSTILE))
    path = copied.rename(copied.with_name("---\nlicense: 'x'\n---\n# [r](s)"))
    model_card.write(RunDir(path))
    text = (path / "README.md").read_text(encoding="utf-8")
    model_card_data = ModelCard(text).data
    assert model_card_data.model_name == path.name
    assert model_card_data.license is None
    html = MarkdownIt("commonmark").enable("table").render(ModelCard(text).text)
    assert "<a " not in html
    assert "<script" not in html
    assert "\u202e" not in html
    assert html.count("<h1>") == 1
    assert "<h1>--- license: 'x' --- # [r](s)</h1>" in html
    cells = re.findall(r"<tr>\s*<td>(.*)</td>(?:\s*<td .*>[0-9.]+</td>){4}\s*</tr>", html)
    shown = [unescape(cell) for cell in cells]
    assert shown == [*HOSTILE[:3], "--- license: mit ---", HOSTILE[4], "?x", "?", *HOSTILE[7:]]


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, ""),
        ({"dataset": "/home/me/cats"}, " --dataset IMAGES"),
        (
            {"dataset": "hf:/home/me/cats", "label_column": "fine label"},
            " --dataset IMAGES --label-column 'fine label'",
        ),
        ({"init_checkpoint": "/home/me/vit"}, " --init-checkpoint WEIGHTS"),
        ({"model": "/home/me/net.py:net"}, " --model FILE.py:FUNCTION"),
    ],
)
def test_the_command_of_a_card_contains_no_paths(copied, settings, options):
    update_json(copied / "config.json", **settings)
    assert f"\npython train.py --config config.json{options}\n" in model_card.card(copied)


def test_the_card_of_a_model_that_is_code_says_how_to_use_it(copied):
    update_json(copied / "config.json", model="/home/me/net.py:net")
    text = model_card.card(copied)
    assert "python evaluate.py best.safetensors --model FILE.py:FUNCTION" in text
    assert 'load_model("best.safetensors", model=MODEL)' in text
    assert "/home/me" not in text
    update_json(copied / "config.json", model="python.py:net")  # passed to train.main
    assert "\npython " not in model_card.card(copied)


@pytest.mark.parametrize(
    ("model", "library"), [("torchvision:resnet18", "torchvision"), ("timm:resnet18", "timm")]
)
def test_the_card_names_the_library_of_pretrained_weights(copied, model, library):
    update_json(copied / "config.json", model=model, pretrained=True)
    assert f"from pretrained weights of {library}, except" in model_card.card(copied)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("best.safetensors", None, "has no best.safetensors"),
        ("report.json", None, "is not finished"),
        ("report.json", "[1]", "is damaged: report.json"),
        ("history.jsonl", "x\n", "is damaged: history.jsonl"),
    ],
)
def test_p7_an_unfinished_or_damaged_run_gets_no_card(copied, name, content, message):
    (copied / name).unlink()
    if content is not None:
        (copied / name).write_text(content)
    (copied / "README.md").write_text("before")
    with pytest.raises(UserError, match=message):
        model_card.write(RunDir(copied))
    assert (copied / "README.md").read_text() == "before"
