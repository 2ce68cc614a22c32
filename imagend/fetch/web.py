"""HTTPS by urllib3, to hosts on the allowlist and to the address that was checked; no redirect goes unchecked.

No proxy, no cookie, no compression, no other port. A token goes to the host that was asked first and never further. A
server that sends nothing, or too slowly, is left: a thread beside watches and cuts the connection.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.parse import urljoin, urlsplit

from urllib3 import BaseHTTPResponse
from urllib3.connection import HTTPSConnection
from urllib3.exceptions import HTTPError

from imagend import __version__
from imagend.errors import DownloadFailed
from imagend.fetch.addresses import PORT, Address, Resolver, checked, resolve
from imagend.fetch.tokens import Tokens
from imagend.fetch_settings import Fetch

MAX_REDIRECTS = 3
MAX_ADDRESSES = 4
MAX_JSON_BYTES = 16 << 20
MAX_URL = 8192
CONNECT_S, READ_S = 15.0, 30.0
HEAD_S = 60.0
"""From the request to the end of the answer's headers."""
WINDOW_S, WINDOW_BYTES = 60.0, 64 << 10
"""A body must bring so many bytes in each such time."""
_BROKEN = (HTTPError, HTTPException, OSError, ValueError)
"""What urllib3 raises, and the standard library below it, on servers that break the protocol or the connection."""
_REDIRECTS = (301, 302, 303, 307, 308)


class Cut(Exception):
    """The connection was cut, or never was: another attempt may do. Its text completes "because …"."""


class Refused(Exception):
    """An answer that is neither the thing itself nor a redirect."""

    def __init__(self, host: str, status: int, retry_after: str | None) -> None:
        super().__init__(status)
        self.host, self.status, self.retry_after = host, status, retry_after


class Answer:
    """The body of an answer, to be read once, and what its headers say. `host` is the last one."""

    def __init__(self, host: str, response: BaseHTTPResponse, watch: _Watch) -> None:
        self.host, self.status, self.headers = host, response.status, response.headers
        self._response, self._watch = response, watch

    def read(self, size: int) -> bytes:
        """At most so many bytes, as they come; none at the end. Raises Cut, also where fewer come than were said."""
        try:
            data = self._response.read1(size, decode_content=False)
        except _BROKEN as error:
            raise Cut(self._watch.why or _why(error)) from None
        if self._watch.why is not None:
            raise Cut(self._watch.why)
        self._watch.came(len(data))
        return data

    @property
    def length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isdecimal() and len(text) <= 18 else None


class _Watch:
    """Cuts a socket when too little comes over it."""

    def __init__(self, sock: socket.socket, head_s: float, window_s: float, clock: Callable[[], float]) -> None:
        self._socket, self._window_s, self._clock = sock, window_s, clock
        self._until, self._came = clock() + head_s, 0
        self._done = threading.Event()
        self.why: str | None = None
        threading.Thread(target=self._watch, args=(min(1.0, head_s / 4, window_s / 4),), daemon=True).start()

    def body(self) -> None:
        """The headers are there."""
        self._until, self._came = self._clock() + self._window_s, 0

    def came(self, size: int) -> None:
        self._came += size
        if self._came >= WINDOW_BYTES:
            self.body()

    def stop(self) -> None:
        self._done.set()

    def cut(self, why: str) -> None:
        """Who reads it, or waits for it, gets Cut. From any thread."""
        self.why = why
        with contextlib.suppress(OSError):  # not SSLSocket's own, which takes its state from the reader
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _watch(self, interval_s: float) -> None:
        while not self._done.wait(interval_s):
            if self._clock() > self._until:
                self.cut("it sends nothing, or too slowly")
                return


