"""Which memory mode fits? Arithmetic on bytes: it measures nothing, moves nothing, and knows no device.

A rung is a mode (where the weights lie while they are not used) and a tile (how the VAE decodes). What leaves every bit
as it is comes first: modes are tried before tiles, and of the modes those that only move weights before fp8. The last
one is exact, too, but so slow that it comes last.

The formulas count the tensors that live at the peak. For SDXL at full size they were counted (every storage that the
UNet and the VAE's decoder make, attention as one fused call): 5,050 values for each latent pixel, which is 15.8 times
the UNet's first channels (320), and 768 for each pixel, which is 3 times the VAE's second (256); the same at 512x512,
1024x1024 and 2048x2048. The margins are for the libraries' work spaces. What was measured replaces what was estimated.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from imagend.job import Frozen

MAX_RETRIES = 3
"""After so many rungs more a picture is given up."""
LARGEST_TILE = 512
SMALLEST_TILE = 32
FACTOR = 8
"""Pixels to a latent pixel, in width and in height."""
_VALUES_PER_LATENT_PIXEL = 16  # times the UNet's first channels
_VALUES_OF_CONTROL = 6  # the same, of what a ControlNet hands to the UNet; of several, the sum and the last one's
_VALUES_PER_PIXEL = 3  # times the VAE's second channels
_MARGIN = 1.25
_WORKSPACE = 64 << 20
_MORE = 1.1
"""A rung that failed is tried again when so much more is available: what others take comes and goes."""


UPSCALER_TILES = (512, 256, 128)
"""Pixels a side of what an upscaling network is given at once: the first where memory is plenty."""
OVERLAP = 32
"""Pixels by which such tiles overlap; a third of the smallest at most, so that no three do."""
_TENSORS_OF_UPSCALER = 4
"""of the network's width and its result's size, which live at its peak"""


class Mode(enum.StrEnum):
    """Where the weights are; each needs less of the device than the one before, and more time."""

    RESIDENT = "resident"
    """all on the device"""
    MODEL_OFFLOAD = "model_offload"
    """of text encoders, UNet and VAE only the one that runs"""
    GROUP_OFFLOAD = "group_offload"
    """of the UNet only the layer that runs, the next one on its way"""
    FP8 = "fp8"
    """the same, and the UNet's weights stored in 8 bits (float8_e4m3fn): half the bytes, other pixels"""
    SEQUENTIAL = "sequential"
    """of everything only the layer that runs"""


STREAMED = (Mode.GROUP_OFFLOAD, Mode.FP8)


class Stage(enum.StrEnum):
    """When memory may run out; `Context.progress` says the same words."""

    LOADING = "model_loading"
    ENCODING = "encoding"
    PAINTING = "painting"
    DECODING = "decoding"


class Rung(NamedTuple):
    """A way to paint: a mode, and the side (pixels) of the tiles that the VAE decodes, None for the whole picture."""

    mode: Mode = Mode.RESIDENT
    vae_tile: int | None = None

    @property
    def exact(self) -> bool:
        """Whether it gives the bits that the first rung gives."""
        return self.mode is not Mode.FP8 and self.vae_tile is None

    def __str__(self) -> str:
        return self.mode.value + (f", VAE in tiles of {self.vae_tile}" if self.vae_tile else "")


class Work(Frozen):
    """What is to be painted, and with what. Bytes are those of the dtypes in use, LoRAs included."""

    width: int
    height: int
    batch: int
    """pictures that the UNet sees at once: 2 with guidance, 1 without"""
    text_encoder_bytes: tuple[int, ...]
    unet_bytes: int
    controlnet_bytes: int = 0
    """of all of them"""
    controlnets: int = 0
    vae_bytes: int
    layer_bytes: int
    """of the largest single layer"""
    unet_channels: int
    """block_out_channels[0]"""
    unet_itemsize: int
    vae_channels: int
    """block_out_channels[1]"""
    vae_itemsize: int

    @property
    def weights(self) -> int:
        return sum(self.text_encoder_bytes) + self.unet_bytes + self.controlnet_bytes + self.vae_bytes


Label = Annotated[str, Field(max_length=64)]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]


class Experience(Frozen):
    """What was seen of one kind of work on one device. Labels are those of `label`."""

    model: str = Field(max_length=256)
    peaks: dict[Label, Bytes] = Field(default_factory=dict, max_length=64)
    """the most that was in use"""
    estimates: dict[Label, Bytes] = Field(default_factory=dict, max_length=64)
    """what the formulas said of the same"""
    failed: dict[Label, Bytes] = Field(default_factory=dict, max_length=64)
    """what was available when it did not suffice"""


def label(stage: Stage, rung: Rung) -> str:
    """`mode/stage`, with the tile where it matters. Modes that bring the whole VAE alone decode alike."""
    mode = Mode.MODEL_OFFLOAD if stage is Stage.DECODING and rung.mode in STREAMED else rung.mode
    tile = f"/{rung.vae_tile}" if stage is Stage.DECODING and rung.vae_tile else ""
    return f"{mode.value}/{stage.value}{tile}"


