"""outputs/: where results lie. outputs/<client>/<id>/ exists if and only if the job has ended.

A worker paints into a draft, outputs/.drafts/<client>/<id>/, which outlives crashes: what is painted there stays.
Nothing but publish() moves a draft out. A client's folder is readable by us, and by its Unix group where it has one: a
draft is made with that group, which a rename keeps.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from imagend import files
from imagend.errors import DiskLost, MissingOutput
from imagend.fields import Planned
from imagend.job import Ref
from imagend.manifest import Artifact, Manifest

MANIFEST = "manifest.json"
STATE = ".state.json"
"""Ends the name of a file beside a job's result to be, that says where the job is."""
RESULTS = "results.jsonl"
REMOVED = "removed.jsonl"
TRASH = ".trash"
RETRIEVED = "retrieved"
"""A file in a result's folder. Newer than the manifest, it says that somebody has copied the result."""
DRAFTS = ".drafts"
MAX_PICTURE_BYTES = 64 << 20
"""Of the largest picture, 2048 x 2048, the samples alone have 12 MiB; whoever tells of more lies."""
MAX_LORA_BYTES = 2 << 30
"""Of the largest base, at the highest rank, a LoRA of all layers has a half of it."""
_LORAS = ("lora", "lora_kohya")
_TAIL_BYTES = 1 << 20
_MAX_RESULTS_BYTES, _OLD_RESULTS = 16 << 20, 4
"""That is more than 300,000 jobs."""
_MAX_REMOVED_BYTES = 4 << 20


