"""Uploads to a local server that answers as the Hub does, and refusals."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dinov2_custom.errors import ConfigError
from dinov2_custom.export.push import open_hub, push

pytest.importorskip("huggingface_hub", reason="NO UPLOAD CHECK: the extra 'export' is not installed")
TOKEN = "hf_" + "hunter2" * 5


class Hub(BaseHTTPRequestHandler):
    """Answers whoami, creation, preupload and commit; stores the files of commits in ``server.files``."""

    def do_GET(self):
        self._answer({"name": "me", "type": "user", "auth": {"accessToken": {"displayName": "x", "role": "write"}}})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(self.path)
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{self.server.url}/me/cells/commit/1", "commitOid": "1", "success": True})
        else:
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/me/cells", "name": "me/cells", "id": "1"})

    def _answer(self, value):
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        text = json.dumps(value if allowed else {"error": f"no such token {TOKEN}"}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.files, server.requests, server.created = {}, [], []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()


def test_a_folder_is_one_commit(server, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("README.md", "config.json", "model.safetensors"):
        (folder / name).write_text(name)
    address = push(open_hub("me/cells"), "me/cells", folder)
    assert address == f"{server.url}/me/cells"
    assert server.files == {name: name.encode() for name in ("README.md", "config.json", "model.safetensors")}
    assert server.created[0]["name"] == "cells" and "private" in str(server.created[0]).lower()
    assert sum(path.endswith("/commit/main") for path in server.requests) == 1


def test_a_file_brings_its_card_as_the_readme(server, tmp_path):
    for name in ("model.onnx", "model.onnx.md", "model.onnx.png", "model.onnx.data", "other.onnx"):
        (tmp_path / name).write_text(name)
    push(open_hub("me/cells"), "me/cells", tmp_path / "model.onnx")
    assert sorted(server.files) == ["README.md", "model.onnx", "model.onnx.data", "model.onnx.png"]
    assert server.files["README.md"] == b"model.onnx.md"


def test_a_refused_login_ends_before_the_export_and_keeps_the_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN + "x")
    with pytest.raises(ConfigError, match="nothing was exported; check the network, and") as caught:
        open_hub("me/cells")
    assert TOKEN not in str(caught.value)


def test_no_connection(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="me/cells at http://127.0.0.1:9, got ConnectError: .*refused; nothing was"):
        open_hub("me/cells")


@pytest.mark.parametrize("name", ["cells", "me/cells/x", "me/ce lls", "me/cells.git"])
def test_names_that_are_no_repository(name):
    with pytest.raises(ConfigError, match="--push: expected user/name"):
        open_hub(name)
