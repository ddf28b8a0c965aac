"""A Hub on 127.0.0.1 for the tests: repositories, branches, commits, LFS, private repositories, injected faults.

It speaks the JSON that an unmodified `huggingface_hub` client sends, keeps everything in memory and is made of the
standard library and a reader of YAML. A client finds it through `HF_ENDPOINT`, which must be set before any Hugging
Face library is imported; see `LoopbackHub.environment`. A request that it does not know is answered with 501 and kept
in `LoopbackHub.unknown`, so that a test can assert that there was none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".arrow")


class HubError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


@dataclass
class Blob:
    """The content of a file as the repository knows it; `sha256` is set when it is stored with LFS."""

    data: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        """The object name git gives it (for LFS: that of the pointer file)."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = pointer.encode() if self.sha256 else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """The file as listings show it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}
        return entry


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    parent: str | None
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository: commits by object name, and branches that point at them."""

    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        """Put a new state on top of a branch."""
        parent = self.branches.get(branch)
        name = f"{self.id} {branch} {parent} {message} {len(self.commits)}"
        commit = Commit(hashlib.sha1(name.encode()).hexdigest(), parent, message, files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        """The state that a branch or an object name stands for."""
        revision = revision.removeprefix("refs/heads/")
        commit = self.commits.get(self.branches.get(revision, revision))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def history(self, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first; the last one is that of the creation."""
        commits, oid = [], self.branches.get(branch)
        while oid is not None:
            commits.append(self.commits[oid])
            oid = commits[-1].parent
        return commits


