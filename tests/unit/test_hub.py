"""Uploads: through huggingface_hub's own client, to a server of this machine that stands in."""

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
from lab.errors import run_script
from lab.report import hub


class Handler(BaseHTTPRequestHandler):
    """What of the Hub's interface an upload meets."""

    def do_GET(self):
        server = self.server
        if self.headers["Authorization"] != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "type": "user", "orgs": []})
        assert self.path == "/api/models/me/digits"
        if server.private is None:
            return self.answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        self.answer(200, {"id": "me/digits", "private": server.private})

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
        if self.path == "/api/validate-yaml":  # the Hub looks at the card before it takes it
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
    """The stand-in, with the login that it takes; it has `created` and `files`.

    `private` is that of the repository me/digits, None while that does not exist.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.created, server.checked, server.files, server.private = [], [], {}, None
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
WITHOUT_IMAGES = {f"plots/{name}.png" for name in ("curves", "confusion_matrix", "per_class")}
SHOW_IMAGES = {f"plots/{name}.png" for name in ("mistakes", "batch")}


@pytest.mark.parametrize("images", [False, True])
def test_plots_of_private_images_are_uploaded_only_where_asked_for(copied, server, images):
    drawn = {f"plots/{path.name}" for path in (copied / "plots").glob("*.png")}
    assert drawn == WITHOUT_IMAGES | SHOW_IMAGES
    (copied / "plots" / "notes.txt").write_text("mine")
    address = hub.push(RunDir(copied), "digits", **({"images": True} if images else {}))
    assert address == f"{server.url}/me/digits"
    # Clients of before huggingface_hub 2 say it in the other way.
    [created] = server.created
    assert created.get("visibility") == "private" or created.get("private") is True
    assert created["name"] == "digits"
    assert server.files.keys() == UPLOADED | WITHOUT_IMAGES | (SHOW_IMAGES if images else set())
    for name, content in server.files.items():
        assert content == (copied / name).read_bytes(), name
    assert server.checked == [(copied / "README.md").read_text()]


def test_a_training_ends_with_its_upload(tmp_path, server, capsys):
    words = [*LENET, "--epochs", "1", "--push-to-hub", "digits"]
    assert run_script(lambda: start(tmp_path, *words)) == 0
    assert server.files.keys() == UPLOADED
    assert server.files["report.json"] == (tmp_path / "run" / "report.json").read_bytes()
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: only 4 steps in all")


def test_a_resumed_run_is_uploaded_only_where_it_is_told_again(tmp_path, server):
    start(tmp_path, *LENET, "--epochs", "1", "--push-to-hub", "digits", "--hub-public")
    server.files.clear()
    resume(tmp_path / "run", "--epochs", "2")  # a stranger's run must send nothing
    assert not server.files
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["push_to_hub"], config["hub_public"], config["hub_images"]) == ("", False, False)
    resume(tmp_path / "run", "--epochs", "3", "--push-to-hub", "digits")
    assert server.files.keys() == UPLOADED


def test_an_upload_that_fails_is_a_warning_with_the_command_to_try_again(
    copied, server, monkeypatch, capfd
):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    hub.upload(RunDir(copied), DIGITS)
    error = capfd.readouterr().err
    assert error.startswith(f"warning: {copied} could not be uploaded (")
    assert error.count("\n") == 1
    assert server.files == {}
    python, script, *words = shlex.split(error.split("Try again: ")[1].removesuffix(".\n"))
    assert (python, script) == ("python", "train.py")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    before = (copied / "best.safetensors").read_bytes()
    assert train.main(words) == 0
    assert server.files.keys() == UPLOADED | WITHOUT_IMAGES
    assert server.files["best.safetensors"] == before  # nothing was trained


@pytest.mark.parametrize("name", ["digits", "me/digits"])
def test_nothing_is_published_by_accident(copied, server, name, fails, capfd):
    """An existing repository that is public is refused at the start, and once more at the end."""
    server.private = False
    words = ["--dataset", "digits", "--threads", "1", "--push-to-hub", name]
    assert fails(train, *words) == (
        "the repository me/digits is public. Give --hub-public to publish the run there, or "
        "another --push-to-hub."
    )
    hub.upload(RunDir(copied), resolve({"push_to_hub": name}))  # published during the training
    assert "warning: the repository me/digits is public" in capfd.readouterr().err
    assert server.created == []
    assert not server.files
    allowed = resolve({"push_to_hub": name, "hub_public": True})
    hub.check_upload(allowed)
    hub.upload(RunDir(copied), allowed)
    assert server.files.keys() == UPLOADED | WITHOUT_IMAGES


def test_an_existing_private_repository_is_taken(copied, server):
    server.private = True
    hub.check_upload(DIGITS)
    hub.upload(RunDir(copied), DIGITS)
    assert server.files.keys() == UPLOADED | WITHOUT_IMAGES


def test_a_hub_that_is_out_of_reach_at_the_start_is_only_a_warning(server, monkeypatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    hub.check_upload(DIGITS)
    assert capfd.readouterr().err.startswith("warning: whether digits is public is checked before")


def test_only_the_main_process_uploads(copied, server):
    hub.upload(RunDir(copied, is_main_process=False), DIGITS)
    hub.upload(RunDir(copied), resolve({}))
    assert server.created == []


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("digits", "no token", "there is no login to upload to digits with. Run hf auth login, "
                               "or set HF_TOKEN."),
        ("digits", "offline", "HF_HUB_OFFLINE keeps the Hub away. Unset it to upload to digits."),
        ("a/b/c", "", "a/b/c is no name of a repository"),
    ],
)  # fmt: skip
def test_p7_what_would_fail_at_the_end_is_told_at_the_start(
    fails, server, monkeypatch, name, setting, message
):
    if setting == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", setting == "offline")
    words = ["--dataset", "digits", "--threads", "1", "--push-to-hub", name]
    assert fails(train, *words).startswith(message)
    assert server.created == []
