"""A TLS server on this machine that stands for every host, and behaves as a test says: well, or in every wrong way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from imagend.fetch.addresses import Address

HOSTS = ("civitai.com", "b2.civitai.com", "huggingface.co", "cdn.hf.co", "models.example.org")
Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.host = self.headers["Host"]
        self.server.asked.append((self.host, self.path, dict(self.headers)))
        behave = self.server.behaviours.get((self.host, self.path))
        with contextlib.suppress(OSError):  # the client may have had enough
            if behave is None:
                self.answer(b"", status=404)
            else:
                behave(self)

    def answer(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        """A whole answer; `length`: what it claims to have."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self._context = context
        self.behaviours: dict[tuple[str, str], Behaviour] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.release = threading.Event()
        """what a behaviour that hangs waits for"""

    def finish_request(self, request: Any, client_address: Any) -> None:
        """The handshake on the thread of the connection: a client that does not end it must not keep others out."""
        with contextlib.suppress(OSError), self._context.wrap_socket(request, server_side=True) as wrapped:
            super().finish_request(wrapped, client_address)

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no error."""

    def on(self, url: str, behave: Behaviour) -> None:
        host, _, path = url.removeprefix("https://").partition("/")
        self.behaviours[host, f"/{path}"] = behave

    def json(self, url: str, value: Any) -> None:
        self.on(url, lambda handler: handler.answer(json.dumps(value).encode()))

    def file(self, url: str, data: bytes, etag: str | None = '"1"') -> None:
        """As a store serves it: with Range and If-Range."""
        self.on(url, lambda handler: serve(handler, data, etag))

    def redirect(self, url: str, to: str, status: int = 302) -> None:
        self.on(url, lambda handler: handler.answer(b"", status=status, Location=to))

    def resolve(self, _: str) -> list[Address]:
        return [Address("127.0.0.1", self.server_address[1])]

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]


def serve(handler: Handler, data: bytes, etag: str | None, cut_at: int | None = None) -> None:
    """`cut_at`: at which byte of the file the connection is lost."""
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    tags = {"ETag": etag} if etag else {}
    start = int(asked[1]) if asked and handler.headers.get("If-Range", etag) == etag else 0
    if start >= len(data) > 0:
        handler.answer(b"", status=416)
        return
    body = data[start:cut_at]
    more = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
    handler.answer(body, status=206 if start else 200, length=len(data) - start, **tags, **more)
    if cut_at is not None:
        handler.hang_up()


@contextmanager
def running(folder: Path) -> Iterator[tuple[Server, ssl.SSLContext]]:
    """The server, and what a client trusts it by."""
    certificate = _certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server(context)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server, ssl.create_default_context(cafile=str(certificate))
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _certificate(folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in HOSTS]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    return path


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
