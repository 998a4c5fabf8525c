"""A Hugging Face hub on this machine: the requests that huggingface_hub sends to read and to commit."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import close_session, constants

TOKEN = "hf_writes_for_me"


@dataclass
class Repository:
    """Commits by their id, and the newest one of each branch."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    private: bool = False
    log: list[str] = field(default_factory=list)
    """Messages of the commits that were pushed."""

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


class Hub(ThreadingHTTPServer):
    """Serves repositories as huggingface.co does, or one error for everything; TOKEN may write for the owner `me`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """Large files that were uploaded, by SHA-256; visible only once a commit names them."""
        self.status = 200
        self.error_code: str | None = None
        self.refused: dict[str, int] = {}
        """Status with which requests are refused whose path has a text."""
        self.fetched: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    @property
    def may_write(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def refuses(self, path: str) -> bool:
        status = next((status for part, status in self.server.refused.items() if part in path), self.server.status)
        if status != 200:
            code = self.server.error_code
            self.answer(status, **({"X_Error_Code": code} if code else {}))
        return status != 200

    def repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.may_write):
            self.answer(404, X_Error_Code="RepoNotFound")
            return None
        return found

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.refuses(path):
            return
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            name, (kind, revision) = "/".join(words[2:4]), words[4:6] or ("revision", "main")
        else:
            name, (kind, revision), file = "/".join(words[:2]), words[2:4] or ("", ""), "/".join(words[4:])
        if (repository := self.repository(name)) is None:
            return
        if (files := repository.files(revision)) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        commit = repository.branches.get(revision, revision)
        if kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            self.answer_json({"id": name, "sha": commit, "private": repository.private, "siblings": siblings})
        elif kind == "tree":
            self.answer_json(
                [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()
                ]
            )
        elif file not in files:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            if self.command == "GET":
                self.server.fetched.append(file)
            etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
            self.answer(200, files[file], ETag=etag, X_Repo_Commit=commit)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self.body()
        if not self.refuses(self.path):
            self.server.objects[hashlib.sha256(content).hexdigest()] = content
            self.answer(200)

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        if self.refuses(path):
            return
        words = path.strip("/").split("/")
        if path == "/api/validate-yaml":  # asks for no token
            self.answer_json({"errors": [], "warnings": []})
        elif not self.may_write:
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            upload = {"upload": {"href": f"{self.server.url}/objects"}}
            self.answer_json({"transfer": "basic", "objects": [one | {"actions": upload} for one in asked]})
        elif (repository := self.repository("/".join(words[2:4]))) is None:
            return
        elif words[2] != "me":
            self.answer(403)
        elif words[4] == "branch":
            repository.branches[words[5]] = repository.branches["main"]
            self.answer(200)
        elif words[4] == "preupload":
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".onnx")) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            self.answer_json({"files": modes})
        else:
            self.commit("/".join(words[2:4]), words[5], [json.loads(line) for line in body.splitlines()])

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "me" or name in self.server.repositories:
            self.answer(409 if name in self.server.repositories else 403)
            return
        first = "0" * 40
        private = asked.get("visibility") == "private"
        self.server.repositories[name] = Repository({first: {".gitattributes": b""}}, {"main": first}, private)
        self.answer_json({"url": f"{self.server.url}/{name}", "name": name, "id": "1"})

    def commit(self, name: str, branch: str, lines: list[dict]) -> None:
        """Applies all operations or none."""
        repository = self.server.repositories[name]
        [header, *operations] = lines
        if header["value"].get("parentCommit") != repository.branches[branch]:
            self.answer(409)
            return
        files = dict(repository.commits[repository.branches[branch]])
        for one in operations:
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                del files[value["path"]]
        repository.log.append(header["value"]["summary"])
        commit = hashlib.sha1(f"{name} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[commit], repository.branches[branch] = files, commit
        self.answer_json({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Yields a hub that huggingface_hub talks to, without a token, and with uploads by plain HTTP."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    try:
        yield server
    finally:
        close_session()
        server.shutdown()
        server.server_close()
