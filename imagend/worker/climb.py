"""How a job climbs the memory ladder: from the rung that is planned for it, one higher each time memory runs out.

A shortage while a picture is decoded climbs for the decoding only; the picture is not painted again. After MAX_RETRIES
rungs, or where none is left, the job fails with OutOfMemory. The next job is planned anew, with what was seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from imagend.errors import OutOfMemory
from imagend.generate_spec import Generate
from imagend.memory_plan import (
    MAX_RETRIES,
    STREAMED,
    Experience,
    Rung,
    Stage,
    Work,
    climb,
    correction,
    estimate,
    label,
    largest_size,
    learned,
    plan,
)
from imagend.model_names import wanted
from imagend.worker.ladder import Ladder
from imagend.worker.memory import can_stream, tiled
from imagend.worker.shortage import Catch, clean_up

if TYPE_CHECKING:
    from imagend.worker.main import Context

T = TypeVar("T")
WORN = "memory was so short that cuDNN took other algorithms, and would keep to them"
_NOTABLE = 1.02
"""A peak is told of when it exceeds the known one by so much: two runs differ by a few bytes."""


class Climb:
    """One job's way up. Tells in `context.memory` what it did."""

    def __init__(self, spec: Generate, context: Context, free_caches: Callable[[], object]) -> None:
        self._spec, self._context, self._free_caches = spec, context, free_caches
        self._ladder: Ladder = context.pipelines.ladder
        self._ladder.recall(context.known.memory)
        self._modes = self._ladder.modes
        self._rung: Rung | None = None
        self._work: Work | None = None
        self._stage = Stage.LOADING
        self._key = ""
        self._factor = 1.0
        self._known = Experience(model=wanted(str(spec.model)).name)
        self._news: dict[str, dict[str, int]] = {"peaks": {}, "estimates": {}, "failed": {}}
        self._retries: list[dict[str, Any]] = []
        self._counts: Counter[bool] = Counter()
        self._freed = False
        self._swallowed = self._ladder.gauge.swallowed()

    @property
    def rung(self) -> Rung:
        return self._rung or Rung()

    @property
    def exact(self) -> bool:
        """Whether what is painted now has the bits that it has where memory is plenty."""
        return self.rung.exact and not self._swallowed

    def over(self, attempt: Callable[[], T]) -> T:
        """Attempt it, each time one rung higher, until it succeeds. Raises OutOfMemory."""
        while True:
            self._stage = Stage.LOADING
            with Catch() as caught:
                return attempt()
            self._next(caught)

    def place(self, pipe: Any, identity: str) -> None:
        """Plan, at the first attempt, and bring the pipeline into the rung's mode. `identity`: all its weights."""
        spec = self._spec
        assert spec.width is not None
        assert spec.height is not None
        assert spec.guidance_scale is not None
        batch = 2 if spec.guidance_scale > 1 else 1
        anatomy = self._ladder.placement.anatomy(pipe)
        self._work = Work(width=spec.width, height=spec.height, batch=batch, **anatomy)
        self._modes = self._ladder.modes
        if not set(STREAMED).isdisjoint(self._modes) and not can_stream(pipe):
            self._modes = tuple(mode for mode in self._modes if mode not in STREAMED)
        if not self._key:
            self._look_up(identity, self._work)
        if self._rung is None:
            available = self._ladder.gauge.available(self._work.weights)
            self._rung = plan(self._work, available, self._modes, self._known, self._factor)
            self._context.memory["available_bytes"] = available
        elif self._rung.mode not in self._modes:  # climbed before the pipeline was known
            self._rung = self._rung._replace(mode=self._modes[-1])
        self._ladder.placement.apply(pipe, self._rung.mode)
        self._tell()

    def decode(self, pipe: Any, decode: Callable[[], T]) -> T:
        """Use the VAE (to decode, or to encode, which takes less), each time one rung higher, until it succeeds.

        Raises OutOfMemory.
        """
        self._stage = Stage.DECODING
        while True:
            with Catch() as caught:
                self._ladder.placement.apply(pipe, self.rung.mode)
                with self.during(Stage.DECODING), tiled(pipe.vae, self.rung.vae_tile):
                    return decode()
            self._next(caught)

    def found(self, exact: bool) -> None:
        """A picture is there already, from an earlier attempt."""
        self._context.memory["exact"] = self._context.memory.get("exact", True) and exact

    @contextmanager
    def during(self, stage: Stage) -> Iterator[None]:
        """A stage: it is where memory may run out, and what it needs is measured."""
        self._stage = stage
        held = self._work.weights if self._work else 0
        self._ladder.gauge.start()
        yield
        self._saw(label(stage, self.rung), self._ladder.gauge.peak(held))
        if self._ladder.gauge.swallowed() > self._swallowed:
            self._failed()
        self._tell()

    def _look_up(self, identity: str, work: Work) -> None:
        gauge, seen = self._ladder.gauge, self._ladder.seen
        device = f"{gauge.name}|{gauge.total_bytes >> 20}"
        extras = f"{work.unet_itemsize}:{work.vae_itemsize}|{work.weights >> 20}|{work.batch}"
        of_the_same = f"{device}|{identity[:16]}|{extras}|"
        self._key = f"{of_the_same}{work.width}x{work.height}"
        self._known = seen.get(self._key, self._known)
        self._factor = correction(found for key, found in seen.items() if key.startswith(of_the_same))

    def _saw(self, name: str, peak: int) -> None:
        if self._work is not None:
            self._context.memory["peak_bytes"] = max(self._context.memory.get("peak_bytes", 0), peak)
            estimated = estimate(self._stage, self.rung, self._work)
            if self._ladder.gauge.device.type == "cpu":  # there a peak may be too little, but not too much
                peak = max(peak, estimated)
            if peak > _NOTABLE * max(self._known.peaks.get(name, 0), self._news["peaks"].get(name, 0)):
                self._news["peaks"][name], self._news["estimates"][name] = peak, estimated

    def _failed(self) -> None:
        """The rung did not suffice, or only with other bits."""
        gauge, name = self._ladder.gauge, label(self._stage, self.rung)
        self._news["failed"][name] = gauge.available(self._work.weights if self._work else 0)
        self._swallowed = gauge.swallowed()
        if self._swallowed and name not in self._known.failed:  # else a small card would cost a worker each job
            self._context.worn = WORN

    def _next(self, caught: Catch) -> None:
        """Memory ran out: note it, clean up, climb. Raises OutOfMemory."""
        gauge, failed = self._ladder.gauge, self.rung
        gauge.told += caught.counted
        self._failed()
        clean_up(gauge.device)
        decoding = self._stage is Stage.DECODING
        self._counts[decoding] += 1
        following = None
        if self._counts[decoding] <= MAX_RETRIES:
            following = climb(failed, self._stage, self._work, self._modes)
            if following is None and not self._freed:  # no other way to paint: the same once more, with all to itself
                following = failed
        self._freed = True
        self._free_caches()
        self._retries.append({"stage": self._stage.value, "rung": str(failed), "said": caught.said})
        self._context.short_of_memory(self._stage.value, str(failed), str(following) if following else None)
        self._rung = following or failed
        self._tell()
        if following is None:
            raise OutOfMemory(gauge.device, self._spec.width, self._spec.height, self._tried(), self._advice())

    def _tried(self) -> str:
        return "; ".join(dict.fromkeys(str(retry["rung"]) for retry in self._retries))

    def _advice(self) -> str:
        if self._work is not None:
            available = self._ladder.gauge.available(self._work.weights)
            if size := largest_size(self._work, available, self._modes, self._factor):
                return f"The largest size of this shape that should fit is {size[0]}x{size[1]}"
        return "Free memory on the device, or use another one: no smaller size of this shape is expected to fit"

    def _tell(self) -> None:
        memory = self._context.memory
        memory |= {"mode": self.rung.mode.value, "vae_tile": self.rung.vae_tile, "retries": self._retries}
        memory["exact"] = memory.get("exact", True) and self.exact
        if self._key and any(self._news.values()):
            experience = learned(self._known, self._news)
            memory["seen"] = {"key": self._key, **experience.model_dump()}
            self._ladder.learn(self._key, experience)
