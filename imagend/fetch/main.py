"""A process that makes one attempt at one job of kind fetch, at the end of a socket. It knows no spool and no queue."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime

from imagend import __version__, messages
from imagend import config as configuration
from imagend.config import Config
from imagend.errors import Bug, DownloadFailed, ImagendError, Interrupt, UsageError
from imagend.fetch import tokens
from imagend.fetch.fetcher import Fetched, Fetcher, Wish
from imagend.fetch.web import Web
from imagend.fetch_spec import Fetch
from imagend.job import Outcome
from imagend.lanes import NETWORK
from imagend.manifest import Installed
from imagend.messages import Cancel, Ended, Failure, Message, Progress, Ready, Run, Stop

STAGE = "fetching"
PROGRESS_INTERVAL_S = 0.1
"""What has come is told of at most this often."""
_NAP_S = 1.0
GoOnline = Callable[[Config], Web]
"""Raises UsageError."""


def go_online(config: Config) -> Web:
    return Web(config.fetch, tokens.load(config.fetch.tokens, configuration.credentials()))


class Attempt:
    """`cancel` may be called from another thread; all else is one thread's."""

    def __init__(self, run: Run, config: Config, go_online: GoOnline, say: Callable[[Message], None]) -> None:
        self._run, self._config, self._go_online, self._say = run, config, go_online, say
        self._web: Web | None = None
        self._cancelled = threading.Event()
        self._said_at = 0.0
        self._done = 0
        self._total: int | None = None

    def make(self) -> Ended:
        """Fetch, and say how that ended."""
        start = time.perf_counter()
        installed, failure, outcome = None, None, Outcome.FAILED
        spec = Fetch.model_validate_json(json.dumps(self._run.spec))
        try:
            installed, outcome = describe(self._fetch(spec)), Outcome.SUCCEEDED
        except Interrupt:
            outcome = Outcome.CANCELLED
        except UsageError as error:  # what the job wants cannot be
            failure = Failure.of(DownloadFailed(spec.host, str(error)))
        except ImagendError as error:
            failure = Failure.of(error)
        except Exception as bug:
            where = "".join(traceback.format_tb(bug.__traceback__))  # without its message: an URL may stand in it
            failure = Failure.of(Bug(type(bug).__name__)).model_copy(update={"traceback": where})
        timings = {STAGE: round(time.perf_counter() - start, 6)}
        return Ended(job=self._run.job, outcome=outcome, installed=installed, timings=timings, failure=failure)

    def _fetch(self, spec: Fetch) -> Fetched:
        """Raises what Fetcher.attempt() does, and Interrupt."""
        self._progress()
        self._web = self._go_online(self._config)
        whom = self._run.job.client
        fetcher = Fetcher(self._config, self._web, whom, lambda: datetime.now(UTC), self._tell, self._sleep)
        wish = Wish(spec.source, spec.sha256, spec.type, spec.name, spec.variant, spec.notes)
        return fetcher.attempt(wish, last=lambda: self._run.last or self._cancelled.is_set(), again=True)

    def cancel(self) -> None:
        self._cancelled.set()
        if self._web:
            self._web.hang_up("it was cancelled")

    def _tell(self, _: str, size: int, total: int | None) -> None:
        self._done, self._total = size, total
        if size == total or time.monotonic() - self._said_at >= PROGRESS_INTERVAL_S:
            self._progress()

    def _sleep(self, seconds: float) -> None:
        """Between two tries; it goes on to say that it lives."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._progress()
            self._cancelled.wait(min(_NAP_S, left))

    def _progress(self) -> None:
        """Raises Interrupt when the job was cancelled."""
        if self._cancelled.is_set():
            raise Interrupt
        self._said_at = time.monotonic()
        self._say(Progress(job=self._run.job, stage=STAGE, bytes_done=self._done, bytes_total=self._total))


def describe(fetched: Fetched) -> Installed:
    record = fetched.record
    return Installed(
        kind=fetched.kind,
        name=fetched.name,
        sha256=fetched.sha256,
        files=fetched.files,
        size=record.size or 0,
        source=record.source,
        version=record.version,
        base=record.base,
        license=record.license,
    )


def serve(connection: socket.socket, config: Config, go_online: GoOnline = go_online) -> None:
    """Make one attempt, then wait to be told to leave. When asked to stop, or when the daemon is gone, leave at once:
    what has come stays, and the next attempt goes on with it."""

    def say(message: Message) -> None:
        connection.sendall(messages.encode(message))

    lines = connection.makefile("rb")
    say(Ready(device=NETWORK, versions={"imagend": __version__}))
    if not isinstance(run := messages.decode(lines.readline()), Run):
        return
    attempt = Attempt(run, config, go_online, say)

    def listen() -> None:
        try:
            for line in lines:
                match messages.decode(line):
                    case Cancel(job=ref) if ref == run.job:
                        attempt.cancel()
                    case Stop():
                        break
        finally:
            os._exit(0)

    listener = threading.Thread(target=listen, name="listen", daemon=True)
    listener.start()
    say(attempt.make())
    listener.join()
