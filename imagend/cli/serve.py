"""imagend serve: puts the daemon together from its parts and runs it."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import queue
import signal
import threading
import time

from imagend import config as configuration
from imagend import logs
from imagend.errors import SpoolUnusable
from imagend.models import Models
from imagend.outputs import Outputs
from imagend.signers import AllowedSigners
from imagend.spool import Spool
from imagend.survey import Survey

_M_ARENA_MAX = -8
"""malloc.h's"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "SIGTERM: release running jobs and stop; again: at once. SIGHUP: read config.yaml and keys again."


def run(arguments: argparse.Namespace) -> int:
    from imagend.daemon.dashboard import Dashboard
    from imagend.daemon.executor import Arrived, Mailbox, ReloadRequested, StopRequested, Surveyed
    from imagend.daemon.intake import Arrival, Door, Policy, Verdict
    from imagend.daemon.librarian import Librarian
    from imagend.daemon.local import Fetching, LocalExecutor
    from imagend.daemon.loop import Daemon
    from imagend.daemon.retention import Retention
    from imagend.daemon.watch import watch

    _share_one_heap()
    path = configuration.find(arguments.config)
    config = configuration.load(path)
    logs.set_up(journal=configuration.stderr_is_journal())
    faulthandler.enable()  # where each thread stands, when systemd's watchdog sends SIGABRT or a library crashes
    supervision = configuration.supervision()
    mailbox: Mailbox = queue.SimpleQueue()
    spool, outputs = Spool(config.spool), Outputs(config.outputs)
    doors = [Door(inbox, Policy(config, AllowedSigners.parse("", "")), spool.attachments) for inbox in config.inboxes]
    fetching = Fetching(config.fetch.at_once, lambda: daemon.settings.config.for_fetching())
    executor = LocalExecutor(config.slots(), config.models, mailbox, config.for_workers(), fetching=fetching)
    survey = Survey(Models(config.models, config.extra_model_paths))
    try:
        spool.open()
        outputs.open()
        librarian = Librarian(survey, config.reference, config.spool, lambda: mailbox.put(Surveyed()), time.monotonic)
        daemon = Daemon(
            config=config,
            reload=lambda: configuration.load(path),
            spool=spool,
            outputs=outputs,
            librarian=librarian,
            executor=executor,
            doors=doors,
            mailbox=mailbox,
        )
        retention = Retention(spool, outputs, daemon.ending.is_tidied, lambda: daemon.settings.config)
        daemon.health.retain(retention)
        if supervision is not None:
            from imagend.daemon.notify import Notifier, Systemd

            address, watchdog_s = supervision
            daemon.health.supervisor = Systemd(Notifier(address), watchdog_s, daemon)
        daemon.settings.read_keys()
        daemon.tell_doors()
        daemon.recover()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: mailbox.put(StopRequested()))
        signal.signal(signal.SIGHUP, lambda *_: mailbox.put(ReloadRequested()))

        def ask(arrivals: tuple[Arrival, ...]) -> tuple[Verdict, ...]:
            reply: queue.SimpleQueue[tuple[Verdict, ...]] = queue.SimpleQueue()
            mailbox.put(Arrived(arrivals, reply))
            return reply.get()

        threading.Thread(target=librarian.serve, name="librarian", daemon=True).start()
        threading.Thread(target=daemon.health.driver.serve, name="gpus", daemon=True).start()
        threading.Thread(target=retention.serve, name="retention", daemon=True).start()
        for door in doors:
            threading.Thread(target=door.serve, args=(ask,), name=f"door-{door.inbox}", daemon=True).start()
        watch({door.inbox: door.hint for door in doors})
        dashboard = Dashboard(config)
        painter = threading.Thread(target=dashboard.serve, name="dashboard", daemon=True)
        painter.start()
        daemon.run()
        dashboard.stop(painter)
    except OSError as error:  # recover() puts everything right at the next start
        raise SpoolUnusable(error.filename or config.spool, error.strerror or error) from error
    finally:
        spool.close()
    return 0


def _share_one_heap() -> None:
    """Else glibc gives each of a dozen threads a heap of its own, which keeps the most that it ever held: some MiB that
    look like a leak. They take turns for Python's lock anyway."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:  # musl has none
        mallopt(_M_ARENA_MAX, 1)
