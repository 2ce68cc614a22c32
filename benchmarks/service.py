"""`imagend serve` with the null painter in the workers' place: python -m benchmarks.service CONFIG [busy]

Loop, doors, threads and signals are those of the command; only the worker processes are not there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.queue import NullPainter
from imagend.cli import serve
from imagend.daemon import local
from imagend.daemon.executor import Mailbox


def main() -> int:
    config, busy = Path(sys.argv[1]), sys.argv[2:] == ["busy"]

    def painter(_slots: object, _models: object, mailbox: Mailbox, *_: object, **__: object) -> NullPainter:
        return NullPainter(mailbox, busy)

    vars(local)["LocalExecutor"] = painter
    return serve.run(argparse.Namespace(config=config))


if __name__ == "__main__":
    sys.exit(main())
