"""Send jobs from any host that sees the inbox and the outputs: one file, nothing but Python 3.8 and ssh-keygen.

Copy this file, or `from imagend.client import Client` where imagend is installed:

    from client import Client

    farm = Client("alice", inbox="/mnt/farm/inbox", outputs="/mnt/farm/outputs", key="~/.ssh/id_ed25519")
    job = farm.submit("generate", prompt="a red circle on a blue background", count=4)
    for picture in job.wait(timeout=600).pictures:
        picture.save("pictures/")  # checked against its digest

Fields are those of docs/job.md. Any number of threads may use one Client.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable

NAMESPACE = "imagend-job@v1"
POLL_S = 0.5


class JobError(Exception):
    """A job that did not succeed. `code` and the message say why, as in docs/errors.md.

    `document` is its manifest or, of what was not even a job, its .reason.json.
    """

    def __init__(self, outcome: str, document: dict[str, Any]) -> None:
        error = document.get("error") or {}
        self.outcome, self.code, self.document = outcome, str(error.get("code", "")), document
        why = error.get("message") or ", ".join(_failed(document))
        super().__init__(f"{outcome}: {why or 'no reason is told'}")


class Failed(JobError):
    """We tried, and it cannot be done."""


class Rejected(JobError):
    """It was not even a job, or not allowed."""


class Cancelled(JobError):
    """Somebody had it cancelled."""


class Partial(JobError):
    """A set of which some items failed, or a job of which some pictures are withheld. `result` has the others, `failed`
    says why, by item or by number."""

    def __init__(self, result: Result) -> None:
        super().__init__("partial", result.manifest)
        self.result, self.failed = result, _failed(result.manifest)


class Client:
    """A client of one farm, who signs with one key.

    `inbox` and `outputs` are folders as this host sees them. `key` is a private key of OpenSSH's, or the public one of
    a key that ssh-agent holds; its public half stands in the farm's allowed_signers, after `name`.
    """

    def __init__(self, name: str, inbox: str | Path, outputs: str | Path, key: str | Path) -> None:
        self.name, self.key = name, Path(key).expanduser()
        self.inbox, self.outputs = Path(inbox).expanduser(), Path(outputs).expanduser()

    def submit(self, kind: str, **fields: Any) -> Job:
        """Sign a job and drop it. Raises OSError where the inbox cannot be written to, RuntimeError unsigned.

        What is wrong with the job itself is told by Job.wait(): the farm reads it, not we.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        header = {"schema": "imagend.job/v1", "kind": kind, "issued_at": now, "nonce": secrets.token_hex(8)}
        body = json.dumps({**header, **fields}, ensure_ascii=False).encode()
        signature = self._sign(body)
        job = self.job(hashlib.sha256(self.name.encode() + b"\0" + body).hexdigest()[:20])
        _put(self._drop_box() / f"{job.id}.json", body[:-1] + b',"signature":"' + signature + b'"}')
        return job

    def attach(self, path: str | Path) -> str:
        """Send a picture along, and return the name for it that a job's `image` takes. Before the job that needs it."""
        raw = Path(path).read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        folder = self._drop_box() / "files"
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            folder.chmod(folder.parent.stat().st_mode & 0o7777)  # who may drop jobs may drop pictures
        _put(folder / digest, raw)
        return f"sha256:{digest}"

    def job(self, id: str) -> Job:
        """A job of ours that was submitted earlier, by its id."""
        return Job(self, id)

    def _drop_box(self) -> Path:
        own = self.inbox / self.name
        return own if own.is_dir() else self.inbox

    def _sign(self, body: bytes) -> bytes:
        command = ["ssh-keygen", "-q", "-Y", "sign", "-n", NAMESPACE, "-f", str(self.key)]
        done = subprocess.run(command, input=body, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode:
            raise RuntimeError(
                f"ssh-keygen cannot sign with {self.key}: {done.stderr.decode(errors='replace').strip()}"
            )
        return b"".join(done.stdout.split(b"\n")[1:-2])


class Job:
    """A job that was submitted. Its `id` is all that must be kept to find it again."""

    def __init__(self, client: Client, id: str) -> None:
        self.client, self.id = client, id
        self.folder = client.outputs / client.name / id

    def state(self) -> dict[str, Any]:
        """Where it is, with a `state`: queued (queue_position, estimated_wait_seconds), running (stage, step, steps),
        unknown (still in the inbox, or none of this farm), or how it ended, and then the manifest's fields too."""
        if manifest := _read(self.folder / "manifest.json"):
            return {**manifest, "state": manifest.get("outcome", "failed")}
        if told := _read(self.folder.with_name(f"{self.id}.state.json")):
            return told
        if reason := self._rejected():
            return {**reason, "state": "rejected"}
        return {"state": "unknown"}

    def wait(self, timeout: float | None = None, progress: Callable[[dict[str, Any]], None] | None = None) -> Result:
        """Its result, once it has succeeded. `progress` is called with each new state().

        Raises Failed, Partial, Rejected, Cancelled, and TimeoutError after `timeout` seconds; the job goes on then.
        """
        end = None if timeout is None else time.monotonic() + timeout
        last: dict[str, Any] = {}
        while True:
            state = self.state()
            if progress and state != last:
                progress(state)
            last, word = state, state["state"]
            if word == "succeeded":
                return Result(self.folder, state)
            if word == "partial":
                raise Partial(Result(self.folder, state))
            error = {"failed": Failed, "rejected": Rejected, "cancelled": Cancelled}.get(word)
            if error:
                raise error(word, state)
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"job {self.id} is {word} after {timeout:g} s; it goes on")
            time.sleep(POLL_S)

    def cancel(self) -> Job:
        """Ask for its end. The wish is a job, too, and may be rejected; wait() on this one says how it ended."""
        return self.client.submit("cancel", job=self.id)

    def _rejected(self) -> dict[str, Any]:
        box = self.client._drop_box()
        rejected = self.client.inbox.parent / "rejected" / box.relative_to(self.client.inbox)
        reasons = sorted(rejected.glob(f"{self.id}*.reason.json"), key=lambda path: path.stat().st_mtime)
        return _read(reasons[-1]) if reasons else {}


