"""python tests/lab/audit.py CONFIG: what stands on a daemon's disk, as one JSON object; run where the disk is."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from imagend import config as configuration


def audit(config: configuration.Config) -> dict[str, Any]:
    """`published`: by client/id, the seeds and the digests of the pictures that lie there, as the manifest has them."""
    published = {}
    for path in config.outputs.glob("[!.]*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        pictures = {artifact["seed"]: _digest(path.parent / artifact["file"]) for artifact in manifest["artifacts"]}
        told = {artifact["seed"]: artifact["sha256"] for artifact in manifest["artifacts"]}
        assert pictures == told, path
        published[f"{path.parent.parent.name}/{path.parent.name}"] = {
            "outcome": manifest["outcome"],
            "pictures": pictures,
            "accepted_at": manifest["accepted_at"],
        }
    feed = config.outputs / "results.jsonl"
    lines = [json.loads(line) for line in feed.read_text().splitlines()] if feed.exists() else []
    return {
        "published": published,
        "feed": sorted(f"{line['client']}/{line['id']}" for line in lines),
        "inbox": [str(path) for inbox in config.inboxes for path in _files(inbox)],
        "rejected": sorted(path.name for inbox in config.inboxes for path in _files(inbox.parent / "rejected")),
        "queue": [str(path) for state in ("pending", "active") for path in _files(config.spool / state)],
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(audit(configuration.load(Path(sys.argv[1])))))
