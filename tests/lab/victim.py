"""python tests/lab/victim.py [--never-sync] serve --config F: `imagend` whose workers paint as tests/kinds does.

With --never-sync no fsync reaches the kernel: a test of the tests, which must then find that jobs are lost.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from imagend.__main__ import main
from imagend.daemon import local

NEVER_SYNC = "--never-sync"
COMMAND = (sys.executable, str(Path(__file__).parents[1] / "kinds"))

if __name__ == "__main__":
    if NEVER_SYNC in sys.argv:
        sys.argv.remove(NEVER_SYNC)
        os.fsync = os.fdatasync = lambda fd: None  # type: ignore[assignment]
    local.LocalExecutor = functools.partial(local.LocalExecutor, command=COMMAND)  # type: ignore[assignment, misc]
    main()