class Outputs:
    def __init__(self, root: Path) -> None:
        self.root, self._drafts, self._trash = root, root / DRAFTS, root / TRASH
        self._groups: Mapping[str, str] = {}
        self._distrusted: set[Ref] = set()
        """The disk may have refused their bytes: what is sealed again is written anew."""
        self._begun: dict[Ref, list[Path]] = {}
        """What of it is yet to be synced."""
        self._published: set[Ref] = set()
        self._left: tuple[Path, ...] = ()
        """in the trash, since before we were"""

    def open(self) -> None:
        files.make_folder(self._drafts, 0o700)
        files.make_folder(self._trash, 0o700)

    def share(self, groups: Mapping[str, str]) -> list[str]:
        """From now on the results of these clients are their Unix groups' to read. Returns what cannot be done."""
        self._groups = groups
        wrong = []
        for client, group in groups.items():
            try:
                for base in (self.root, self._drafts):
                    _give(self._folder_of(client, base), group)
            except KeyError:
                wrong.append(f"clients.{client}.group: there is no group {group!r} here: make it (groupadd)")
            except OSError as error:
                todo = f"make imagend's user a member of {group} and restart imagend"
                wrong.append(f"{error.filename} cannot be given to the group {group}: {error.strerror}: {todo}")
        return wrong

    def _folder_of(self, client: str, base: Path) -> Path:
        folder = base / client
        if not folder.is_dir():
            files.make_folder(folder, 0o750)
            if client in self._groups:
                with contextlib.suppress(OSError, KeyError):  # share() has told
                    _give(folder, self._groups[client])
        return folder

    def draft(self, ref: Ref) -> Path:
        """The folder for a worker to write into; it may hold pictures of an earlier attempt."""
        folder = self._folder_of(ref.client, self._drafts) / ref.id
        try:
            folder.mkdir(0o750)
        except FileExistsError:
            if not stat.S_ISDIR(folder.lstat().st_mode):  # a worker's doing: we would sweep where the link leads
                folder.unlink()
                folder.mkdir(0o750)
        return folder

    def seal(
        self, ref: Ref, artifacts: Iterable[Artifact], planned: Sequence[Planned], steps: Sequence[str] = ()
    ) -> None:
        """check(), and drop all else."""
        artifacts = tuple(artifacts)
        self.check(ref, artifacts, planned, steps)
        folder = self.draft(ref)
        folders = {folder / step for step in steps}
        for stray in _all_below(folder) - folders - {folder / artifact.file for artifact in artifacts}:
            if stray.parent in {folder, *folders}:  # else it goes with its folder
                _discard(stray)

    def check(self, ref: Ref, artifacts: Sequence[Artifact], planned: Sequence[Planned], steps: Sequence[str]) -> None:
        """That what was planned is there as told, of a chain in each step's folder. Raises MissingOutput, DiskLost."""
        folder = self.draft(ref)
        places = [f"{step}/" for step in steps] or [""]
        plans = [plan._replace(file=f"{place}{plan.file}") for place in places for plan in planned]
        for told, plan in zip_longest((artifact.plan for artifact in artifacts), plans):
            if told != plan:
                raise MissingOutput(plan.file if plan else f"{len(plans):04d}.png")
        for artifact in artifacts:
            try:
                data = _checked(folder, artifact)
            except MissingOutput as missing:
                raise (DiskLost(artifact.file) if ref in self._distrusted else missing) from None
            if ref in self._distrusted:
                files.write(folder / artifact.file, data)

    def publish(self, ref: Ref, manifest: Manifest) -> None:
        """Show it, whole: all in it is durable. Once confirm() has returned, the job has ended for good.

        It may be repeated after an error.
        """
        self.begin(ref, manifest)
        self.complete(ref)

    def begin(self, ref: Ref, manifest: Manifest) -> None:
        """Write all. It becomes durable by complete(), or together with what is synced before (`unsynced`)."""
        if self.ended(ref):
            return
        folder = self.draft(ref)
        self._distrusted.add(ref)
        (folder / MANIFEST).unlink(missing_ok=True)
        self._let_mark(folder, ref.client)
        files.write_unsynced(folder / MANIFEST, manifest.model_dump_json(indent=2, exclude_none=True).encode() + b"\n")
        contents = sorted(path for path in _all_below(folder) if path.name != RETRIEVED)
        for path in [*contents, folder]:
            mode = path.stat().st_mode
            path.chmod(0o750 | stat.S_IMODE(mode) & stat.S_ISGID if stat.S_ISDIR(mode) else 0o640)
        self._begun[ref] = [*contents, folder]

    def _let_mark(self, folder: Path, client: str) -> None:
        """Who may read it may say that it was retrieved, and change nothing else: older than the manifest, it says
        nothing yet. Not synced: without it a result stays longer."""
        if client in self._groups:
            files.touch(folder / RETRIEVED, 0o660)
            (folder / RETRIEVED).chmod(0o660)

    def complete(self, ref: Ref) -> None:
        """Make durable what was begun, if it is not yet, and show it. What this refuses is to be begun anew."""
        target = self.root / ref.client / ref.id
        if not self.ended(ref):
            contents = self._begun.pop(ref, None)
            if contents is None:
                raise OSError(errno.EIO, "a sync for several failed", str(self.draft(ref)))
            files.sync_all(contents)
            if target.exists():  # not ours: whatever it is, it must neither stop us nor be lost
                files.move(target, target.with_name(f".{ref.id}.{time.time_ns()}"))
            self._folder_of(ref.client, self.root)
            files.rename(self.draft(ref), target)
        self._published.add(ref)

    def unsynced(self) -> list[Path]:
        """What was begun, for whoever syncs at this moment anyway; who must then say how it went."""
        return [path for paths in self._begun.values() for path in paths]

    def synced(self, well: bool) -> None:
        if well:
            self._begun = {ref: [] for ref in self._begun}
        else:  # whose bytes were lost is not known
            self._begun.clear()

    def confirm(self) -> None:
        """Make durable that what was published since is there: one sync for all of a client's."""
        files.sync_all({self.root / ref.client for ref in self._published})
        self._distrusted -= self._published
        self._published.clear()

    def empty_draft(self, ref: Ref) -> None:
        """Forget what was painted: a failed or cancelled job publishes no pictures."""
        for path in self.draft(ref).iterdir():
            _discard(path)

    def ended(self, ref: Ref) -> bool:
        return files.exists(f"{self.root}/{ref.client}/{ref.id}/{MANIFEST}")

    def manifest(self, ref: Ref) -> dict[str, Any]:
        """As it stands on disk: perhaps an older or a newer imagend wrote it."""
        manifest: dict[str, Any] = json.loads((self.root / ref.client / ref.id / MANIFEST).read_bytes())
        return manifest

    def show(self, ref: Ref, state: dict[str, Any]) -> None:
        """Tell where a job is that has not ended: a hint, not durable."""
        path = self._folder_of(ref.client, self.root) / f"{ref.id}{STATE}"
        files.replace_hint(path, json.dumps(state).encode() + b"\n", 0o640)

    def hide(self, ref: Ref) -> None:
        """Tell no more; what a crash left of it goes, too."""
        for name in (f"{ref.id}{STATE}", f".{ref.id}{STATE}.tmp"):
            (self.root / ref.client / name).unlink(missing_ok=True)

    def shown(self) -> set[Ref]:
        """The jobs of which something is told, or was to be told when the power went."""
        found = [*self.root.glob(f"[!.]*/*{STATE}"), *self.root.glob(f"[!.]*/.*{STATE}.tmp")]
        return {Ref(path.parent.name, path.name.lstrip(".").partition(".")[0]) for path in found}

    def announce(self, refs: Iterable[Ref]) -> None:
        """One line for each in results.jsonl, the feed that others follow with `tail -F`; durable.

        All clients may read it: it repeats nothing that a client wrote. Lines of a group stay in one file.
        """
        lines = "".join(f"{json.dumps(self._line(ref))}\n" for ref in refs)
        if lines:
            files.rotate(self.root / RESULTS, _MAX_RESULTS_BYTES, _OLD_RESULTS)
            files.append(self.root / RESULTS, lines.encode())

    def _line(self, ref: Ref) -> dict[str, Any]:
        manifest = self.manifest(ref)
        line: dict[str, Any] = {"id": ref.id, "client": ref.client}
        line |= {key: manifest.get(key) for key in ("kind", "outcome", "ended_at")}
        return line | {
            "manifest": f"{ref.client}/{ref.id}/{MANIFEST}",
            "files": [None if "item" in one else one["file"] for one in manifest.get("artifacts", ())],
            "code": (manifest.get("error") or {}).get("code"),
        }

    def announced(self, ref: Ref) -> bool:
        """Whether a crash came after announce(): the line, if any, is among the last of the feed, which may have been
        rotated since."""
        line = self._line(ref)
        for name in (RESULTS, f"{RESULTS}.1"):
            with contextlib.suppress(FileNotFoundError), (self.root / name).open("rb") as feed:
                feed.seek(max(0, feed.seek(0, os.SEEK_END) - _TAIL_BYTES))
                if any(_object(told) == line for told in feed):
                    return True
        return False

    # What goes: the loop takes it away in one step, and a thread removes what it was

    def tell_removed(self, told: Sequence[Mapping[str, Any]]) -> None:
        """In removed.jsonl, for whoever looks for a result that has gone; of it, only that it was there and how it
        ended. Not durable."""
        path = self.root / REMOVED
        files.rotate(path, _MAX_REMOVED_BYTES, kept=1)
        files.append(path, "".join(f"{json.dumps(one)}\n" for one in told).encode(), durable=False)

    def retire(self, ref: Ref) -> Path | None:
        """From this rename on, there is no result. Returns what is left to be removed by discard()."""
        target = self._trash / f"{ref.client}.{ref.id}.{time.time_ns()}"
        try:
            files.rename(self.root / ref.client / ref.id, target)
        except FileNotFoundError:
            return None
        return target

    def discard(self, retired: Iterable[tuple[Ref, Path]]) -> None:
        """Remove what was retired. First that becomes durable, or a power cut could show a result that is half gone."""
        retired = tuple(retired)
        files.sync_all([self._trash, *{self.root / ref.client for ref, _ in retired}])
        for _, path in retired:
            if path.exists():  # else it went before an error
                _discard(path)

    def discard_the_rest(self) -> None:
        """What a dead process retired. Nothing that was retired since: its rename may not be durable yet."""
        for path in self._left:
            _discard(path)

    def withdraw(self, ref: Ref) -> None:
        """Take a result away, for good and durably; nothing if there is none."""
        if (path := self.retire(ref)) is not None:
            self.discard([(ref, path)])
        self.hide(ref)

    def settle(self) -> None:
        """Make durable what a dead process may have published, announced or retired without living to sync it."""
        files.settle(self.root)
        files.end_line(self.root / RESULTS)
        self._left = tuple(self._trash.iterdir())

    def sweep(self, alive: set[Ref]) -> None:
        """Remove the drafts of jobs that are neither queued nor running."""
        for folder in self._drafts.glob("*/*"):
            if Ref(folder.parent.name, folder.name) not in alive:
                _discard(folder)


