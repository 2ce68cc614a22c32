"""One fetch from beginning to end: plan, download, judge, install with a record. What fails leaves nothing behind.

What is not yet whole lies in models/.fetch/, which is never listed; after a death or an interrupt it is gone on with.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from imagend import files, records, weights
from imagend.architecture import ModelKind
from imagend.config import Config
from imagend.errors import BrokenWeights, ConnectionLost, DownloadFailed, Interrupt, JobFailed, UsageError
from imagend.fetch import civitai, hugging_face
from imagend.fetch.download import Terms, download
from imagend.fetch.install import free_place, room_for_loras
from imagend.fetch.patience import patiently
from imagend.fetch.plan import Item, Plan, short, tame
from imagend.fetch.web import Web
from imagend.installing import install, taken
from imagend.model_folders import Found
from imagend.models import Model, Models, check_whole, digest
from imagend.recognise import identify
from imagend.record import Record
from imagend.sources import is_civitai, is_hugging_face

WORK = ".fetch"
STALE_S = 7 * 86_400.0
"""What was left unfinished for so long is deleted by the next fetch."""
GB = 10**9
POLL_S = 1.0
_FOLDERS = (
    *(ModelKind.VAE, ModelKind.CONTROLNET, ModelKind.CLIP_VISION),
    *(ModelKind.PREPROCESSOR, ModelKind.DETECTOR, ModelKind.SAFETY, ModelKind.CLIP),
)


class Busy(UsageError):
    """The same is being fetched already. Wait for its end."""


@dataclass(frozen=True)
class Wish:
    """What the user asked for."""

    source: str
    sha256: str | None = None
    kind: ModelKind | None = None
    name: str | None = None
    variant: str | None = None
    notes: str | None = None


@dataclass(frozen=True)
class Fetched:
    kind: ModelKind
    name: str
    path: Path
    files: dict[str, str]
    """SHA-256 of each file with weights, by its path in the model's folder"""
    record: Record

    @property
    def sha256(self) -> str:
        return digest(self.files)