class Result:
    """What a job ended with. `manifest`: what was painted, how and with which models, down to their digests."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.pictures = [Picture(folder, artifact) for artifact in manifest["artifacts"]]

    def retrieved(self) -> None:
        """Say that you have what you need: the farm removes the result the sooner. Raises OSError where you may not."""
        (self.folder / "retrieved").touch()


class Picture:
    """A published PNG; of a training also other files, whose `role` tells what they are. Of a set, `item` is whose it
    is; its contact sheet has the `role` "contact_sheet"."""

    def __init__(self, folder: Path, artifact: dict[str, Any]) -> None:
        self.job, self.name, self.path = folder.name, artifact["file"], folder / artifact["file"]
        self.seed, self.sha256 = artifact.get("seed"), artifact["sha256"]
        self.item, self.role = artifact.get("item"), artifact.get("role")

    def read(self) -> bytes:
        """Its bytes. Raises ValueError if they are not those that the manifest tells of."""
        data: bytes = self.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(f"{self.path}: its SHA-256 is not {self.sha256}, as its manifest says")
        return data

    def save(self, folder: str | Path) -> Path:
        """Copy it into a folder, as ID-NAME.png, and return where it is."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        target /= f"{self.job}-{self.name.replace('/', '-')}"
        target.write_bytes(self.read())
        return target


def _failed(manifest: dict[str, Any]) -> dict[str, Any]:
    """What went wrong with which items, and which pictures are withheld."""
    withheld = (manifest.get("safety") or {}).get("withheld", ())
    failed = {f"{one['index']:04d}": {"code": "WITHHELD", "message": one["label"]} for one in withheld}
    return failed | {one["name"]: one["error"] for one in manifest.get("items") or () if "error" in one}


def _put(path: Path, data: bytes) -> None:
    """Whole or not at all: under a name that the farm does not look at, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileNotFoundError):  # then it is done: an NFS server that restarted could not say so
        temporary.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
