"""Uploads to a local server that answers as the Hub does, and refusals."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dinov2_custom.errors import ConfigError
from dinov2_custom.export.push import open_hub, push

pytest.importorskip("huggingface_hub", reason="NO UPLOAD CHECK: the extra 'export' is not installed")
# huggingface_hub passes an open file in a way that its HTTP library deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
TOKEN = "hf_" + "hunter2" * 5


class Hub(BaseHTTPRequestHandler):
    """Answers whoami, creation, preupload, LFS and commit; stores the files of commits in ``server.files``.

    Files above ``server.regular`` bytes are uploaded by LFS, in parts of ``server.part`` bytes if that is not 0.
    ``server.faults`` gives, for parts of a path, the statuses of the next requests; 0 closes the connection.
    """

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            self._send(404, "{}")
            return
        self._reply({"name": "me", "type": "user", "auth": {"accessToken": {"displayName": "x", "role": "write"}}})

    def do_PUT(self):  # to the store, whose addresses are signed and need no token
        length = int(self.headers["Content-Length"])
        if self._fails(partial(self.rfile.read, length // 2)):
            return
        self.server.parts[self.path.partition("?")[0]] = self.rfile.read(length)
        self._send(200, "", ETag="part")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(self.path)
        if self._fails():
            return
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": self._mode(file["size"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._reply({"files": files})
        elif self.path.endswith("/objects/batch"):
            assert "lfs" in self.headers["Content-Type"]
            self._reply({"objects": [self._instructions(**one) for one in json.loads(body)["objects"]]})
        elif self.path.startswith("/complete/"):
            self._send(200, "{}")
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    parts = sorted(path for path in self.server.parts if value["oid"] in path)
                    content = b"".join(self.server.parts[path] for path in parts)
                    assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                    self.server.files[value["path"]] = content
            self._reply({"commitUrl": f"{self.server.url}/me/cells/commit/1", "commitOid": "1", "success": True})
        else:
            self.server.created.append(json.loads(body))
            self._reply({"url": f"{self.server.url}/me/cells", "name": "me/cells", "id": "1"})

    def _mode(self, size):
        return "lfs" if size > self.server.regular else "regular"

    def _instructions(self, oid, size):
        store, part = f"{self.server.url}/store/{oid}", self.server.part
        header = {str(n + 1): f"{store}/{n}?sig=secret" for n in range(-(-size // part))} if part else {}
        upload = {"href": f"{self.server.url}/complete/{oid}" if part else f"{store}?sig=secret"}
        header |= {"chunk_size": str(part)} if part else {}
        return {"oid": oid, "size": size, "actions": {"upload": upload | {"header": header}}}

    def _fails(self, before=lambda: None):
        """Answer with the next fault of this path, if any; ``before`` is done before a connection is closed."""
        faults = next((codes for part, codes in self.server.faults.items() if part in self.path and codes), None)
        if faults is None:
            return False
        code = faults.pop(0)
        if code:
            self._send(code, json.dumps({"error": f"refused {TOKEN}"}))
        else:
            before()
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
        return True

    def _reply(self, value):
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        self._send(200 if allowed else 401, json.dumps(value if allowed else {"error": f"no such token {TOKEN}"}))

    def _send(self, code, text, **headers):
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(text), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.files, server.requests, server.created, server.faults, server.parts = {}, [], [], {}, {}
        server.regular, server.part = 1000, 0
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # it uploads to another server
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts
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


@pytest.fixture
def weights(tmp_path):
    """An export with a file that the Hub wants by LFS."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "hf" / "README.md").write_text("card")
    return tmp_path / "hf"


@pytest.mark.parametrize("part", [0, 1000], ids=["whole", "in parts"])
def test_a_large_file_is_uploaded_by_lfs(server, weights, part):
    server.part = part
    push(open_hub("me/cells"), "me/cells", weights)
    assert server.files == {path.name: path.read_bytes() for path in weights.iterdir()}
    assert len(server.parts) == (3 if part else 1)


@pytest.mark.parametrize("where", ["/preupload/", "/objects/batch", "/store/", "/commit/"])
def test_a_busy_or_broken_server_is_asked_again(server, weights, where):
    server.faults[where] = [429, 500, 503] if where != "/commit/" else []
    push(open_hub("me/cells"), "me/cells", weights)
    assert len(server.files) == 2 and not server.faults[where]


def test_a_connection_that_drops_in_the_middle_of_a_file_is_opened_again(server, weights):
    server.faults["/store/"] = [0]
    push(open_hub("me/cells"), "me/cells", weights)
    assert server.files["model.safetensors"] == (weights / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "where, codes",
    [("/repos/create", [403]), ("/preupload/", [403]), ("/objects/batch", [401]), ("/store/", [403])]
    + [("/store/", [500] * 9), ("/store/", [0] * 9), ("/commit/", [409]), ("/commit/", [500] * 9)],
)
def test_what_the_hub_refuses_is_one_error_without_secrets(server, weights, where, codes, caplog, capsys):
    server.faults[where] = list(codes)
    with pytest.raises(ConfigError, match=rf"--push: .* the export is at {weights}; check") as caught:
        push(open_hub("me/cells"), "me/cells", weights)
    said = str(caught.value)
    assert (str(codes[0]) if codes[0] else "Error: Server disconnected") in said
    assert TOKEN not in said + caplog.text + "".join(capsys.readouterr()) and "sig=secret" not in said
    assert server.files == {} and (weights / "README.md").is_file()


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
