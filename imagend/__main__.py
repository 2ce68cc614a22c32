"""python -m imagend, and the `imagend` command."""

from __future__ import annotations

import os
import sys

from imagend.cli import run


def main() -> None:
    os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"  # to look for some takes longer than most commands
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