def _give(folder: Path, group: str) -> None:
    """Readable for the group, and all that is made in it belongs to the group. Raises KeyError if there is none."""
    number = grp.getgrnam(group).gr_gid
    if folder.stat().st_gid != number:
        os.chown(folder, -1, number)
    folder.chmod(0o2750)


def _object(line: bytes) -> Any:
    """A line of the feed; None if a crash cut it."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _all_below(folder: Path) -> set[Path]:
    """What is in a folder, and in the folders in it; no link is followed, and nothing deeper looked at."""
    return {path for one in folder.iterdir() for path in (one, *(one.iterdir() if _is_folder(one) else ()))}


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _checked(folder: Path, artifact: Artifact) -> bytes:
    """The bytes of a file that is as it was told."""
    if not 0 <= artifact.size <= (MAX_LORA_BYTES if artifact.role in _LORAS else MAX_PICTURE_BYTES):
        raise MissingOutput(artifact.file)
    path = folder / artifact.file
    try:
        if not _is_folder(path.parent):  # a link leads elsewhere
            raise MissingOutput(artifact.file)
        data, status = files.read_untrusted(path, artifact.size)
    except (FileNotFoundError, PermissionError, files.NotOrdinary):
        raise MissingOutput(artifact.file) from None
    as_told = len(data) == artifact.size and hashlib.sha256(data).hexdigest() == artifact.sha256
    if not as_told or status.st_nlink != 1:  # by another name, it could be changed after it was published
        raise MissingOutput(artifact.file)
    return data


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
