"""A server on the loopback interface that speaks as much of the Hub's language as its real client asks for.

It serves folders as repositories, and writes down what was asked for.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import unquote

_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<kind>revision|tree)/(?P<revision>[^/?]+))?")
_PHASE = re.compile(r"/phase/(?P<name>.+)")


@dataclass(frozen=True)
class Repository:
    """Folders by the name of their branch or tag; a token if the repository is private.

    A repository that `moves` has its branch ``main`` set to ``next`` as soon as its settings have been read.
    """

    revisions: dict[str, Path]
    token: str | None = None
    moves: bool = False

    def commit(self, revision: str) -> str:
        """Return a commit hash that belongs to this folder alone."""
        return hashlib.sha1(str(self.revisions[revision]).encode(), usedforsecurity=False).hexdigest()

    def find(self, revision: str) -> str | None:
        """Return the branch or tag that a name or a commit hash means."""
        return next((name for name in self.revisions if revision in (name, self.commit(name))), None)


@dataclass
class Hub:
    """The repositories, and the files that were asked for in each phase of a client's run."""

    repositories: Mapping[str, Repository]
    phase: str = ""
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def downloaded(self, phase: str) -> list[str]:
        """Return the files whose content was asked for, as ``owner/name:file``, in alphabetical order."""
        return sorted(what for when, method, what in self.requests if when == phase and method == "GET" and ":" in what)

    def asked(self, phase: str) -> set[str]:
        """Return everything that was asked for, the existence of files and listings included."""
        return {what for when, _, what in self.requests if when == phase}


@contextmanager
def serve(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """Serve repositories inside a ``with`` block."""
    hub = Hub(repositories)

    class Handler(_Handler):
        served = hub

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := _PHASE.fullmatch(path):
            self.served.phase = unquote(match["name"])
            self._send(200, b"{}")
        elif match := _RESOLVE.fullmatch(path):
            self._file(match["repo"], match["revision"], match["file"])
        elif match := _API.match(path):
            self._listing(match["repo"], match["revision"] or "main", match["kind"] == "tree")
        else:
            self._send(404, b"")

    def _file(self, name: str, revision: str, file: str) -> None:
        self._note(f"{name}:{file}")
        if (found := self._found(name, revision)) is None:
            return
        folder, commit = found
        path = folder / file
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        content = path.read_bytes()
        repository = self.served.repositories[name]
        if repository.moves and self.command == "GET" and file == "config.json":
            repository.revisions["main"] = repository.revisions["next"]
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if start is None:
            self._send(200, content, headers)
        else:
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(206, content[first:], headers)

    def _listing(self, name: str, revision: str, tree: bool) -> None:
        self._note(f"{name} {'tree' if tree else 'info'}")
        if (found := self._found(name, revision)) is None:
            return
        folder, commit = found
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if tree:
            self._send_json([_entry(folder, path) for path in files])
        else:
            siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
            self._send_json({"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _found(self, name: str, revision: str) -> tuple[Path, str] | None:
        repository = self.served.repositories.get(name)
        allowed = repository is not None and repository.token in (None, self._token())
        if repository is None or not allowed:
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        if (known := repository.find(revision)) is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository.revisions[known], repository.commit(known)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _note(self, what: str) -> None:
        self.served.requests.append((self.served.phase, self.command, what))

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Stay silent; `Hub.requests` is the log."""


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    oid = hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
    return {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": oid}