class LoopbackHub:
    """The server; a context manager.

    Attributes:
        url: what `HF_ENDPOINT` must be.
        users: user name by token.
        repos: repository by kind ("models", "datasets") and id.
        storage: LFS objects by their sha256.
        requests: method and path of every request.
        unknown: the requests that were not understood.
        cut_uploads: how many of the next LFS uploads lose their connection half-way.
        expire_uploads: how many of the LFS uploads after those are refused with 403, as an expired address is.
        cut_commits: how many of the next commits lose their connection half-way.
        received: bytes taken in by uploads and commits that were cut.
        before_commit: called once with the repository when the next commit arrives, before it is looked at.
    """

    def __init__(self) -> None:
        self.users = {"hf_test": "tester", "hf_stranger": "stranger"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.cut_uploads = self.expire_uploads = self.cut_commits = 0
        self.received: list[int] = []
        self.before_commit: Callable[[Repo], Any] | None = None
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str = "hf_test") -> dict[str, str]:
        """The variables that a client process needs; `home` holds its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }

    def model(self, repo_id: str) -> Repo:
        """A model repository."""
        return self.repos["models", repo_id]


def set_environment(variables: dict[str, str]) -> None:
    """Make the variables hold in this process: what a new process calls before it imports anything else."""
    os.environ.update(variables)


REPO = r"(?P<id>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"
FILES = rf"/(?:(?P<kind>datasets)/)?{REPO}"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/models", "list_models"),
    ("GET", API, "info"),
    ("GET", rf"{API}/revision/(?P<rev>[^/]+)", "info"),
    ("GET", rf"{API}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"{API}/paths-info/(?P<rev>[^/]+)", "paths_info"),
    ("GET", rf"{API}/refs", "refs"),
    ("POST", rf"{API}/branch/(?P<rev>[^/]+)", "create_branch"),
    ("POST", rf"{API}/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/storage/(?P<sha256>[0-9a-f]{64})", "lfs_put"),
    ("POST", r"/storage/(?P<sha256>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET", rf"{FILES}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Stay silent: `LoopbackHub.requests` holds what there is to tell."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        try:
            method = "GET" if self.command == "HEAD" else self.command
            for verb, pattern, name in ROUTES:
                if verb == method and (match := re.fullmatch(pattern, url.path)):
                    groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    getattr(self, name)(**groups)
                    return
            self.hub.unknown.append((self.command, self.path))
            self._body()
            raise HubError(501, f"no route for {self.command} {self.path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            self._reply(error.body, error.status, **headers, **{"X-Error-Message": str(error)})
        except _CutError:
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815 - the names http.server calls

    def _chunks(self) -> Any:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _body(self) -> bytes:
        return b"".join(self._chunks())

    def _json(self) -> Any:
        return json.loads(self._body() or b"{}")

    def _cut(self) -> None:
        """Take in the first half of the body, then let the connection go."""
        length = self.headers.get("Content-Length")
        half = self.rfile.read(int(length) // 2) if length else next(self._chunks())
        self.hub.received.append(len(half))
        raise _CutError

    def _reply(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _user(self) -> str | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _repo(self, kind: str, id: str, write: bool = False) -> Repo:
        """The repository, if this user may read (or write) it; a private one does not exist for others."""
        repo = self.hub.repos.get((kind, id))
        owner = id.split("/")[0] == self._user
        if repo is None or (repo.private and not owner):
            raise HubError(404 if self._user else 401, "Repository not found", "RepoNotFound")
        if write and not owner:
            raise HubError(403 if self._user else 401, "You have no write access to this repository")
        return repo

    def whoami(self) -> None:
        if self._user is None:
            raise HubError(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self._reply({"type": "user", "name": self._user, "orgs": [], "auth": auth})

    def create_repo(self) -> None:
        asked = self._json()
        if self._user is None or asked.get("organization") not in (None, self._user):
            raise HubError(403 if self._user else 401, "You don't have the rights to create a model here")
        kind = asked.get("type", "model") + "s"
        id = f"{self._user}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{id}"
        with self.hub.lock:
            if (kind, id) in self.hub.repos:
                raise HubError(409, "You already created this repo", url=url)
            repo = self.hub.repos[kind, id] = Repo(id, private=asked.get("visibility") == "private")
            repo.commit("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})
        self._reply({"url": url, "name": id})

    def validate_yaml(self) -> None:
        """The one rule of the Hub's that adapters run into: a base model is a model id, never a path."""
        content = self._json()["content"]
        wrong = re.findall(r"^base_model: *['\"]?([./~][^\n]*)", content, flags=re.MULTILINE)
        errors = [{"message": f'"base_model" with value "{name}" is not valid.'} for name in wrong]
        self._reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, kind: str, id: str, rev: str = "main") -> None:
        repo = self._repo(kind, id)
        commit = repo.at(rev)
        siblings = [
            {"rfilename": path, **({"size": len(b.data), "blobId": b.oid} if "blobs" in self.query else {})}
            for path, b in sorted(commit.files.items())
        ]
        about = {"id": id, "private": repo.private, "tags": [], "downloads": 0, "likes": 0, "gated": False}
        self._reply({**about, "sha": commit.oid, "siblings": siblings})

    def _tags(self, repo: Repo) -> list[str]:
        """The tags of a card, with the base models that the Hub derives from it."""
        card = repo.at("main").files.get("README.md")
        found = re.match(r"---\n(.*?)\n---", card.data.decode(), flags=re.DOTALL) if card else None
        data = yaml.safe_load(found[1]) if found else {}
        return [*(data.get("tags") or []), *filter(None, [data.get("library_name")])]

    def list_models(self) -> None:
        """Public repositories of all whose name has the words and whose card the tags."""
        words = self.query.get("search", [""])[0].lower()
        wanted = {tag for text in self.query.get("filter", []) for tag in text.split(",")}
        found = []
        for (kind, id), repo in sorted(self.hub.repos.items()):
            tags = self._tags(repo) if kind == "models" else []
            if kind == "models" and not repo.private and words in id.lower() and wanted <= set(tags):
                found.append({"id": id, "modelId": id, "tags": tags, "downloads": 3, "likes": 1, "private": False})
        self._reply(found[: int(self.query.get("limit", ["100"])[0])])

    def _entries(self, commit: Commit) -> dict[str, dict[str, Any]]:
        """Every file and folder of a commit by its path."""
        entries = {path: blob.entry(path) for path, blob in commit.files.items()}
        for folder in {str(folder) for path in commit.files for folder in Path(path).parents} - {"."}:
            oid = hashlib.sha1(f"{commit.oid}:{folder}".encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
        return dict(sorted(entries.items()))

    def tree(self, kind: str, id: str, rev: str, path: str = "") -> None:
        entries = self._entries(self._repo(kind, id).at(rev))
        if path and entries.get(path, {}).get("type") != "directory":
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        below = [entry for name, entry in entries.items() if not path or name.startswith(path + "/")]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            below = [entry for entry in below if str(Path(entry["path"]).parent) == (path or ".")]
        self._reply(below)

    def paths_info(self, kind: str, id: str, rev: str) -> None:
        body = self._body().decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        entries = self._entries(self._repo(kind, id).at(rev))
        self._reply([entries[path] for path in asked if path in entries])

    def refs(self, kind: str, id: str) -> None:
        branches = self._repo(kind, id).branches.items()
        refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        self._reply({"branches": refs, "tags": [], "converts": []})

    def create_branch(self, kind: str, id: str, rev: str) -> None:
        start = self._json().get("startingPoint", "main")
        repo = self._repo(kind, id, write=True)
        with self.hub.lock:
            if rev in repo.branches:
                raise HubError(409, f"Reference already exists: refs/heads/{rev}")
            repo.branches[rev] = repo.at(start).oid
        self._reply({})

    def preupload(self, kind: str, id: str, rev: str) -> None:
        files = self._json()["files"]
        present = self._repo(kind, id, write=True).at(rev).files
        answer = []
        for asked in files:
            blob = present.get(asked["path"])
            mode = "lfs" if asked["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = (blob.sha256 or blob.oid) if blob else None
            answer.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._reply({"files": answer})

    def lfs_batch(self, id: str, kind: str = "models") -> None:
        asked = self._json()
        self._repo(kind, id, write=True)
        objects = []
        for item in asked["objects"]:
            if item["oid"] not in self.hub.storage:
                href = f"{self.hub.url}/storage/{item['oid']}"
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(item)
        self._reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256: str) -> None:
        if self.hub.cut_uploads > 0:
            self.hub.cut_uploads -= 1
            self._cut()
        data = self._body()
        if self.hub.expire_uploads > 0:
            self.hub.expire_uploads -= 1
            raise HubError(403, "Request has expired")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise HubError(400, "The content does not match its sha256")
        self.hub.storage[sha256] = data
        self._reply(b"")

    def lfs_verify(self, sha256: str) -> None:
        asked = self._json()
        if len(self.hub.storage.get(sha256, b"")) != asked["size"]:
            raise HubError(404, "The object was not uploaded")
        self._reply({})

    def commit(self, kind: str, id: str, rev: str) -> None:
        if self.hub.cut_commits > 0:
            self.hub.cut_commits -= 1
            self._cut()
        lines = [json.loads(line) for line in self._body().splitlines()]
        repo = self._repo(kind, id, write=True)
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            if self.hub.before_commit is not None:
                meanwhile, self.hub.before_commit = self.hub.before_commit, None
                meanwhile(repo)
            if rev not in repo.branches:
                raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            if header.get("parentCommit") not in (None, repo.branches[rev]):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.at(rev).files)
            for key, value in ((line["key"], line["value"]) for line in lines if line["key"] != "header"):
                path = value["path"]
                if key == "file":
                    files[path] = Blob(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.storage:
                        raise HubError(400, f"LFS object {value['oid']} was never uploaded")
                    files[path] = Blob(self.hub.storage[value["oid"]], value["oid"])
                elif key == "deletedFile":
                    del files[path]
                else:  # deletedFolder
                    files = {name: b for name, b in files.items() if not name.startswith(path.rstrip("/") + "/")}
            commit = repo.commit(rev, header["summary"], files)
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{id}/commit/{commit.oid}"
        self._reply({"success": True, "commitOid": commit.oid, "commitUrl": url})

    def resolve(self, id: str, rev: str, path: str, kind: str = "models") -> None:
        commit = self._repo(kind, id).at(rev)
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if blob.sha256:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._reply(blob.data, **headers)
            return
        start, size = int(asked[1]), len(blob.data)
        if start >= size:
            self._reply(b"", 416, **{"Content-Range": f"bytes */{size}"})
            return
        end = min(int(asked[2]) if asked[2] else size - 1, size - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        self._reply(blob.data[start : end + 1], 206, **headers)


class _CutError(Exception):
    """The connection is to be dropped without an answer."""
