"""An S3 server on loopback, kept in memory by moto, whose n-th request of a kind can be made to fail."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from urllib.parse import parse_qs

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "s3://bucket"


class ObjectStore:
    """The server as a WSGI application."""

    def __init__(self) -> None:
        self._application = DomainDispatcherApplication(create_backend_app)
        self.faults: dict[tuple[str, int], str] = {}
        """What happens to the n-th PUT or LIST: `refused` (nothing is done), `lost` (done, but answered as if it were
        refused) or `repeated` (done, but the answer is an error after which clients try again)."""
        self.seen: Counter[str] = Counter()
        self._turn = threading.Lock()

    def fail(self, kind: str, number: int, how: str) -> None:
        """Sets the only fault, counted from now on."""
        self.faults, self.seen = {(kind, number): how}, Counter()

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        kind = "LIST" if environ["REQUEST_METHOD"] == "GET" and "list-type" in query else environ["REQUEST_METHOD"]
        with self._turn:  # moto's buckets are not made for several threads
            self.seen[kind] += 1
            fault = self.faults.get((kind, self.seen[kind]))
            if fault == "refused":
                return _failure(start_response, HTTPStatus.FORBIDDEN)
            answer: list = []
            body = list(self._application(environ, lambda *given: answer.extend(given)))
        if fault is not None:
            return _failure(start_response, HTTPStatus.FORBIDDEN if fault == "lost" else HTTPStatus.SERVICE_UNAVAILABLE)
        start_response(*answer)
        return body


def _failure(start_response: Callable, status: HTTPStatus) -> list[bytes]:
    start_response(f"{status.value} {status.phrase}", [("Content-Length", "0")])
    return [b""]


class _Silent(WSGIRequestHandler):
    def log(self, *given: object) -> None:
        pass


@contextmanager
def served_store() -> Iterator[ObjectStore]:
    """Serves an empty `BUCKET`, and points the clients of this process and its children to it."""
    import s3fs
    from moto.moto_api._internal import moto_api_backend

    moto_api_backend.reset()  # moto keeps buckets for the whole process
    store = ObjectStore()
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Silent)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in settings.items():
            patched.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield store
        s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    thread.join()
