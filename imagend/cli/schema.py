"""imagend schema: the JSON Schema of job files."""

from __future__ import annotations

import argparse
import json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Editors that know JSON Schema complete and check job files with it."


def run(arguments: argparse.Namespace) -> int:
    from imagend.job_schema import schema_of_job_file

    print(json.dumps(schema_of_job_file(), indent=2))
    return 0
