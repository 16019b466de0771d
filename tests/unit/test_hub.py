"""Uploads by the client of huggingface_hub to a local server that imitates the Hub."""

import base64
import json
import shlex
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants
from resuming import LENET, resume, start

import train
from lab.checkpoint.run_dir import RunDir
from lab.config.recipes import resolve
from lab.report import hub


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP API that an upload uses."""

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
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Return a local Hub, with a valid token in the environment.

    It records `created` repositories, `checked` cards and uploaded `files`.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.created, server.checked, server.files = [], [], {}
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
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
