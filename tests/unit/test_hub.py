"""Uploads and downloads by the client of huggingface_hub; a local server imitates the Hub."""

import base64
import hashlib
import json
import shlex
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants
from PIL import Image
from resuming import LENET, resume, start

import evaluate
import export
import lab
import predict
import train
from lab.checkpoint.run_dir import RunDir
from lab.config.recipes import resolve
from lab.report import hub

COMMITS = {"main": "a" * 40, "first": "b" * 40}


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP API that an upload or the download of a file uses."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        repository, _, file = self.path.strip("/").partition("/resolve/")
        revision, _, name = file.partition("/")
        self.server.requested.append(self.path)
        code = None
        if repository != "me/digits":
            code = "RepoNotFound"
        elif revision not in ("main", "first"):
            code = "RevisionNotFound"
        elif name not in self.server.files:
            code = "EntryNotFound"
        if code:
            return self.answer(404, {"error": code}, code)
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMITS[revision])
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            return self.answer(200, {"url": f"{server.url}/me/{server.created[-1]['name']}"})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self.answer(200, {"files": modes})
        if self.path == "/api/validate-yaml":  # the client validates the card before the upload
            server.checked.append(json.loads(body)["content"])
            return self.answer(200, {"warnings": [], "errors": []})
        assert self.path == "/api/models/me/digits/commit/main"
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                server.files[value["path"]] = base64.b64decode(value["content"])
        self.answer(200, {"commitUrl": f"{server.url}/me/digits/commit/0", "commitOid": "0"})

    def answer(self, status, content, code=None):
        text = json.dumps(content).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Return a local Hub, with a valid token in the environment.

    It records `created` repositories, `checked` cards, uploaded `files` and `requested` paths.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.created, server.checked, server.files, server.requested = [], [], {}, []
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


DIGITS = resolve({"push_to_hub": "digits"})
UPLOADED = {"best.safetensors", "config.json", "report.json", "README.md"}
WITHOUT_IMAGES = {f"plots/{name}.png" for name in hub.PLOTS_WITHOUT_IMAGES}


def test_plots_that_show_images_are_not_uploaded(copied, server):
    drawn = {f"plots/{path.name}" for path in (copied / "plots").glob("*.png")}
    assert drawn == WITHOUT_IMAGES | {"plots/mistakes.png", "plots/batch.png"}
    (copied / "plots" / "notes.txt").write_text("mine")
    hub.upload(RunDir(copied), DIGITS)
    # Clients before huggingface_hub 2 send "private".
    [created] = server.created
    assert created.get("visibility") == "private" or created.get("private") is True
    assert created["name"] == "digits"
    assert server.files.keys() == UPLOADED | WITHOUT_IMAGES
    for name, content in server.files.items():
        assert content == (copied / name).read_bytes(), name
    assert server.checked == [(copied / "README.md").read_text()]


def test_training_ends_with_the_upload(tmp_path, server, capsys):
    start(tmp_path, *LENET, "--epochs", "1", "--push-to-hub", "digits")
    assert server.files.keys() == UPLOADED
    assert server.files["report.json"] == (tmp_path / "run" / "report.json").read_bytes()
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: only 4 steps in total")


def test_a_resumed_run_is_uploaded_only_if_push_to_hub_is_given_again(tmp_path, server):
    start(tmp_path, *LENET, "--epochs", "1", "--push-to-hub", "digits")
    server.files.clear()
    resume(tmp_path / "run", "--epochs", "2")  # resuming a run from a stranger must not upload it
    assert not server.files
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["push_to_hub"] == ""
    resume(tmp_path / "run", "--epochs", "3", "--push-to-hub", "digits")
    assert server.files.keys() == UPLOADED


