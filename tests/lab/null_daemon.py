"""python tests/lab/null_daemon.py serve --config F: `imagend` itself, except that `serve` starts null workers.

Everything else (daemon, doors, watch, sockets, processes, exit statuses) is the product's own.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from imagend.__main__ import main
from imagend.daemon import local

COMMAND = (sys.executable, str(Path(__file__).parents[1] / "nullworker"))

if __name__ == "__main__":
    local.LocalExecutor = functools.partial(local.LocalExecutor, command=COMMAND)  # type: ignore[assignment, misc]
    main()
