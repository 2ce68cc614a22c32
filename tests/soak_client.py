"""A client of the soak, in a process of its own: python tests/soak_client.py ROOT NAME COUNT SEED.

It signs and drops jobs as fast as they are taken, changes its key when it is told to, sends some jobs twice and wishes
some away. What it did stands in ROOT/clients/NAME/ledger.json.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from imagend.signing import Key, job_id, seal

BACKLOG = 20
"""It waits while so many of its jobs are in the inbox or the queue."""
CANCELS, REPEATS = 0.05, 0.02


class Client:
    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        self.folder = root / "clients" / name
        self.inbox = root / "spool" / "inbox" / name
        self.pending = root / "spool" / "pending" / name
        self.rejected = root / "spool" / "rejected" / name

    def key(self, generation: int) -> Key:
        path = self.folder / f"key.{generation}"
        return Key.load(path.read_bytes(), path)

    def body(self, **fields: Any) -> bytes:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return json.dumps({"schema": "imagend.job/v1", "issued_at": now, **fields}).encode()

    def drop(self, file: str, body: bytes, key: Key) -> str:
        """Another name first, then a rename; the job's id."""
        temporary = self.inbox / f".{file}"
        temporary.write_bytes(seal(body, key.sign(body)))
        temporary.rename(self.inbox / file)
        return job_id(self.name, body)

    def generation(self) -> int:
        """Which key to sign with, as the operator told."""
        return int((self.folder / "generation").read_text())

    def backlog(self) -> int:
        return sum(1 for folder in (self.inbox, self.pending) if folder.exists() for _ in folder.iterdir())


def jobs(client: Client, count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Drop `count` jobs; what was done, job by job."""
    generation, key, recent = -1, Key.generate(), list[str]()
    for number in range(count):
        if number % 10 == 0:
            while client.backlog() > BACKLOG:
                time.sleep(0.02)
        if generation != client.generation():
            generation = client.generation()
            key = client.key(generation)
            (client.folder / "signs-with").write_text(str(generation))  # no older key from here on
        options = {"num_inference_steps": 1, "seed": number, "priority": rng.randrange(10)}
        body = client.body(kind="generate", prompt="nothing", nonce=str(number), **options)
        file = f"{generation}-{number:07d}"
        ref = client.drop(f"{file}.json", body, key)
        recent = [*recent[-49:], ref]
        yield {"id": ref, "seed": number}
        if rng.random() < REPEATS:
            client.drop(f"{file}-again.json", body, key)
        if rng.random() < CANCELS:
            unwanted = rng.choice(recent)
            client.drop(f"{file}-cancel.json", client.body(kind="cancel", job=unwanted, nonce=str(number)), key)
            yield {"id": unwanted, "cancelled": True}


def main(root: Path, name: str, count: int, seed: str) -> None:
    client = Client(root, name)
    ledger: dict[str, dict[str, Any]] = {}
    for entry in jobs(client, count, random.Random(f"{seed}/{name}")):
        ledger[entry["id"]] = ledger.get(entry["id"], {}) | entry
    (client.folder / "ledger.json").write_text(json.dumps(list(ledger.values())))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
