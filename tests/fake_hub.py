"""A Hugging Face hub on this machine, with the parts that downloads need. Repositories are dicts of files."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_CONSTANTS = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE", "HF_HUB_OFFLINE")


class FakeHub:
    """The content of the hub, and the files that were downloaded.

    Attributes:
        repositories: the files of each repository, by owner/name.
        gated: repositories that list their files but refuse to serve them.
        corrupt: files that are served with bytes that do not fit their hash.
        served: the files that were served, in order.
        asked: the revisions whose description or listing was asked for, in order.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories = repositories
        self.gated: set[str] = set()
        self.corrupt: set[str] = set()
        self.served: list[str] = []
        self.asked: list[str] = []

    def listing(self, repository: str) -> dict:
        """The description of a repository, with all files and their hashes."""
        siblings = []
        for name, content in self.repositories[repository].items():
            entry = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        card = {"license": "openrail"}
        return {"id": repository, "sha": COMMIT, "siblings": siblings, "cardData": card, "tags": [], "private": False}

    def tree(self, repository: str) -> list[dict]:
        """The listing in the form of the hub's newer interface."""
        entries = []
        for file in self.listing(repository)["siblings"]:
            entry = {"type": "file", "path": file["rfilename"], "size": file["size"], "oid": file["blobId"]}
            if lfs := file.get("lfs"):
                entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
            entries.append(entry)
        return entries

    def content(self, repository: str, name: str) -> bytes:
        """The bytes of a file as they are served."""
        content = self.repositories[repository][name]
        return content[::-1] if name in self.corrupt else content


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].strip("/")
        if asked := re.fullmatch(r"api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path):
            repository, kind, revision = asked.groups()
            if repository not in self.hub.repositories:
                return self._refuse(404, "RepoNotFound")
            if unquote(revision) not in ("main", "refs/pr/15", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            self.hub.asked.append(unquote(revision))
            answer = self.hub.listing(repository) if kind == "revision" else self.hub.tree(repository)
            return self._send(json.dumps(answer).encode(), "application/json")
        if not (asked := re.fullmatch(rf"([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path)):
            return self._refuse(404, "EntryNotFound")
        repository, filename = asked.groups()
        if repository in self.hub.gated:
            return self._refuse(403, "GatedRepo")
        if self.command == "GET":
            self.hub.served.append(filename)
        listed = {entry["rfilename"]: entry for entry in self.hub.listing(repository)["siblings"]}[filename]
        etag = listed["lfs"]["sha256"] if "lfs" in listed else listed["blobId"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        return self._send(self.hub.content(repository, filename), "application/octet-stream", headers)

    def _send(self, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code} says the fake hub")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def serve(cache: Path, repositories: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    """Runs the hub. huggingface_hub talks to it, and downloads to `cache`."""
    hub = FakeHub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    before = {name: getattr(constants, name) for name in _CONSTANTS}
    for name, value in zip(_CONSTANTS, (endpoint, template, str(cache), False), strict=True):
        setattr(constants, name, value)
    try:
        yield hub
    finally:
        for name, value in before.items():
            setattr(constants, name, value)
        server.shutdown()
        server.server_close()
