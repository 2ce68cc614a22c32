"""Stand-ins that keep the real interfaces."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from imagend.daemon.executor import Died, Heard, Mailbox
from imagend.errors import PictureWithheld, UnsupportedSetting
from imagend.fields import Planned
from imagend.generate_spec import Generate
from imagend.job import Outcome
from imagend.manifest import Artifact, Safety, Withheld
from imagend.mask_spec import MakeMask
from imagend.messages import Cancel, Ended, Envelope, Failure, Made, Message, Progress, Ready, Run, Stop
from imagend.router import Route


class FakeExecutor:
    """Paints at once, in this process. The prompt says what shall happen: die, fail, worn (but painted), or stay
    (until cancelled); for a training its name does; of a chain's second step: upscaling dies, fails, stays, lies (about
    what the first has made). Items of a set whose names begin with `bad` fail. `unsafe`: where a filter is on, the
    first picture is withheld."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.runs: list[Run] = []
        self.held_mb: float | None = None

    def slots(self) -> Mapping[str, str]:
        return {"cpu0": "cpu"}

    def start(self, worker: str) -> None:
        self.mailbox.put(Heard(worker, Ready(device="cpu", versions={})))

    def kill(self, worker: str) -> None:
        self.mailbox.put(Died(worker, -9))

    def memory_mb(self, worker: str) -> float | None:
        return self.held_mb

    def send(self, worker: str, message: Message) -> None:
        match message:
            case Run():
                self.runs.append(message)
                self.attempt(worker, message)
            case Cancel(job=ref):
                self.mailbox.put(Heard(worker, Ended(job=ref, outcome=Outcome.CANCELLED)))
            case Stop():
                self.mailbox.put(Died(worker, 0))

    def attempt(self, worker: str, run: Run) -> None:
        match run.spec.get("prompt", run.spec.get("name")):
            case "die":
                self.mailbox.put(Died(worker, -11))
            case "fail":
                failure = Failure.of(UnsupportedSetting("no"))
                self.mailbox.put(Heard(worker, Ended(job=run.job, outcome=Outcome.FAILED, failure=failure)))
            case "stay":
                pass
            case prompt:
                seeds = run.spec.get("seeds", [None])
                failed: dict[str, Envelope] = {}
                if run.spec.get("items"):
                    artifacts, failed = self.items(run)
                elif run.spec.get("chain"):
                    artifacts = self.step(worker, run, "generate", 0.0, seeds)
                    told = artifacts[:-1] if prompt == "upscaling lies" else artifacts
                    self.mailbox.put(Heard(worker, Made(job=run.job, artifacts=told)))
                    artifacts += self.step(worker, run, "upscale", 0.5, seeds)
                elif run.kind == "mask":
                    planned = MakeMask.model_validate_json(json.dumps(run.spec)).planned
                    artifacts = tuple(paint(Path(run.folder), index, None, plan) for index, plan in enumerate(planned))
                else:
                    artifacts = tuple(paint(Path(run.folder), index, seed) for index, seed in enumerate(seeds))
                if prompt == "upscaling dies":
                    self.mailbox.put(Died(worker, -11))
                    return
                if prompt in ("upscaling fails", "upscaling lies"):
                    failure = Failure.of(UnsupportedSetting("no"))
                    self.mailbox.put(Heard(worker, Ended(job=run.job, outcome=Outcome.FAILED, failure=failure)))
                    return
                if prompt == "upscaling stays":
                    return
                safety = judged(run, artifacts)
                if safety and safety.withheld:
                    (Path(run.folder) / artifacts[0].file).unlink()
                    artifacts = artifacts[1:]
                    if not artifacts:
                        failure = Failure.of(PictureWithheld("picture 0"))
                        told = Ended(job=run.job, outcome=Outcome.FAILED, failure=failure, safety=safety)
                        self.mailbox.put(Heard(worker, told))
                        return
                lacking = failed or (safety and safety.withheld)
                outcome, failure = Outcome.PARTIAL if lacking else Outcome.SUCCEEDED, None
                if failed and not artifacts:
                    outcome, failure = Outcome.FAILED, Failure(error=next(iter(failed.values())))
                ended = Ended(
                    job=run.job, outcome=outcome, artifacts=artifacts, failed=failed, safety=safety, failure=failure
                )
                if run.otherwise:  # its CLIP has an opinion
                    path = "complex" if prompt == "una silla" else "simple"
                    route = Route(path=path, reason="CLIP", confidence=0.8)
                    ended = ended.model_copy(update={"route": route})
                worn = "it is tired" if run.spec.get("prompt") == "worn" else ""
                self.mailbox.put(Heard(worker, ended.model_copy(update={"worn": worn})))

    def items(self, run: Run) -> tuple[tuple[Artifact, ...], dict[str, Envelope]]:
        """What of a set is painted, and what failed; nothing is where all failed."""
        planned = Generate.model_validate_json(json.dumps(run.spec)).planned
        error = Failure.of(UnsupportedSetting("no")).error
        failed = {plan.item: error for plan in planned if plan.item and plan.item.startswith("bad")}
        if len(failed) == len(run.spec["items"]):
            return (), failed
        there = [(index, plan) for index, plan in enumerate(planned) if plan.item not in failed]
        return tuple(paint(Path(run.folder), index, plan.seed, plan) for index, plan in there), failed

    def step(self, worker: str, run: Run, name: str, done: float, seeds: Sequence[int | None]) -> tuple[Artifact, ...]:
        """A step of a chain, which is half of it."""
        folder = Path(run.folder) / name
        folder.mkdir(exist_ok=True)
        artifacts = []
        for index, seed in enumerate(seeds):
            told = {"stage": f"{name}-ing", "picture": index, "pictures": len(seeds), "steps": 1, "chain_step": name}
            for part in (0, 1):
                progress = done + (index + part) / len(seeds) / 2
                word = Progress(job=run.job, step=part, progress=progress, **told)  # type: ignore[arg-type]
                self.mailbox.put(Heard(worker, word))
            artifact = paint(folder, index, seed)
            artifacts.append(artifact.model_copy(update={"file": f"{name}/{artifact.file}"}))
        return tuple(artifacts)


def judged(run: Run, artifacts: Sequence[Artifact]) -> Safety | None:
    """What a filter says, where one is on."""
    if run.safety is None:
        return None
    first = artifacts[0]
    withheld = Withheld(label="nsfw", score=0.9, unsafe=True, index=0, seed=first.seed)
    blocked = run.safety.mode == "block" and run.spec["prompt"] == "unsafe"
    return Safety(
        mode=run.safety.mode,
        classifier="one",
        sha256="0" * 64,
        labels=("nsfw",),
        threshold=0.5,
        withheld=(withheld,) if blocked else (),
    )


def paint(folder: Path, index: int, seed: int | None, plan: Planned | None = None) -> Artifact:
    """A picture that is none, but is on disk and told of as a worker does."""
    plan = plan or Planned(f"{index:04d}.png", seed)
    data = f"picture of seed {seed}".encode()
    (folder / plan.file).write_bytes(data)
    return Artifact(
        index=index,
        file=plan.file,
        width=8,
        height=8,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=hashlib.sha256(data).hexdigest(),
        seed=seed,
        seconds=0.0,
        item=plan.item,
        role=plan.role,
    )
