"""From one base model to another, on one device: lifts what was there, loads or finds what is asked, and pours it in.

What was painted with lately stays in main memory, bounded in bytes; the least recently used goes first. On the CPU the
current weights are there anyway and are not counted; on a GPU a copy of them is, if there is one.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from imagend.errors import UnsupportedSetting, UnusableModel
from imagend.memory_plan import FACTOR, Mode
from imagend.models import Model, Models
from imagend.worker.bases import Loaded, StableDiffusionXLPipeline, load_base, load_vae
from imagend.worker.gauge import host_room
from imagend.worker.memory import Placement, is_hooked
from imagend.worker.part import Seat
from imagend.worker.shortage import clean_up

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Switch:
    """What is on the device, and what is kept beside it. `pipe` is of `base` and `vae`; None while there is none."""

    def __init__(
        self, models: Models, placement: Placement, limit_bytes: int, forgetting: Callable[[], None] = lambda: None
    ) -> None:
        """`forgetting` is called before the modules are let go: who holds on to them must do so, too."""
        self._models, self._placement, self._limit_bytes = models, placement, limit_bytes
        self._forgetting = forgetting
        self._seats: dict[str, Seat] = {}
        self._kept: OrderedDict[Model, Loaded] = OrderedDict()  # the current ones among them
        self.base: Loaded | None = None
        self.vae: Loaded | None = None
        self.pipe: Any = None

    def to(self, model: Model, vae: Model | None, dtype: torch.dtype, loading: Callable[[], None]) -> dict[str, Any]:
        """Bring a base with a VAE (None: its own) onto the device; says what was done, nothing where nothing was.

        `loading` is called before what takes time. Raises what load_base() does, UnsupportedSetting and UnusableModel;
        there is no `pipe` then, and what is kept is unharmed.
        """
        said: dict[str, Any] = {}
        if (wrong := self.trouble()) is not None:
            said["rebuilt"] = wrong
            self.forget()
        if self.pipe is not None and _is(self.base, model) and _is(self.vae, vae):
            return said
        loading()
        start, held = time.perf_counter(), self._held()
        said |= {"from": self.base.model.name if self.base else None, "to": model.name}
        self._placement.release()
        self.pipe = None
        self._lift(model)
        read = self._bring(model, vae, dtype)
        in_place = self._sit()
        self._trim()
        said |= {
            "vae": vae.name if vae else None,
            "in_place": in_place,
            "bytes_read": read,
            "kept_bytes": self._copied(),
        }
        if self._placement.device.type == "cuda":
            said |= {"vram_before": held, "vram_after": self._held()}
        return said | {"seconds": round(time.perf_counter() - start, 6)}

    def forget(self) -> None:
        """Let go of what is on the device: it is not to be trusted, nor to be kept."""
        self._placement.release()
        self._forgetting()
        for current in (self.base, self.vae):
            if current is not None:
                self._kept.pop(current.model, None)
        self._seats, self.base, self.vae, self.pipe = {}, None, None, None
        clean_up(self._placement.device)

    def shed(self) -> None:
        """Let go of all but what is current."""
        self._kept = OrderedDict((model, loaded) for model, loaded in self._kept.items() if self._is_current(loaded))

    def trouble(self) -> str | None:
        """What is wrong with the pipeline, if anything is: by samples of its weights, in a millisecond."""
        mode, device = self._placement.mode, self._placement.device
        for name, seat in self._seats.items() if self.pipe is not None else ():
            storage = _FLOAT8 if mode is Mode.FP8 and name == "unet" else ()
            if seat.filling is None or not seat.filling.is_intact(seat.frame, storage):
                return f"the weights of {name} are not those that were loaded"
            if mode is Mode.RESIDENT and any(one.device.type != device.type for one in seat.frame.tensors.values()):
                return f"{name} is not on {device}"
            if mode in (None, Mode.RESIDENT) and is_hooked(seat.frame.module):
                return f"{name} has hooks that nobody needs"
            if getattr(self.pipe, name) is not seat.frame.module:
                return f"{name} was exchanged"
        return None

    def _lift(self, model: Model) -> None:
        """Take the weights out of the seats, but for those of a base that stays."""
        stays = self.base if _is(self.base, model) else None
        for name, seat in self._seats.items():
            if stays is None or name == "vae":
                owner = next((one for one in self._kept.values() if seat.filling in one.parts.values()), None)
                seat.lift(keep=owner is not None and (owner is stays or owner.bytes <= self._limit_bytes))
        self.base, self.vae = stays, None
        whole = {key: one for key, one in self._kept.items() if one is stays or one.is_whole}
        self._kept = OrderedDict(whole)

    def _bring(self, model: Model, vae: Model | None, dtype: torch.dtype) -> int:
        """Find or load what is asked; the bytes that were read from disk."""
        read = 0
        found = self._find(model)
        self._trim(found)
        if found is None:
            self._make_room(model.size * (2 if dtype is torch.float32 else 1))
            found, read = load_base(model, self._models, dtype), model.size
        base = self.base = self._kept[model] = found
        if vae is None and "vae" not in base.parts:
            raise UnsupportedSetting(f"model: {model.name!r} comes without a VAE. Name one in `vae`")
        if vae is not None:
            if (found := self._find(vae)) is None:
                found, read = load_vae(vae, base, self._models, dtype), read + vae.size
            if 2 ** (len(found.parts["vae"].module.config.block_out_channels) - 1) != FACTOR:
                raise UnusableModel(
                    "VAE", vae.name, f"one that does not make {FACTOR} x {FACTOR} pixels of a latent one"
                )
            self.vae = self._kept[vae] = found
        return read

    def _sit(self) -> list[str]:
        """Everything into its place; says which modules stayed."""
        assert self.base is not None
        stayed = []
        for name, part in (self.base.parts | (self.vae.parts if self.vae else {})).items():
            if name not in self._seats:
                self._seats[name] = Seat(part)
            elif self._seats[name].take(part):
                stayed.append(name)
        modules = {name: seat.frame.module for name, seat in self._seats.items()}
        self.pipe = StableDiffusionXLPipeline(**self.base.rest, **modules, add_watermarker=False)
        self.pipe.set_progress_bar_config(disable=True)
        return stayed

    def _find(self, model: Model) -> Loaded | None:
        if model in self._kept:
            self._kept.move_to_end(model)
        return self._kept.get(model)

    def _make_room(self, needed: int) -> None:
        """Before a load; what is kept gives way."""
        while host_room() < needed and (old := self._oldest()) is not None:
            del self._kept[old]
            clean_up(self._placement.device)

    def _trim(self, wanted: Loaded | None = None) -> None:
        """Down to the limit, but for what is wanted; first copies of what is on the device, which can be made anew."""
        if self._copied(wanted) > self._limit_bytes:
            for seat in self._seats.values():
                if seat.filling is not None:
                    seat.filling.weights = None
        while self._copied(wanted) > self._limit_bytes and (old := self._oldest(wanted)) is not None:
            del self._kept[old]

    def _oldest(self, wanted: Loaded | None = None) -> Model | None:
        others = (key for key, one in self._kept.items() if one is not wanted and not self._is_current(one))
        return next(others, None)

    def _is_current(self, loaded: Loaded) -> bool:
        return loaded is self.base or loaded is self.vae

    def _copied(self, wanted: Loaded | None = None) -> int:
        """Bytes of weights that are in main memory for nothing but the next switch."""
        kept = (one for one in self._kept.values() if one is not wanted)
        return sum(part.bytes for one in kept for part in one.parts.values() if part.weights is not None)

    def _held(self) -> int:
        device = self._placement.device
        return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def _is(loaded: Loaded | None, model: Model | None) -> bool:
    return (loaded.model if loaded else None) == model