class Web:
    """`resolver`, `allow_private`, `trust` and the times are for tests; a host reaches them by no setting."""

    def __init__(
        self,
        settings: Fetch,
        tokens: Tokens,
        resolver: Resolver = resolve,
        allow_private: bool = False,
        trust: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
        head_s: float = HEAD_S,
        window_s: float = WINDOW_S,
    ) -> None:
        self._settings, self._tokens, self._resolver, self._allow_private = settings, tokens, resolver, allow_private
        self._trust = trust or ssl.create_default_context()
        self._clock, self._head_s, self._window_s = clock, head_s, window_s
        self._open: _Watch | None = None

    def hang_up(self, why: str) -> None:
        """Cut the connection there is, from another thread."""
        if watch := self._open:
            watch.cut(why)

    def host_of(self, url: str) -> str:
        """The host of an URL that may be fetched from. Raises DownloadFailed."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise DownloadFailed("that URL", "it is none") from None
        if parts.scheme != "https" or port not in (None, PORT) or "@" in parts.netloc or len(url) > MAX_URL:
            raise DownloadFailed(host or "there", "only plain https:// URLs are fetched, on port 443, without a user")
        if not url.isascii() or any(letter <= " " or letter == "\x7f" for letter in url):
            raise DownloadFailed(host, "its URL has characters that no URL has")
        if not self._settings.allows(host):
            raise DownloadFailed(
                host, "it is not among the hosts that may be fetched from (fetch.hosts in config.yaml)"
            )
        return host

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[Answer]:
        """The answer at the end of the redirects: 200 or 206. Raises DownloadFailed, Cut, Refused."""
        first = self.host_of(url)
        token = self._tokens.of(first)
        for _ in range(MAX_REDIRECTS + 1):
            host = self.host_of(url)
            token = token if host == first else None
            sent = {"User-Agent": f"imagend/{__version__}", **(headers or {})}
            sent |= {"Authorization": f"Bearer {token}"} if token else {}
            with self._ask(host, url, sent) as answer:
                if answer.status in _REDIRECTS and (place := answer.headers.get("Location")):
                    url = _joined(host, url, place)
                    continue
                if answer.status not in (200, 206):
                    raise Refused(host, answer.status, answer.headers.get("Retry-After"))
                if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise DownloadFailed(host, "it sends compressed what was asked for as it is")
                yield answer
                return
        raise DownloadFailed(first, f"it redirects more than {MAX_REDIRECTS} times")

    def json(self, url: str) -> dict[str, Any]:
        """An object of bounded size. Raises as get() does."""
        with self.get(url, {"Accept": "application/json"}) as answer:
            data = bytearray()
            while chunk := answer.read(65_536):
                data += chunk
                if len(data) > MAX_JSON_BYTES:
                    raise DownloadFailed(answer.host, "its API answers without end")
            try:
                value = json.loads(data)
            except (ValueError, RecursionError):
                raise DownloadFailed(answer.host, "its API answers what is no JSON") from None
        if not isinstance(value, dict):
            raise DownloadFailed(answer.host, "its API answers something else than is documented")
        return value

    @contextmanager
    def _ask(self, host: str, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection = self._connected(host)
        assert connection.sock is not None
        watch = self._open = _Watch(connection.sock, self._head_s, self._window_s, self._clock)
        try:
            try:
                connection.request("GET", target, headers={"Host": host, **headers}, preload_content=False)
                response = connection.getresponse()
            except _BROKEN as error:
                raise Cut(watch.why or _why(error)) from None
            watch.body()
            yield Answer(host, response, watch)
        finally:
            self._open = None
            watch.stop()
            connection.close()

    def _connected(self, host: str) -> HTTPSConnection:
        """To one of the addresses that were checked. Raises DownloadFailed, Cut."""
        try:
            addresses = checked(host, self._resolver, self._allow_private)
        except OSError as error:
            raise Cut(f"the name {host} cannot be looked up ({error.strerror})") from None
        failure = ""
        for address in addresses[:MAX_ADDRESSES]:
            connection = self._connection(host, address)
            try:
                connection.connect()
                connection.timeout = READ_S
                return connection
            except _BROKEN as error:
                connection.close()
                failure = _why(error)
        raise Cut(failure)

    def _connection(self, host: str, address: Address) -> HTTPSConnection:
        """By its address; whether it is the host, its certificate says."""
        return HTTPSConnection(
            address.ip,
            address.port,
            server_hostname=host,
            ssl_context=self._trust,
            timeout=CONNECT_S,
        )


def _joined(host: str, url: str, place: str) -> str:
    try:
        return urljoin(url, place)
    except ValueError:
        raise DownloadFailed(host, "it redirects to what is no URL") from None


def _why(error: Exception) -> str:
    """In few words, and none of an URL: it may be signed."""
    text = str(error.__cause__ or error)
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate" in text.lower():
        return "its certificate is not to be trusted"
    if "timed out" in text or isinstance(error, TimeoutError):
        return "it does not answer"
    return f"the connection was cut ({type(error).__name__})"
