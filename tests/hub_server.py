"""A Hugging Face Hub on the loopback interface, for tests of the real `huggingface_hub` client over real HTTP.

Answers what publishing and loading a model need: repositories, branches, LFS uploads, commits, downloads. Commits and
branches live in memory. Faults are scripted per request: a status, a connection cut in the middle of a body, silence.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "Loopback" * 5
INITIAL_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
LFS_SUFFIXES = (".safetensors", ".png")


@dataclass(frozen=True)
class Commit:
    """One state of a repository: `files` maps a path to its bytes."""

    oid: str
    title: str
    parent: str | None
    files: dict[str, bytes]


@dataclass
class Repository:
    """Commits by oid, and the head of each branch."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        parent = self.branches.get(branch)
        described = json.dumps([title, parent, len(self.commits), sorted(files)])
        commit = Commit(hashlib.sha1(described.encode()).hexdigest(), title, parent, files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commit, found = self.find(revision), []
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent) if commit.parent else None
        return found


@dataclass
class Fault:
    """What happens to the next `times` requests whose `METHOD path` matches `pattern`.

    status: answer with it. drop: read half of the body, then cut the connection. hang: stay silent until the end.
    """

    pattern: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    hang: bool = False


def use_hub(rank: int = 0, *, url: str, offline: bool = False) -> None:
    """What HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE would have set, had they been there when the client was imported.

    For a process of its own, as what `Runs.start` and `ForkedScript` prepare it with.
    """
    from huggingface_hub import constants

    os.environ["HF_TOKEN"] = TOKEN
    constants.ENDPOINT = url
    constants.HF_HUB_DISABLE_XET = True
    constants.HF_HUB_OFFLINE = offline


