"""How a job ends: its manifest is published; then that is made durable and the job's file put away, in groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog

from imagend import jobfile, signing
from imagend.daemon import sent_along
from imagend.daemon.health import Health
from imagend.daemon.slots import Running
from imagend.errors import DiskLost, MissingOutput, Rejected
from imagend.generate_spec import Generate
from imagend.job import Job, Kind, Outcome, Ref, Spec
from imagend.manifest import Artifact, ItemEnd, Manifest
from imagend.messages import Ended, Envelope, Failure
from imagend.outputs import Outputs
from imagend.spool import Spool

log = structlog.get_logger()

_PUBLISHED = (Outcome.SUCCEEDED, Outcome.PARTIAL)
"""With pictures."""
_INSTALLING = (Kind.FETCH, Kind.TRAIN)


def load(spool: Spool, ref: Ref) -> Job:
    """Read back an accepted job; the place is trusted, the signature was checked at the door. Raises Rejected."""
    body, _ = signing.split(spool.read(ref))
    job = jobfile.parse(ref.client, body)
    assert isinstance(job, Job)  # only jobs are queued
    return job


def load_whole(spool: Spool, ref: Ref) -> Job:
    """The same, with the items of the table that it names. Raises Rejected, JobFailed."""
    return sent_along.whole(load(spool, ref), spool.attachments)


class Ending:
    def __init__(self, spool: Spool, outputs: Outputs, health: Health, wall: Callable[[], datetime]) -> None:
        self.spool, self.outputs, self.health, self.wall = spool, outputs, health, wall
        self._untidied: dict[Ref, str] = {}
        self._announced: set[Ref] = set()

    def claim(self, ref: Ref) -> int:
        """Spool.claim(), and in the same commit the results that are to be shown next."""
        try:
            attempt = self.spool.claim(ref, self.outputs.unsynced())
        except OSError:
            self.outputs.synced(well=False)
            raise
        self.outputs.synced(well=True)
        return attempt

    def end(
        self,
        ref: Ref,
        outcome: Outcome,
        running: Running | None = None,
        ended: Ended | None = None,
        failure: Failure | None = None,
    ) -> None:
        """End a job for good. `running` and `ended` tell of the attempt that ended it, if there was one.

        May be repeated after an OSError.
        """
        kept = self._keep(ref, outcome, running)
        self.outputs.publish(ref, manifest := self._manifest(ref, outcome, running, ended, failure, kept))
        self.finish(ref, manifest)

    def _keep(self, ref: Ref, outcome: Outcome, running: Running | None) -> tuple[Artifact, ...]:
        """What a job that did not succeed publishes: the pictures of a chain's first step if a later one failed, and
        else nothing."""
        if running and running.made and outcome is Outcome.FAILED:
            try:
                if not self.outputs.ended(ref):
                    there = [plan for i, plan in enumerate(running.spec.planned) if i not in running.withheld]
                    self.outputs.seal(ref, running.made, there, running.spec.chain_steps[:1])
                return running.made
            except (MissingOutput, DiskLost) as error:
                log.error("what was made before is not kept", job=str(ref), why=str(error))
                running.made = ()
        self.outputs.empty_draft(ref)
        return ()

    def succeed(self, running: Running, ended: Ended) -> Callable[[], None]:
        """End a job that was painted, in two halves: the disk has time between them. Returns the second."""
        ref = running.job.ref
        manifest = self._manifest(ref, ended.outcome, running, ended, None, ended.artifacts)
        self.outputs.begin(ref, manifest)
        return partial(self._complete, ref, manifest)

    def _complete(self, ref: Ref, manifest: Manifest) -> None:
        self.outputs.complete(ref)
        self.finish(ref, manifest)

    def finish(self, ref: Ref, manifest: Manifest) -> None:
        """Tell the operator; the world is told, and the job's file put away, by tidy()."""
        self._untidied[ref] = manifest.outcome
        self.health.ended(manifest)
        code = manifest.error["code"] if manifest.error else None
        if manifest.error:
            self.health.failed(manifest.error["code"], f"outputs/{ref.client}/{ref.id}/manifest.json says why", ref.id)
        log.info("ended", job=str(ref), outcome=manifest.outcome.value, code=code)

    def finish_again(self, ref: Ref) -> None:
        """After a crash between publish and finish: have done what is missing of finish."""
        self._untidied[ref] = str(self.outputs.manifest(ref).get("outcome"))
        if self.outputs.announced(ref):
            self._announced.add(ref)
        else:
            self.health.events.ended_before(ref, self._untidied[ref])

    @property
    def untidied(self) -> int:
        """How many jobs have ended whose files are yet to be put away."""
        return len(self._untidied)

    def is_tidied(self, ref: Ref) -> bool:
        """Whether nothing is yet to be written of a job that has ended."""
        return ref not in self._untidied

    def tidy(self) -> None:
        """Announce what has ended and put the jobs' files away: together, because each fsync costs as much as a job.

        May be repeated after an OSError.
        """
        self.outputs.confirm()
        self.health.tidy()
        self.outputs.announce([ref for ref in self._untidied if ref not in self._announced])
        self._announced.update(self._untidied)
        self.spool.finish(self._untidied)
        self._untidied.clear()
        self._announced.clear()

    def _manifest(
        self,
        ref: Ref,
        outcome: Outcome,
        running: Running | None,
        ended: Ended | None,
        failure: Failure | None,
        artifacts: tuple[Artifact, ...],
    ) -> Manifest:
        accepted = running.accepted_at if running else accepted_at(self.spool, ref)
        try:
            job = running.job if running else load(self.spool, ref)
            spec = (running.spec if running else job.spec).model_dump(mode="json")
            told: dict[str, Any] = {
                "kind": job.kind,
                "label": job.header.label,
                "issued_at": job.header.issued_at,
                "spec": spec,
            }
        except Rejected:  # an older imagend took it in; this one cannot read it
            told = {"kind": "unknown", "issued_at": accepted, "spec": {}}
        return Manifest(
            schema="imagend.manifest/v1",
            id=ref.id,
            client=ref.client,
            outcome=outcome,
            accepted_at=accepted,
            started_at=running.started_at if running else None,
            ended_at=self.wall(),
            attempts=running.attempt if running else self.spool.attempts(ref),
            artifacts=artifacts,
            route=running.route if running else None,
            items=_items(running.spec, outcome, ended.failed) if running and ended else None,
            timings=ended.timings if ended else {},
            engine=ended.engine if ended else None,
            loading=ended.loading if ended else None,
            memory=ended.memory if ended else None,
            safety=ended.safety if ended else None,
            installed=ended.installed if ended and told["kind"] in _INSTALLING else None,
            not_installed=ended.not_installed if ended and told["kind"] == Kind.TRAIN else None,
            error=failure.error.model_dump() if failure else None,
            **told,
        )


def _items(spec: Spec, outcome: Outcome, failed: Mapping[str, Envelope]) -> tuple[ItemEnd, ...] | None:
    """How each item of a set ended; None of a job that is no set, and where there was no end to them."""
    if not isinstance(spec, Generate) or not spec.items:
        return None
    if outcome not in _PUBLISHED and failed.keys() != {item.name for item in spec.items}:
        return None
    return tuple(
        ItemEnd(name=name, outcome="failed" if error else "succeeded", error=error.model_dump() if error else None)
        for name, error in ((item.name, failed.get(item.name)) for item in spec.items)
    )


def accepted_at(spool: Spool, ref: Ref) -> datetime:
    return datetime.fromtimestamp(spool.accepted(ref) / 1e9, UTC)
