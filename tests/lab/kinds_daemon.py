"""python tests/lab/kinds_daemon.py serve --config F: `imagend` itself, except that `serve` starts the workers of
tests/kinds; with /etc/imagend/real in place, its own."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from imagend.__main__ import main
from imagend.daemon import local

COMMAND = (sys.executable, str(Path(__file__).parents[1] / "kinds"))

if __name__ == "__main__":
    if not Path("/etc/imagend/real").exists():
        local.LocalExecutor = functools.partial(local.LocalExecutor, command=COMMAND)  # type: ignore[assignment, misc]
    main()
