"""What may change while the daemon runs: config.yaml (on SIGHUP) and allowed_signers (whenever it changes).

A broken file changes nothing: what was read before stays in force, and status.json says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog

from imagend.config import FIXED, Config
from imagend.daemon.health import Health
from imagend.daemon.intake import Policy
from imagend.errors import BadConfig, BadKeys
from imagend.signers import AllowedSigners

log = structlog.get_logger()

_Version = tuple[int, ...]


class Settings:
    """`policy` is the newest good pair of configuration and keys."""

    def __init__(self, config: Config, reload: Callable[[], Config], health: Health) -> None:
        self.policy = Policy(config, AllowedSigners.parse("", ""))
        self._reload, self._health = reload, health
        self._keys = KeyFile(config.allowed_signers)
        health.max_queued = config.max_queued

    @property
    def config(self) -> Config:
        return self.policy.config

    def reload(self) -> None:
        """Read config.yaml again and take over what can be changed without a restart."""
        self._health.reloading()
        try:
            fresh = self._reload()
        except BadConfig as error:
            self._health.trouble("config", str(error))
            return
        held = {key: getattr(self.config, key) for key in FIXED}
        waiting = [key for key in FIXED if getattr(fresh, key) != held[key]]
        late = f"config.yaml changes {', '.join(waiting)}: restart imagend to take that over"
        self._health.trouble("config", late if waiting else None)
        self.policy = Policy(fresh.model_copy(update=held), self.policy.signers)
        self._health.max_queued = self.config.max_queued
        if self._keys.path != self.config.allowed_signers:
            self._keys = KeyFile(self.config.allowed_signers)
        log.info("configuration read again")

    def read_keys(self) -> None:
        """At start there is no older table to keep: raises BadKeys."""
        if (signers := self._keys.changed()) is not None:
            self.policy = Policy(self.config, signers)

    def reread_keys(self) -> None:
        """Take over a changed allowed_signers; costs one stat() when it has not changed."""
        try:
            signers = self._keys.changed()
        except BadKeys as error:
            self._health.trouble("keys", str(error))
            return
        if signers is not None:
            self._health.trouble("keys", None)
            self.policy = Policy(self.config, signers)
            log.info("keys read", count=len(signers))


class KeyFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._version: _Version | None = None

    def changed(self) -> AllowedSigners | None:
        """The table, if the file is another than last time. Raises BadKeys, once for each broken version of it."""
        try:
            status = self.path.stat()
            version: _Version = (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        except OSError as error:
            version = (error.errno or 0,)
        if version == self._version:
            return None
        self._version = version
        try:
            return AllowedSigners.parse(self.path.read_bytes().decode(), str(self.path))
        except FileNotFoundError:
            raise BadKeys(self.path, "there is no such file; `imagend init` writes one") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadKeys(self.path, str(error)) from None
