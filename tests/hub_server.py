"""A small HTTP server that speaks the hub's protocol: what repositories have, and their files."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" + "0" * 34
Repositories = Mapping[str, Mapping[str, bytes]]  # "models/owner/name" -> file -> content


def answer(repositories: Repositories, path: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a request."""
    parts = unquote(urlparse(path).path).strip("/").split("/")
    if parts[0] == "api":
        kind, owner, name, *rest = parts[1:]
    else:
        kind = "datasets" if parts[0] == "datasets" else "models"
        owner, name, *rest = parts[kind == "datasets" :]
    if owner == "closed":
        return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"}, b""
    if owner == "broken":
        return 418, {}, b""
    files = repositories.get(f"{kind}/{owner}/{name}")
    if files is None:
        return 401, {"X-Error-Code": "RepoNotFound"}, b""
    revision = rest[1] if len(rest) > 1 else "main"
    if revision not in ("main", "v1", COMMIT):
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    if rest[:1] == ["resolve"]:
        content = files.get("/".join(rest[2:]))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content
    if rest[:1] == ["tree"]:
        found: Any = [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files.items()
        ]
    else:
        found = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
    return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()


@contextmanager
def serving(repositories: Repositories) -> Iterator[tuple[str, list[str]]]:
    """A server on this machine; gives its address, and the paths that it was asked for so far."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, headers, body = answer(repositories, self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
