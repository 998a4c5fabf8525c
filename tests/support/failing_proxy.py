"""An HTTP proxy on loopback in front of one server, which fails a share of the requests."""

import http.client
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


class FailingProxy:
    """Counts requests and bytes, and fails some: an error 500, no answer, or a request that was done and not answered."""

    def __init__(self, port: int, share: float, seed: int) -> None:
        self.port, self.share = port, share
        self._random, self._turn = random.Random(seed), threading.Lock()
        self.requests = self.failed = self.bytes_in = self.bytes_out = 0
        self.stop_at: tuple[int, threading.Event] | None = None
        """A number of requests, and the event that is set when they are reached."""

    def draw(self) -> str:
        """Returns what happens to the next request."""
        with self._turn:
            self.requests += 1
            if self.stop_at is not None and self.requests >= self.stop_at[0]:
                self.stop_at[1].set()
            if self._random.random() >= self.share:
                return "served"
            self.failed += 1
            return self._random.choice(["500", "dropped", "lost"])

    def count(self, sent: int, received: int) -> None:
        """Adds the bytes of bodies."""
        with self._turn:
            self.bytes_in += sent
            self.bytes_out += received


def _handler(proxy: FailingProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *given: object) -> None:
            pass

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fate = proxy.draw()
            if fate in ("500", "dropped"):
                proxy.count(len(body), 0)
                self.close_connection = True
                if fate == "500":
                    self.send_response(500)
                    self.send_header("Content-Length", "0")
                    self.send_header("Connection", "close")
                    self.end_headers()
                return
            server = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    server.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                server.putheader("Content-Length", str(len(body)))
            server.endheaders(body)
            answer = server.getresponse()
            content = answer.read()
            server.close()
            proxy.count(len(body), len(content))
            if fate == "lost":
                self.close_connection = True
                return
            with suppress(OSError):  # the client was killed
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in _HOP:
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                if length is not None:
                    self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(content)

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS", "PROPFIND", "PROPPATCH", "MKCOL", "MOVE", "COPY"):
        setattr(Handler, f"do_{method}", Handler._forward)
    return Handler


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *given: object) -> None:
        """A client that was killed is no error."""


@contextmanager
def failing_proxy(port: int, share: float, seed: int) -> Iterator[tuple[FailingProxy, str]]:
    """Serves a proxy to a port of this machine; yields it and its URL."""
    proxy = FailingProxy(port, share, seed)
    server = _Quiet(("127.0.0.1", 0), _handler(proxy))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield proxy, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
