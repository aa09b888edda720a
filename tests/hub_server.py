"""
A local Hub for the tests: the HTTP that huggingface_hub speaks, on the loopback interface, in a thread.

    with HubServer(folder) as hub:
        hub.url, hub.token

or as a process, which prints its URL and its token and serves until it is ended:

    python tests/hub_server.py --port 0 --folder hub

Clients read HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET when they are imported: run them in a process of their own, with
`hub.environment(home)`.
"""

import argparse
import json
import os
import re
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_routes import ROUTES
from hub_store import HubError, HubStore


# Found in nothing but the requests' headers, or a test fails.
TOKEN = "hf_canaryCANARYcanaryCANARYcanary"
USER = "me"


@dataclass
class Request:
    """A request as it came in, the headers' names in lower case; `body` has what was read of it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Failure:
    """What happens to the next `times` requests whose `METHOD /path?query` a pattern finds; see `HubServer.fail`."""

    pattern: str
    times: int
    status: int | None
    headers: dict[str, str]
    body: bytes
    drop: str | None
    delay: float


class HubServer:
    """
    Args:
        folder (`Path`, *optional*): keeps repos and contents; by default a temporary one.
        port (`int`): 0 for any that is free.
        keep_requests (`bool`): collect all requests, with their bodies, in `requests`.

    Attributes:
        store ([`HubStore`]): repos, collections and users by token; tests look and change things there.
        has_collections (`bool`): whether the endpoint knows collections.
    """

    def __init__(self, folder: str | Path | None = None, port: int = 0, keep_requests: bool = True):
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        self.store = HubStore(Path(folder or self._temporary.name))
        self.token, self.keep_requests, self.has_collections = TOKEN, keep_requests, True
        self.requests, self.failures, self.closing = [], [], threading.Event()
        self.add_token(TOKEN)
        self._server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self._temporary is not None:
            with self.store.lock:
                self._temporary.cleanup()

    def add_token(self, token: str, name: str = USER, role: str = "write", orgs: dict[str, str] | None = None) -> None:
        """Lets a token in: of a user, for `read` or `write`, with the user's roles in organizations."""
        self.store.users[token] = {"name": name, "role": role, "orgs": orgs or {}}

    def fail(
        self,
        pattern: str,
        times: int = 1,
        *,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        body: bytes = b'{"error": "made to fail"}',
        drop: str | None = None,
        delay: float = 0.0,
    ) -> None:
        """
        Lets requests fail: with an answer of this status, by closing the connection in the middle of the request (`drop`
        is `"body"`) or after doing what it asks for (`"answer"`), or by answering only after `delay` seconds.
        """
        self.failures.append(Failure(pattern, times, status, headers or {}, body, drop, delay))

    def failure_of(self, line: str) -> Failure | None:
        with self.store.lock:
            for failure in self.failures:
                if failure.times > 0 and re.search(failure.pattern, line):
                    failure.times -= 1
                    return failure
        return None

    def sent(self, pattern: str) -> list[Request]:
        """Returns the requests whose `METHOD /path?query` a pattern finds, in order."""
        return [request for request in self.requests if re.search(pattern, request.line)]

    def head_files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Returns the contents of a repo's files by path."""
        files = self.store.files(self.store.repos[repo_id], revision)
        return {path: self.store.content(file) for path, file in files.items()}

    def environment(self, home: str | Path, token: str | None = TOKEN) -> dict[str, str]:
        """Returns the environment for a client's process: this endpoint, no other, and nothing of the user's."""
        ours = ("HF_", "HUGGING_FACE_", "ACCELERATE_")
        dropped = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k.lower() not in dropped}
        return {
            **inherited,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            **({"HF_TOKEN": token} if token else {}),
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """Clients may go away; all else is a fault of this server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes, the second of which would wait for an answer to the first.
    disable_nagle_algorithm = True
    hub: HubServer

    def log_message(self, *_) -> None:
        """Requests are in `hub.requests`."""

    def _read(self, part: float = 1.0) -> bytes:
        """The body, of which `part` is read."""
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(int(self.headers.get("Content-Length", 0)) * part))

    def _close(self) -> None:
        self.close_connection = True
        # The client may have gone first.
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        failure = self.hub.failure_of(f"{self.command} {self.path}")
        half = failure is not None and failure.drop == "body"
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, self._read(0.5 if half else 1.0))
        if self.hub.keep_requests:
            self.hub.requests.append(request)
        # Who waits while the server is ended gets no answer.
        if failure is not None and failure.delay:
            half = self.hub.closing.wait(failure.delay) or half
        if half:
            return self._close()
        if failure is not None and failure.status is not None:
            return self._answer(failure.status, failure.headers, failure.body)
        answer = self._dispatch(request)
        if failure is not None and failure.drop == "answer":
            return self._close()
        self._answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _dispatch(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(self.path)
        path, query = url.path, {key: values[0] for key, values in parse_qs(url.query).items()}
        try:
            kind, _, token = self.headers.get("Authorization", "").partition(" ")
            user = self.hub.store.user(token if kind else None)
            for methods, pattern, handler in ROUTES:
                match = pattern.fullmatch(path)
                if match and self.command in methods:
                    groups = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    with self.hub.store.lock:
                        content = handler(self.hub, request, user, query, **groups)
                    if isinstance(content, tuple):
                        return content
                    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()
            raise HubError(404, "Not Found")
        except HubError as error:
            headers = {"Content-Type": "application/json", "X-Error-Message": error.message}
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            return error.status, headers, json.dumps({"error": error.message, **error.content}).encode()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a local Hub on the loopback interface.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--folder", required=True, help="Keeps repos and contents; another start goes on with them.")
    args = parser.parse_args()
    with HubServer(args.folder, args.port, keep_requests=False) as hub:
        print(hub.url, hub.token, flush=True)
        try:
            hub.closing.wait()
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
