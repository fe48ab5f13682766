"""A model hub on this machine: the two calls huggingface_hub makes for a snapshot, with ranges, and connections that break."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the hub has and what was asked of it. `break_after`: bytes after which the next transfer of a file is cut off."""

    repository: str
    files: dict[str, bytes]
    break_after: dict[str, int] = field(default_factory=dict)
    needs_token: bool = False
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    @property
    def fetched(self) -> list[str]:
        """The files whose bytes were sent, in order."""
        return [path for method, path in self.asked if method == "GET" and path in self.files]


@contextmanager
def running_hub(hub: Hub) -> Iterator[Hub]:
    """Serve it until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(has_body=False)

        def do_GET(self) -> None:
            self.answer(has_body=True)

        def answer(self, *, has_body: bool) -> None:
            path = self.path.partition("?")[0]
            prefix = f"/{hub.repository}/resolve/{COMMIT}/"
            name = path.removeprefix(prefix)
            hub.asked.append((self.command, name))
            if hub.needs_token and self.headers.get("Authorization") != "Bearer secret":
                self.reply(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            elif path.startswith(f"/api/models/{hub.repository}/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
                self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            elif path.startswith(f"/api/models/{hub.repository}"):
                siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
                body = {"id": hub.repository, "sha": COMMIT, "siblings": siblings, "private": False}
                self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
            elif path.startswith(prefix) and name in hub.files:
                self.send_file(name, has_body=has_body)
            else:
                self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

        def send_file(self, name: str, *, has_body: bool) -> None:
            data = hub.files[name]
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            start = 0
            if given := self.headers.get("Range"):
                start = int(given.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = hub.break_after.pop(name, None) if has_body else None
            self.reply(206 if start else 200, data[start:], headers, has_body=has_body, cut=cut)

        def reply(
            self, status: int, body: bytes, headers: dict[str, str], *, has_body: bool = True, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if has_body:
                self.wfile.write(body[:cut])
            self.close_connection = cut is not None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
