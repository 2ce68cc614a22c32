"""imagend schema: the JSON Schema of job files, or of status.json."""

from __future__ import annotations

import argparse
import json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "of", nargs="?", choices=("job", "status"), default="job", help="job files (default), status.json"
    )
    parser.epilog = "Editors that know JSON Schema complete and check job files with it."


def run(arguments: argparse.Namespace) -> int:
    if arguments.of == "status":
        from imagend.status import schema_of_status as schema
    else:
        from imagend.job_schema import schema_of_job_file as schema

    print(json.dumps(schema(), indent=2))
    return 0