class Fetcher:
    """`tell` is told which file comes, and of all files together how many bytes have come, of how many."""

    def __init__(
        self,
        config: Config,
        web: Web,
        by: str,
        now: Callable[[], datetime],
        tell: Callable[[str, int, int | None], None] = lambda *_: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config, self._web, self._by, self._now, self._tell, self._sleep = config, web, by, now, tell, sleep
        self._models = Models(config.models, config.extra_model_paths)
        self._work = config.models / WORK

    def fetch(self, wish: Wish) -> Fetched:
        """Raises DownloadFailed, UsageError."""
        return self.attempt(wish, last=lambda: True)

    def attempt(self, wish: Wish, last: Callable[[], bool], again: bool = False) -> Fetched:
        """One of several, perhaps: a lost connection keeps what has come, unless this is the `last`. With `again`, to
        find installed what is asked for is a success, too: an attempt may have died after its last step. While another
        fetches the same, it waits.

        Raises DownloadFailed, UsageError, ConnectionLost if it is not the last.
        """
        try:
            return self._attempt(wish, last, again)
        except ConnectionLost as error:
            if last():
                raise DownloadFailed(*error.args) from None
            raise

    def _attempt(self, wish: Wish, last: Callable[[], bool], again: bool) -> Fetched:
        plan = self._plan(wish)
        kind = wish.kind or plan.kind
        name = wish.name or plan.name
        key = hashlib.sha256(f"{plan.said.get('source')} {[item.sha256 for item in plan.items]}".encode()).hexdigest()
        folder = self._work / key[:20]
        while True:
            try:
                files.make_folder(self._work, 0o700)
                self._sweep(keep=folder)
                folder.mkdir(0o700, exist_ok=True)
                with _lock(folder):
                    try:
                        return self._get(plan, wish, kind, name, folder, again)
                    except (DownloadFailed, UsageError, OSError, Interrupt):
                        shutil.rmtree(folder, ignore_errors=True)
                        raise
                    except ConnectionLost:
                        if last():
                            shutil.rmtree(folder, ignore_errors=True)
                        raise
            except OSError as error:
                where = error.filename or self._config.models
                raise DownloadFailed(plan.host, f"the disk refused {where}: {error.strerror}") from None
            except Busy:
                if not again:
                    raise
            self._sleep(POLL_S)

    def _plan(self, wish: Wish) -> Plan:
        def json(url: str) -> dict[str, object]:
            return patiently(lambda: self._web.json(url), self._web.host_of(url), self._sleep)

        try:
            urlsplit(wish.source)
        except ValueError:
            raise DownloadFailed("that URL", "it is none") from None
        if is_civitai(wish.source):
            plan = civitai.plan(wish.source, json)
        elif is_hugging_face(wish.source):
            self._web.host_of(wish.source)
            plan = hugging_face.plan(wish.source, json, wish.variant)
        else:
            plan = self._plain(wish)
        if wish.sha256 is not None:
            if not plan.is_file:
                raise UsageError("--sha256 is of one file; those of a repository come from its commit. Leave it out.")
            (item,) = plan.items
            if item.sha256 not in (None, wish.sha256):
                raise DownloadFailed(
                    plan.host, f"it says that the file has the SHA-256 {item.sha256}, not {wish.sha256}"
                )
            plan = replace(plan, items=(replace(item, sha256=wish.sha256),))
        return plan

    def _installed(self, plan: Plan, kind: ModelKind | None, name: str) -> Fetched | None:
        """What the plan would bring, where it is in place already; what its record says is not taken on trust."""
        wanted = digest({item.path: str(item.sha256) for item in plan.items if item.is_weights})
        for one in [kind] if kind else ModelKind:
            for target in taken(self._config.models, one, name):
                with contextlib.suppress(JobFailed, ValueError, OSError):
                    record = records.read(target)
                    if record is None or record.sha256 != wanted or record.kind is not one:
                        continue
                    model = self._judge(target, one, name, target.is_file())
                    if digest(found := self._models.digests(model)) == wanted:
                        return Fetched(one, name, target, found, record)
        return None

    def _plain(self, wish: Wish) -> Plan:
        """A file of any host that is allowed: what it is, only the user can say."""
        host = self._web.host_of(wish.source)
        if wish.sha256 is None:
            raise UsageError(f"Give the file's SHA-256 (--sha256), which {host} does not tell in a known way.")
        path = urlsplit(wish.source).path
        if not path.endswith((".safetensors", ".sft")):
            raise DownloadFailed(host, "only .safetensors files are fetched")
        public = wish.source.partition("?")[0]  # what follows may be a signature
        name = tame(path)
        return Plan(
            host, name, (Item(wish.source, f"{name}.safetensors", wish.sha256),), said={"source": short(public)}
        )

    def _get(self, plan: Plan, wish: Wish, kind: ModelKind | None, name: str, folder: Path, again: bool) -> Fetched:
        if again and (there := self._installed(plan, kind, name)):
            shutil.rmtree(folder, ignore_errors=True)
            return there
        if kind is not None:
            free_place(self._config.models, kind, name, plan.is_file)
        settings = self._config.fetch
        limit = int((settings.max_lora_gb if kind is ModelKind.LORA else settings.max_model_gb) * GB)
        if kind is ModelKind.LORA:
            room_for_loras(self._config.models, plan.size or 0, settings.lora_store_gb, plan.host)
        if (plan.size or 0) > limit:
            raise DownloadFailed(
                plan.host, f"it has {plan.size} bytes, and at most {limit} may come (fetch in config.yaml)"
            )
        tree = folder / "tree"
        found, came = {}, 0
        for item in plan.items:
            path = tree / item.path
            terms = Terms(limit - came, self._config.reserve_mb << 20, self._teller(plan, came), self._sleep)
            sha256 = download(self._web, item, path, terms)
            came += path.stat().st_size
            if item.is_weights:
                found[item.path] = sha256
        place = tree / plan.items[0].path if plan.is_file else tree
        try:
            kind = self._kind(place, plan, wish.kind, name)
            model = self._judge(place, kind, name, plan.is_file)
        except JobFailed as error:
            raise DownloadFailed(plan.host, f"what came is of no use: {error}") from None
        if kind is ModelKind.LORA:
            limit = int(settings.max_lora_gb * GB)
            room_for_loras(self._config.models, model.size, settings.lora_store_gb, plan.host)
            if model.size > limit:
                raise DownloadFailed(plan.host, f"it is a LoRA of {model.size} bytes, and max_lora_gb allows {limit}")
        told = {"sha256": digest(found), "size": model.size, "fetched_by": self._by, "fetched_at": self._now()}
        record = Record.model_validate(
            {"kind": kind, "notes": wish.notes, "schema": "imagend.model/v1"} | plan.said | told
        )
        with _lock(self._work, wait=True):
            target = free_place(self._config.models, kind, name, plan.is_file)
            install(place, target, record)
        shutil.rmtree(folder, ignore_errors=True)
        return Fetched(kind, name, target, {target.name: digest(found)} if plan.is_file else found, record)

    def _teller(self, plan: Plan, before: int) -> Callable[[str, int, int | None], None]:
        """For one of the plan's files."""
        return lambda path, size, total: self._tell(path, before + size, total if plan.is_file else plan.size)

    def _kind(self, place: Path, plan: Plan, asked: ModelKind | None, name: str) -> ModelKind:
        """By its tensors, or its configuration. Raises JobFailed."""
        if asked is not None:
            return asked
        if not plan.is_file:
            return plan.kind or self._kind_of_folder(place, name)
        try:
            found = identify(weights.read_header(place, place.name))
        except ValueError as error:
            raise BrokenWeights(place.name, f"it is {error}") from None
        if found is None:
            raise BrokenWeights(place.name, "its tensors do not tell what it is: say so with --kind")
        return found.kind

    def _kind_of_folder(self, place: Path, name: str) -> ModelKind:
        failed: JobFailed = BrokenWeights(name, "it is no model")
        for kind in _FOLDERS:
            try:
                return self._models.judge(Found(name, place, is_file=False), kind).kind
            except JobFailed as error:
                failed = error
        raise failed

    def _judge(self, place: Path, kind: ModelKind, name: str, is_file: bool) -> Model:
        """As every model is judged before it is used. Raises JobFailed."""
        model = self._models.judge(Found(name, place, is_file), kind)
        check_whole(model)
        self._models.check(model)
        return model

    def _sweep(self, keep: Path) -> None:
        for old in self._work.iterdir():
            with contextlib.suppress(OSError, Busy):
                if old != keep and old.is_dir() and time.time() - old.stat().st_mtime > STALE_S:
                    with _lock(old):
                        shutil.rmtree(old)


@contextmanager
def _lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Against another fetch of the same; the kernel lets it go when we die. Raises Busy, OSError."""
    try:
        fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:  # another has just ended, and taken it away
        raise Busy from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy from None
        yield
    finally:
        os.close(fd)