def tiles(width: int, height: int) -> tuple[int, ...]:
    """The sides of tiles to try: the largest power of 2 below the picture's longer side and at most 512, and half."""
    largest = min(LARGEST_TILE, 1 << (max(width, height) - 1).bit_length() - 1)
    return tuple(tile for tile in (largest, largest // 2) if tile >= SMALLEST_TILE)


def estimate(stage: Stage, rung: Rung, work: Work) -> int:
    """Bytes of the device that a stage needs on a rung."""
    return _held(stage, rung.mode, work) + round(_MARGIN * _activations(stage, rung, work)) + _WORKSPACE


def _activations(stage: Stage, rung: Rung, work: Work) -> int:
    pixels = work.width * work.height
    match stage:
        case Stage.PAINTING:
            latent_pixels = pixels // FACTOR**2
            values = _VALUES_PER_LATENT_PIXEL + _VALUES_OF_CONTROL * min(2, work.controlnets)
            return values * work.unet_channels * work.batch * latent_pixels * work.unet_itemsize
        case Stage.DECODING:
            tile = min(pixels, rung.vae_tile**2) if rung.vae_tile else pixels
            whole = 2 * 3 * pixels if rung.vae_tile else 0  # the tiles as decoded, and put together
            return (_VALUES_PER_PIXEL * work.vae_channels * tile + whole) * work.vae_itemsize
        case _:
            return 0


def _held(stage: Stage, mode: Mode, work: Work) -> int:
    """Bytes of the weights that are on the device at once."""
    if mode is Mode.RESIDENT:
        return work.weights
    if mode is Mode.SEQUENTIAL:
        return work.layer_bytes
    match stage:
        case Stage.PAINTING if mode is Mode.GROUP_OFFLOAD:
            return 2 * work.layer_bytes
        case Stage.PAINTING if mode is Mode.FP8:  # two in 8 bits, and the one that runs
            return 2 * work.layer_bytes // work.unet_itemsize + work.layer_bytes
        case Stage.PAINTING:
            return work.unet_bytes + work.controlnet_bytes
        case Stage.DECODING:
            return work.vae_bytes
        case _:
            return max(work.text_encoder_bytes, default=0)


_STAGES = tuple(Stage)


def need(rung: Rung, work: Work, experience: Experience | None = None, correction: float = 1.0) -> int:
    """Bytes of the device that a rung needs: by measurement where there is one, else by formula times `correction`."""
    needs = []
    for stage in _STAGES:
        name = label(stage, rung)
        known = experience.peaks.get(name) if experience else None
        most = known if known is not None else round(estimate(stage, rung, work) * correction)
        failed = experience.failed.get(name, 0) if experience else 0
        needs.append(max(most, round(failed * _MORE)))
    return max(needs)


def correction(experiences: Iterable[Experience]) -> float:
    """By what the formulas are to be multiplied, as measured at other sizes: at least 0.5, at most 2."""
    ratios = [
        peak / seen.estimates[name]
        for seen in experiences
        for name, peak in seen.peaks.items()
        if seen.estimates.get(name)
    ]
    return min(2.0, max(0.5, max(ratios, default=1.0)))


def plan(
    work: Work, available: int, modes: Sequence[Mode], experience: Experience | None = None, factor: float = 1.0
) -> Rung:
    """The first rung that fits into the available bytes; the one that needs least if none does."""
    sides = (None, *tiles(work.width, work.height))
    rungs = [Rung(mode, tile) for tile in sides for mode in modes if mode is not Mode.SEQUENTIAL]
    rungs += [Rung(mode, tile) for tile in sides for mode in modes if mode is Mode.SEQUENTIAL]
    needs = {rung: need(rung, work, experience, factor) for rung in rungs}
    fitting = (rung for rung in rungs if needs[rung] <= available)
    return next(fitting, min(rungs, key=needs.__getitem__))


def climb(rung: Rung, stage: Stage, work: Work | None, modes: Sequence[Mode]) -> Rung | None:
    """The rung to try after one on which memory ran out at a stage; None if there is none.

    Decoding is alone on the device in every mode but the first, so that it then takes smaller tiles.
    """
    later = modes[modes.index(rung.mode) + 1 :]
    if stage is not Stage.DECODING:
        return rung._replace(mode=later[0]) if later else None
    if rung.mode is Mode.RESIDENT and later:
        return rung._replace(mode=later[0])
    smaller = [tile for tile in (tiles(work.width, work.height) if work else ()) if tile < (rung.vae_tile or math.inf)]
    return rung._replace(vae_tile=smaller[0]) if smaller else None


def largest_size(work: Work, available: int, modes: Sequence[Mode], factor: float = 1.0) -> tuple[int, int] | None:
    """The largest smaller width and height of the same shape (multiples of 64) that should fit on some rung, if any."""
    for side in range(max(work.width, work.height) // 64 - 1, 0, -1):
        scale = side * 64 / max(work.width, work.height)
        width, height = (max(64, int(length * scale) // 64 * 64) for length in (work.width, work.height))
        smaller = work.model_copy(update={"width": width, "height": height})
        if need(plan(smaller, available, modes, None, factor), smaller, None, factor) <= available:
            return width, height
    return None


def learned(experience: Experience, seen: Mapping[str, Any]) -> Experience:
    """Experience with what one attempt has seen added; the newest word on a label counts."""
    return experience.model_copy(
        update={name: getattr(experience, name) | seen.get(name, {}) for name in ("peaks", "estimates", "failed")}
    )


def upscaler_tile(width: int, height: int, channels: int, scale: int, available: int) -> int:
    """The largest tile for which there should be room, else the smallest."""
    for tile in UPSCALER_TILES:
        pixels = min(tile, width) * min(tile, height) * scale**2
        if round(_MARGIN * _TENSORS_OF_UPSCALER * pixels * channels * 4) + _WORKSPACE <= available:
            return tile
    return UPSCALER_TILES[-1]
