"""A stand-in of the Hugging Face hub on this machine: repositories of models, kept in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """``repositories``: name -> path -> content; ``requests``: what was asked for, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, content: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        hub = self.server
        hub.requests.append(self.path)
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            hub.repositories.setdefault(name, {})
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.private.setdefault(name, private)
            self._answer(200, json.dumps({"url": f"{hub.url}/{name}"}).encode())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self._answer(200, json.dumps({"files": modes}).encode())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.repositories[match[1]][line["value"]["path"]] = content
            url = f"{hub.url}/{match[1]}/commit/{COMMIT}"
            self._answer(200, json.dumps({"commitUrl": url, "commitOid": COMMIT}).encode())
        elif self.path == "/api/validate-yaml":
            self._answer(200)
        else:
            self._answer(404)

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(?:main|0+)/(.+)", self.path)
        match = match or re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/main/([^?]+).*", self.path)
        repository = self.server.repositories.get(match[1]) if match else None
        if repository is None:
            self._answer(404, X_Error_Code="RepoNotFound")
        elif match[2] not in repository:
            self._answer(404, X_Error_Code="EntryNotFound")
        else:
            content = repository[match[2]]
            tag = hashlib.sha1(content).hexdigest()
            self._answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@contextlib.contextmanager
def running(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """A hub that huggingface_hub, in this process, takes for the real one."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    template = "/{repo_id}/resolve/{revision}/{filename}"
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": cache,
    }
    # Before huggingface_hub 0.25 its modules had copies of their own.
    modules = [
        module for name, module in sys.modules.items() if name.startswith("huggingface_hub.")
    ]
    for module, (name, value) in itertools.product(modules, values.items()):
        if name in vars(module):
            monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    _forget_session()  # made while offline
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
        _forget_session()


def _forget_session() -> None:
    """Called ``reset_sessions`` before huggingface_hub 1.0."""
    (getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions)()
