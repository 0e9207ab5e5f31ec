"""`--push` against a hub of our own on this machine: what is sent, where to, and that nothing goes without being asked."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tiny import save_pair


class Hub(ThreadingHTTPServer):
    """The few addresses of the hub that an upload asks for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.created: list[dict[str, object]] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.full = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Asked(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        self.server.calls.append(self.path)
        known = self.headers.get("Authorization") == "Bearer hf_right"
        if self.path.startswith("/api/whoami"):
            self.answer({"name": "me"} if known else {"error": "Invalid token"}, 200 if known else 401)
        else:
            self.answer({"id": "me/made", "sha": "0" * 40, "siblings": []})

    def do_PUT(self) -> None:
        content = self.body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        self.server.calls.append(self.path)
        content = self.body()
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(content))
            self.answer({"url": f"{self.server.address}/me/made", "name": "me/made", "id": "me/made"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(content)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if "tensors" in f["path"] else "regular"} for f in files]
            self.answer({"files": [{**m, "shouldIgnore": False} for m in modes]})
        elif self.path.endswith("/objects/batch"):
            wanted = json.loads(content)["objects"]
            put = {"upload": {"href": f"{self.server.address}/put"}}
            self.answer({"transfer": "basic", "objects": [{**o, "actions": put} for o in wanted]})
        elif "/commit/" in self.path:
            if self.server.full:
                self.answer({"error": "the disk is full"}, 507)
                return
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.large[value["oid"]]
            self.answer({"commitUrl": f"{self.server.address}/me/made/commit/1", "commitOid": "1"})
        else:
            self.answer({}, 404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def call(hub: Hub, *words: object, token: str = "hf_right") -> subprocess.CompletedProcess[str]:
    told = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "counterpoise", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **told}, check=False)


def test_what_was_written_is_pushed_into_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    done = call(hub, "average", pre, post, "-o", tmp_path / "out", "--ratio", 0.5, "--push", "me/made")
    assert done.returncode == 0, done.stderr
    assert "pushed to" in done.stderr
    assert [(c["name"], c["organization"], c.get("private") or c["visibility"]) for c in hub.created] in (
        [("made", "me", True)],
        [("made", "me", "private")],
    )
    written = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert hub.files == written


def test_nothing_is_pushed_without_being_asked(hub: Hub, tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    assert call(hub, "average", pre, post, "-o", tmp_path / "out", "--ratio", 0.5, "-q").returncode == 0
    assert hub.calls == []


@pytest.mark.parametrize(
    ("name", "token", "told"),
    [
        ("made", "hf_right", "--push: expected ORG/NAME, found 'made'"),
        ("me/made", "hf_wrong", "--push: expected a login"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_the_work(
    hub: Hub, tmp_path: Path, name: str, token: str, told: str
) -> None:
    pre, post = save_pair(tmp_path)
    done = call(hub, "average", pre, post, "-o", tmp_path / "out", "--ratio", 0.5, "--push", name, token=token)
    assert done.returncode == 1
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses_leaves_the_folder_whole(hub: Hub, tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    hub.full = True
    done = call(hub, "average", pre, post, "-o", tmp_path / "out", "--ratio", 0.5, "--push", "me/made")
    assert done.returncode == 1
    assert "is whole, but the hub did not take it" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
