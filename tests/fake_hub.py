"""A Hugging Face hub on this machine, with what downloads and uploads need. Repositories are dicts of files."""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import yaml
from huggingface_hub import constants

TOKEN = "hf_of_the_fake_hub"  # may write
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Uploads go by the hub's older protocol, over HTTP: the newer one, Xet, is binary and has servers of its own.
_CONSTANTS = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET")


_STEPS = {"create": "api/repos/create", "preupload": "/preupload/", "lfs": ".git/info/lfs", "commit": "/commit/"}


def _is_large(name: str) -> bool:
    """True for the files that the hub keeps beside git."""
    return name.endswith((".safetensors", ".png"))


class FakeHub:
    """The content of the hub, and the files that were downloaded.

    Attributes:
        repositories: the files of each repository, by owner/name.
        gated: repositories that list their files but refuse to serve them.
        corrupt: files that are served with bytes that do not fit their hash.
        served: the files that were served, in order.
        asked: the revisions whose description or listing was asked for, in order.
        refused: the steps of an upload that fail with this status: "create", "preupload", "lfs" or "commit".
        commits: the names of the files of each commit.
        private: the repositories that were made private.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories = repositories
        self.gated: set[str] = set()
        self.corrupt: set[str] = set()
        self.served: list[str] = []
        self.asked: list[str] = []
        self.refused: dict[str, int] = {}
        self.commits: list[set[str]] = []
        self.private: set[str] = set()
        self.stored: dict[str, bytes] = {}  # large files by their SHA-256, before they are part of a commit

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

    def commit(self, repository: str, lines: list[dict]) -> None:
        """Adds the files of a commit to a repository."""
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        self.repositories[repository] |= files
        self.commits.append(set(files))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_POST(self):
        path, body = self.path.split("?")[0].strip("/"), self._body()
        step = next((step for step, word in _STEPS.items() if word in path), None)
        if step in self.hub.refused:
            return self._refuse(self.hub.refused[step], "Refused")
        if path == "api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            errors = [] if front.get("license") else [{"message": "license is missing"}]
            return self._answer({"errors": errors, "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._refuse(401, "Unauthorized")
        if step == "create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if name in self.hub.repositories:
                return self._answer({"url": f"{constants.ENDPOINT}/{name}"}, 409)
            self.hub.repositories[name] = {}
            self.hub.private |= {name} if asked.get("private") or asked.get("visibility") == "private" else set()
            return self._answer({"url": f"{constants.ENDPOINT}/{name}"})
        repository = "/".join(path.removeprefix("api/models/").split("/")[:2]).removesuffix(".git")
        if step == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "lfs" if _is_large(file["path"]) else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": [file | {"shouldIgnore": False} for file in files]})
        if step == "lfs":
            objects = [
                one | {"actions": {"upload": {"href": f"{constants.ENDPOINT}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        assert step == "commit", path
        self.hub.commit(repository, [json.loads(line) for line in body.splitlines()])
        return self._answer({"commitOid": COMMIT, "commitUrl": f"{constants.ENDPOINT}/{repository}/commit/{COMMIT}"})

    def do_PUT(self):
        content = self._body()
        self.hub.stored[hashlib.sha256(content).hexdigest()] = content
        self._send(b"", "text/plain")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, value: dict, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", status=status)

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

    def _send(self, content: bytes, kind: str, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
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
    for name, value in zip(_CONSTANTS, (endpoint, template, str(cache), False, True), strict=True):
        setattr(constants, name, value)
    try:
        yield hub
    finally:
        for name, value in before.items():
            setattr(constants, name, value)
        server.shutdown()
        server.server_close()