def test_a_failed_upload_is_a_warning_with_the_command_to_repeat_it(
    copied, server, monkeypatch, capfd
):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    hub.upload(RunDir(copied), DIGITS)
    error = capfd.readouterr().err
    assert error.startswith(f"warning: {copied} could not be uploaded (")
    assert error.count("\n") == 1
    assert server.files == {}
    python, script, *arguments = shlex.split(error.split("Try again: ")[1].removesuffix(".\n"))
    assert (python, script) == ("python", "train.py")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    before = (copied / "best.safetensors").read_bytes()
    assert train.main(arguments).exit_code == 0
    assert server.files.keys() == UPLOADED | WITHOUT_IMAGES
    assert server.files["best.safetensors"] == before  # not trained again


def test_only_the_main_process_uploads(copied, server):
    hub.upload(RunDir(copied, is_main_process=False), DIGITS)
    hub.upload(RunDir(copied), resolve({}))
    assert server.created == []


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("digits", "no token", "no login to the Hub for uploading to digits. Run hf auth login, or "
                               "set HF_TOKEN."),
        ("digits", "offline", "HF_HUB_OFFLINE disables the Hub. Unset it to upload to digits."),

    ],
)  # fmt: skip
def test_p7_an_impossible_upload_is_an_error_before_training(
    fails, server, monkeypatch, name, setting, message
):
    if setting == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", setting == "offline")
    arguments = ["--dataset", "digits", "--threads", "1", "--push-to-hub", name]
    assert fails(train, *arguments).startswith(message)
    assert server.created == []


def test_p4_weights_of_the_hub_are_downloaded_once_and_nothing_else_is(copied, server, tmp_path):
    """`hf://me/digits` is what --push-to-hub uploaded, for load_model and every script."""
    hub.upload(RunDir(copied), DIGITS)
    server.requested.clear()
    model, metadata = lab.load_model("hf://me/digits")
    expected, _ = lab.load_model(copied)
    assert metadata["class_names"] == [str(digit) for digit in range(10)]
    for name, tensor in expected.state_dict().items():
        assert tensor.equal(model.state_dict()[name])
    lab.load_model("hf://me/digits@first")
    assert {path.rpartition("/")[2] for path in server.requested} == {"best.safetensors"}
    constants.HF_HUB_OFFLINE = True  # from now on from the cache; the fixture resets it
    evaluate.main(["hf://me/digits", "--output", str(tmp_path / "evaluated"), "--quiet"])
    evaluated, trained = (
        json.loads((path / "report.json").read_text()) for path in (tmp_path / "evaluated", copied)
    )
    assert evaluated["accuracy"] == trained["accuracy"]
    image = tmp_path / "image.png"
    Image.new("L", (32, 32)).save(image)
    csv = tmp_path / "classes.csv"
    assert predict.main(["hf://me/digits", str(image), "--csv", str(csv), "--quiet"]) == 0
    assert csv.read_text().count("\n") == 2


NO_WEIGHTS = "hf://me/digits contains no best.safetensors. Give hf://USER/NAME or"
ON_THE_HUB = "hf://me/digits is on the Hub: results cannot be written beside it."


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (predict, "hf://me/mnist", "the Hub has no repository me/mnist that you may read."),
        (predict, "hf://me/digits@second", "me/digits has no revision second."),
        (predict, "hf://me/digits", NO_WEIGHTS),
        (predict, "hf://me/a/b", "hf://me/a/b is not the name of a repository."),
        (evaluate, "hf://me/digits", ON_THE_HUB),
        (export, "hf://me/digits", ON_THE_HUB),
        (
            evaluate,
            "hf://me/digits --output out --calibrate",
            "--calibrate changes the weights, and hf://me/digits is on the Hub.",
        ),
    ],
)
def test_p7_weights_that_the_hub_does_not_have(fails, server, script, words, message):
    images = ["image.png"] if script is predict else []
    assert fails(script, *words.split(), *images).startswith(message)


def test_p7_offline_weights_that_are_not_in_the_cache(fails, server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = "hf://me/digits is not in the cache of the Hub, and the Hub cannot be reached."
    assert fails(predict, "hf://me/digits", "image.png").startswith(message)
