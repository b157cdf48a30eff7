"""
A small Hugging Face Hub on loopback: enough of its HTTP API for the unmodified clients to create repositories, upload
(as regular files and through LFS), list, download and stream. State is in memory.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin")


class Repository:
    """Commits, first to last: pairs of a sha and the files {path: (content, whether it is in LFS)}."""

    def __init__(self, private):
        self.private = private
        self.commits = []
        self.commit({})

    def commit(self, files):
        self.commits.append((hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest(), files))

    def at(self, revision):
        """Sha and files of a revision, or `None`."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class LoopbackHub:
    """
    Runs while it is open.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: {"ORG/NAME": Repository}; datasets as "datasets/ORG/NAME", Spaces as "spaces/ORG/NAME".
        requests: (method, path) of all requests so far.
        cut_uploads: how many of the next LFS uploads are cut off in the middle.
        handler: class that answers requests.
    """

    @property
    def handler(self):
        return Handler

    def __enter__(self):
        self.repositories, self.blobs, self.requests = {}, {}, []
        self.cut_uploads = 0
        hub = self

        class BoundHandler(self.handler):
            pass

        BoundHandler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn_url = f"http://localhost:{self.server.server_port}/cdn"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache_dir, token=TOKEN):
        """Environment of a process that only knows this Hub, with a cache of its own."""
        variables = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache_dir)}
        return {**variables, "HF_HUB_OFFLINE": "0", **({} if token is None else {"HF_TOKEN": token})}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *_):
        pass

    def answer(self, status, value=b"", **headers):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, header in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(header))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def is_known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, kind, name):
        """The repository, or `None` if it is private and the caller has no token, as if it did not exist."""
        repository = self.hub.repositories.get(name if kind == "models" else f"{kind}/{name}")
        if repository is None or (repository.private and not self.is_known()):
            self.refuse(404 if self.is_known() else 401, "RepoNotFound", f"Repository {name} not found")
            return None
        return repository

    def commit_at(self, kind, name, revision):
        """Sha and files of a repository's revision, or `None` after answering that it does not exist."""
        repository = self.repository(kind, name)
        commit = repository and repository.at(revision)
        if repository is not None and commit is None:
            self.refuse(404, "RevisionNotFound", f"no revision {revision}")
        return commit

    def handle_request(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append((self.command, path))
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return function(self, **match.groupdict())
        self.body()
        return self.refuse(404, "EntryNotFound", f"no route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def who_am_i(self):
        if not self.is_known():
            return self.answer(401, {"error": "Invalid credentials"})
        return self.answer(200, {"type": "user", "name": "org", "orgs": [], "auth": {"type": "access_token"}})

    def create(self):
        request = json.loads(self.body())
        if not self.is_known():
            return self.answer(401, {"error": "Invalid username or password."})
        name = f"{request.get('organization') or 'org'}/{request['name']}"
        if request.get("type") == "space" and "sdk" not in request:
            return self.answer(400, {"error": "Please choose a Space SDK"})
        key = {"dataset": f"datasets/{name}", "space": f"spaces/{name}"}.get(request.get("type"), name)
        if key in self.hub.repositories:
            return self.answer(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{key}"})
        is_private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.repositories[key] = Repository(is_private)
        return self.answer(200, {"url": f"{self.hub.url}/{key}", "name": name, "id": name})

    def validate_yaml(self):
        self.body()
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, kind, name, revision):
        files = json.loads(self.body())["files"]
        if self.repository(kind, name) is None:
            return
        modes = {file["path"]: "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular" for file in files}
        self.answer(
            200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes.items()]}
        )

    def lfs_batch(self, name):
        objects = json.loads(self.body())["objects"]
        if not self.is_known():
            return self.refuse(401, "RepoNotFound", "no")
        answers = []
        for entry in objects:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            answers.append({**entry, **({} if entry["oid"] in self.hub.blobs else {"actions": actions})})
        return self.answer(200, {"transfer": "basic", "objects": answers})

    def lfs_upload(self, oid):
        if self.hub.cut_uploads:
            self.hub.cut_uploads -= 1
            self.rfile.read(100)
            self.close_connection = True
            return self.connection.close()
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.blobs[oid] = content
        return self.answer(200)

    def commit(self, kind, name, revision):
        lines = [json.loads(line) for line in self.body().splitlines()]
        repository = self.repository(kind, name)
        if repository is None:
            return
        if not self.is_known():
            self.refuse(403, "Forbidden", "this needs a token")
            return
        files = dict(repository.at("main")[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = (self.hub.blobs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.commit(files)
        sha = repository.commits[-1][0]
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def info(self, kind, name, revision="main"):
        commit = self.commit_at(kind, name, revision)
        if commit is None:
            return
        sha, files = commit
        repository = self.repository(kind, name)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.answer(200, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, kind, name, revision, folder):
        commit = self.commit_at(kind, name, revision)
        if commit is None:
            return
        entries = entries_of(commit[1])
        folder = folder.strip("/")
        if folder and entries.get(folder, {}).get("type") != "directory":
            self.refuse(404, "EntryNotFound", f"no folder {folder}")
            return
        is_recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        below = [path for path in entries if path.startswith(f"{folder}/" if folder else "")]
        depth = folder.count("/") + 1 if folder else 0
        self.answer(200, [entries[path] for path in below if is_recursive or path.count("/") == depth])

    def paths_info(self, kind, name, revision):
        request = self.body()
        if self.headers.get_content_type() == "application/json":
            paths = json.loads(request)["paths"]
        else:
            paths = parse_qs(request.decode())["paths"]
        commit = self.commit_at(kind, name, revision)
        if commit is None:
            return
        entries = entries_of(commit[1])
        self.answer(200, [entries[path] for path in paths if path in entries])

    def resolve(self, name, revision, file, kind="models"):
        commit = self.commit_at(kind, name, revision)
        if commit is None:
            return
        sha, files = commit
        if file not in files:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        content, is_lfs = files[file]
        if not is_lfs:
            self.answer(200, content, ETag=f'"{git_oid(content)}"', X_Repo_Commit=sha)
            return
        oid = hashlib.sha256(content).hexdigest()
        linked = {"X_Linked_ETag": f'"{oid}"', "X_Linked_Size": len(content), "X_Repo_Commit": sha}
        # Large files lie on another host, as on the Hub: redirects within one are followed before headers are read.
        self.answer(302, b"", Location=f"{self.hub.cdn_url}/{oid}", **linked)

    def cdn(self, oid):
        content = self.hub.blobs[oid]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.answer(200, content, ETag=f'"{oid}"')
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        content_range = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, content[first : last + 1], ETag=f'"{oid}"', Content_Range=content_range)


def entries_of(files):
    """The Hub's description of the files and folders of a commit: {path: entry}, sorted by path."""
    entries = {}
    for path, (content, is_lfs) in files.items():
        size = len(content)
        entries[path] = {
            "type": "file",
            "path": path,
            "size": size,
            "oid": git_oid(content),
            **lfs_entry(content, is_lfs),
        }
        for folder in list(PurePosixPath(path).parents)[:-1]:
            entries[str(folder)] = {"type": "directory", "path": str(folder), "size": 0, "oid": git_oid(b"")}
    return dict(sorted(entries.items()))


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_entry(content, is_lfs):
    oid = hashlib.sha256(content).hexdigest()
    return {"lfs": {"oid": oid, "size": len(content), "pointerSize": 134}} if is_lfs else {}


NAME = r"(?P<name>[^/]+/[^/]+)"
REPOSITORY = rf"(?P<kind>models|datasets|spaces)/{NAME}"
FILE = r"(?P<revision>[^/]+)/(?P<file>.+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.who_am_i),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("POST",), rf"/api/{REPOSITORY}/preupload/(?P<revision>.+)", Handler.preupload),
    (("POST",), rf"/(?:datasets/|spaces/)?{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>\w+)", Handler.lfs_upload),
    (("POST",), rf"/api/{REPOSITORY}/commit/(?P<revision>.+)", Handler.commit),
    (("GET",), rf"/api/{REPOSITORY}", Handler.info),
    (("GET",), rf"/api/{REPOSITORY}/revision/(?P<revision>[^/]+)", Handler.info),
    (("GET",), rf"/api/{REPOSITORY}/tree/(?P<revision>[^/]+)(?P<folder>(?:/.*)?)", Handler.tree),
    (("POST",), rf"/api/{REPOSITORY}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (("GET", "HEAD"), rf"/(?P<kind>datasets|spaces)/{NAME}/resolve/{FILE}", Handler.resolve),
    (("GET", "HEAD"), rf"/{NAME}/resolve/{FILE}", Handler.resolve),
    (("GET", "HEAD"), r"/cdn/(?P<oid>\w+)", Handler.cdn),
]