class HubServer:
    """Start with `with HubServer(token) as server:`; the client needs `server.url` as its endpoint."""

    def __init__(self, token: str, owner: str = "tester") -> None:
        self.token = token
        self.owner = owner
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.pushes: list[str] = []  # revisions in the order in which their commits arrived
        self.stopping = threading.Event()
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self._http.block_on_close = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()

    def script(self, pattern: str, times: int = 1, **what) -> None:
        """Add a `Fault`; the first that matches a request is used up first."""
        with self.lock:
            self._faults.append(Fault(pattern, times, **what))

    def heal(self) -> None:
        """Forget the faults that were not used up."""
        with self.lock:
            self._faults.clear()

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes at the head of a branch."""
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return commit.files


class _Answer(Exception):
    """An HTTP answer that ends the handling of a request."""

    def __init__(self, status: int, body: dict | None = None, **headers: str) -> None:
        self.status = status
        self.body = body or {}
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

    def log_message(self, *_) -> None:
        """Requests are kept in `HubServer.requests`; nothing is printed."""

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault_for(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.hang:
            self.hub.stopping.wait()
        if fault is not None and (fault.hang or fault.drop):
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        if fault is not None:
            self._send(fault.status, b'{"error": "scripted"}', fault.headers)
            return
        try:
            with self.hub.lock:
                status, payload, headers = self._route(path, body)
        except _Answer as answer:
            status, payload, headers = answer.status, answer.body, answer.headers
        self._send(status, payload if isinstance(payload, bytes) else json.dumps(payload).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _chunked(self) -> bytes:
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, payload: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def _route(self, path: str, body: bytes) -> tuple[int, dict | list | bytes, dict[str, str]]:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, answer in ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                return answer(self, body, **match.groupdict())
        raise _Answer(404, {"error": f"no route for {self.command} {path}"})

    def _authorize(self, repository: Repository | None = None) -> None:
        """Writing needs the token; so does reading a private repository."""
        if repository is not None and not repository.private:
            return
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Answer(401, {"error": "Invalid username or password."})

    def _repository(self, repo: str, writing: bool = False) -> Repository:
        if writing:
            self._authorize()
        if repo not in self.hub.repositories:
            raise _Answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        self._authorize(self.hub.repositories[repo])
        return self.hub.repositories[repo]

    def _commit(self, repo: str, revision: str, writing: bool = False) -> Commit:
        commit = self._repository(repo, writing).find(revision)
        if commit is None:
            raise _Answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        return commit

    # Repositories and branches

    def whoami(self, body: bytes):
        self._authorize()
        return 200, {"type": "user", "name": self.hub.owner, "auth": {"accessToken": {"role": "write"}}}, {}

    def create(self, body: bytes):
        self._authorize()
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or self.hub.owner}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repositories:
            return 409, {**answer, "error": "You already created this model repo"}, {}
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.hub.repositories[repo] = Repository(private)
        self.hub.repositories[repo].commit("main", "initial commit", dict(INITIAL_FILES))
        return 200, answer, {}

    def branch(self, body: bytes, repo: str, name: str):
        repository = self._repository(repo, writing=True)
        if name in repository.branches:
            return 409, {"error": f"Reference already exists: {name}"}, {}
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repository.branches[name] = self._commit(repo, start).oid
        return 200, {}, {}

    def refs(self, body: bytes, repo: str):
        branches = self._repository(repo).branches
        listed = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in branches.items()]
        return 200, {"branches": listed, "tags": [], "converts": []}, {}

    def commits(self, body: bytes, repo: str, revision: str):
        self._commit(repo, revision)
        history = self._repository(repo).history(revision)
        date = "2026-01-01T00:00:00.000Z"
        return 200, [{"id": c.oid, "title": c.title, "message": "", "authors": [], "date": date} for c in history], {}

    # Uploads

    def validate_yaml(self, body: bytes):
        content = json.loads(body)["content"]
        if content.startswith("---\nbroken"):
            return 400, {"errors": [{"message": "metadata is broken"}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def preupload(self, body: bytes, repo: str, revision: str):
        present = self._commit(repo, revision, writing=True).files
        answers = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = _oid(path, present[path]) if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answers}, {}

    def lfs_batch(self, body: bytes, repo: str):
        self._repository(repo, writing=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
            verify = {"href": f"{self.hub.url}/lfs/verify"}
            missing = wanted["oid"] not in self.hub.lfs_objects
            objects.append({**wanted, "actions": {"upload": upload, "verify": verify}} if missing else wanted)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Answer(400, {"error": "sha256 of the body differs from its name"})
        self.hub.lfs_objects[oid] = body
        return 200, {}, {}

    def lfs_verify(self, body: bytes):
        wanted = json.loads(body)
        found = self.hub.lfs_objects.get(wanted["oid"])
        return (200 if found is not None and len(found) == wanted["size"] else 404), {}, {}

    def commit(self, body: bytes, repo: str, revision: str):
        files = dict(self._commit(repo, revision, writing=True).files)
        if revision not in self._repository(repo).branches:
            raise _Answer(400, {"error": f"{revision} is not a branch"})
        title = ""
        for line in body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                title = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.lfs_objects:
                    raise _Answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.hub.lfs_objects[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"])
            else:
                raise _Answer(400, {"error": f"unknown operation {kind}"})
        made = self._repository(repo).commit(revision, title, files)
        self.hub.pushes.append(revision)
        return (
            200,
            {"success": True, "commitOid": made.oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{made.oid}"},
            {},
        )

    # Downloads

    def info(self, body: bytes, repo: str, revision: str = "main"):
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self._repository(repo).private
        return 200, {"id": repo, "sha": commit.oid, "private": private, "siblings": siblings, "tags": []}, {}

    def tree(self, body: bytes, repo: str, revision: str, folder: str = ""):
        listed = []
        for path, content in sorted(self._commit(repo, revision).files.items()):
            if not path.startswith(folder or ""):
                continue
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 134}
            listed.append(entry)
        if folder and not listed:
            raise _Answer(404, {"error": f"no folder {folder}"}, X_Error_Code="EntryNotFound")
        return 200, listed, {}

    def resolve(self, body: bytes, repo: str, revision: str, path: str):
        commit = self._commit(repo, revision)
        if path not in commit.files:
            raise _Answer(404, {"error": f"no file {path}"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        content = commit.files[path]
        return 200, content, {"ETag": f'"{_oid(path, content)}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "none"}


def _oid(path: str, content: bytes) -> str:
    """sha256 of an LFS file, git's blob sha1 of a regular one."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)"
_FILES = r"/(?P<repo>[\w.-]+/[\w.-]+)"

ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", _REPO + r"/branch/(?P<name>.+)", _Handler.branch),
    ("GET", _REPO + r"/refs", _Handler.refs),
    ("GET", _REPO + r"/commits/(?P<revision>.+)", _Handler.commits),
    ("POST", _REPO + r"/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", _REPO + r"/commit/(?P<revision>.+)", _Handler.commit),
    ("GET", _REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("GET", _REPO + r"/revision/(?P<revision>.+)", _Handler.info),
    ("GET", _REPO, _Handler.info),
    ("POST", _FILES + r"\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", r"/lfs/verify", _Handler.lfs_verify),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    ("GET", _FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
