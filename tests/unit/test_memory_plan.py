"""The planner of memory modes, as tables. The numbers of SDXL at full size are counted, not measured."""

from __future__ import annotations

import pytest

from imagend.memory_plan import (
    Experience,
    Mode,
    Rung,
    Stage,
    Work,
    climb,
    correction,
    estimate,
    label,
    largest_size,
    learned,
    need,
    plan,
    tiles,
)

GIB = 1 << 30
MODES = tuple(Mode)
SDXL = Work(
    width=1024,
    height=1024,
    batch=2,
    text_encoder_bytes=(246_000_000, 1_390_000_000),
    unet_bytes=5_135_000_000,
    vae_bytes=335_000_000,
    layer_bytes=58_985_000,
    unet_channels=320,
    unet_itemsize=2,
    vae_channels=256,
    vae_itemsize=4,
)
"""In fp16, its VAE in fp32."""
LARGE = SDXL.model_copy(update={"width": 2048, "height": 2048})


def seen(**fields: dict[str, int]) -> Experience:
    return Experience(model="sdxl", **fields)


CONTROLLED = SDXL.model_copy(update={"controlnet_bytes": 2_502_000_000, "controlnets": 1})


@pytest.mark.parametrize(
    ("work", "available_gib", "rung"),
    [
        (SDXL, 24, Rung()),
        (SDXL, 16, Rung()),
        (SDXL, 11, Rung()),
        (SDXL, 10, Rung(Mode.MODEL_OFFLOAD)),
        (SDXL, 6, Rung(Mode.MODEL_OFFLOAD)),
        (SDXL, 5, Rung(Mode.GROUP_OFFLOAD)),
        (SDXL, 4, Rung(Mode.GROUP_OFFLOAD, 512)),
        (SDXL, 1.3, Rung(Mode.SEQUENTIAL, 512)),
        (SDXL, 0.1, Rung(Mode.SEQUENTIAL, 256)),  # hopeless: what needs least
        (LARGE, 24, Rung()),
        (LARGE, 16, Rung(Mode.MODEL_OFFLOAD)),
        (LARGE, 11, Rung(Mode.RESIDENT, 512)),
        (LARGE, 8, Rung(Mode.MODEL_OFFLOAD, 512)),
    ],
)
def test_the_first_rung_that_fits(work: Work, available_gib: float, rung: Rung) -> None:
    assert plan(work, int(available_gib * GIB), MODES) == rung


def test_a_device_that_cannot_offload_tiles_instead() -> None:
    assert plan(SDXL, 16 * GIB, (Mode.RESIDENT,)) == Rung()
    assert plan(SDXL, 8 * GIB, (Mode.RESIDENT,)) == Rung(Mode.RESIDENT, 512)


@pytest.mark.parametrize("work", [SDXL, LARGE])
def test_each_rung_needs_less_than_the_one_before(work: Work) -> None:
    for tile in (None, 512, 256):
        needs = [need(Rung(mode, tile), work) for mode in MODES]
        assert needs == sorted(needs, reverse=True)
    for mode in MODES:
        decoding = [estimate(Stage.DECODING, Rung(mode, tile), work) for tile in (None, 512, 256)]
        assert decoding == sorted(set(decoding), reverse=True)
        assert estimate(Stage.PAINTING, Rung(mode), work) > estimate(
            Stage.PAINTING, Rung(mode), work.model_copy(update={"batch": 1})
        )


def test_only_fp8_and_tiles_change_bits() -> None:
    assert {mode for mode in Mode if not Rung(mode).exact} == {Mode.FP8}
    assert not Rung(Mode.RESIDENT, 512).exact


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((1024, 1024), (512, 256)),
        ((512, 512), (256, 128)),
        ((520, 64), (512, 256)),
        ((2048, 2048), (512, 256)),
        ((128, 128), (64, 32)),
        ((64, 64), (32,)),
    ],
)
def test_tiles_are_smaller_than_the_picture(size: tuple[int, int], sides: tuple[int, ...]) -> None:
    assert tiles(*size) == sides


# What was seen


def test_a_measured_peak_replaces_the_estimate() -> None:
    peaks = {label(stage, Rung()): 9 * GIB for stage in Stage}
    assert plan(SDXL, 10 * GIB, MODES, seen(peaks=peaks)) == Rung()
    peaks[label(Stage.DECODING, Rung())] = 12 * GIB
    assert plan(SDXL, 11 * GIB, MODES, seen(peaks=peaks)) == Rung(Mode.MODEL_OFFLOAD)


def test_what_failed_needs_more_than_there_was() -> None:
    failed = seen(failed={label(Stage.PAINTING, Rung()): 16 * GIB})
    assert plan(SDXL, 16 * GIB, MODES, failed) == Rung(Mode.MODEL_OFFLOAD)
    assert plan(SDXL, 17 * GIB, MODES, failed) == Rung(Mode.MODEL_OFFLOAD)
    assert plan(SDXL, 18 * GIB, MODES, failed) == Rung()
    peaks = {label(stage, Rung()): GIB for stage in Stage}  # what was in use need not be all that was taken
    assert plan(SDXL, 16 * GIB, MODES, failed.model_copy(update={"peaks": peaks})) == Rung(Mode.MODEL_OFFLOAD)


def test_a_failed_tile_leaves_the_smaller_one() -> None:
    failed = {label(Stage.DECODING, Rung(mode, tile)): 24 * GIB for mode in Mode for tile in (None, 512)}
    assert plan(SDXL, 24 * GIB, MODES, seen(failed=failed)) == Rung(Mode.RESIDENT, 256)


def test_a_tile_does_not_matter_to_the_unet() -> None:
    assert label(Stage.PAINTING, Rung(Mode.FP8, 512)) == label(Stage.PAINTING, Rung(Mode.FP8)) == "fp8/painting"
    assert label(Stage.DECODING, Rung(Mode.FP8, 512)) == "model_offload/decoding/512"


def test_other_sizes_correct_the_formulas_within_bounds() -> None:
    name = label(Stage.PAINTING, Rung())
    assert correction([]) == 1.0
    assert (
        correction([seen(peaks={name: 120}, estimates={name: 100}), seen(peaks={name: 90}, estimates={name: 100})])
        == 1.2
    )
    assert correction([seen(peaks={name: 900}, estimates={name: 100})]) == 2.0
    assert correction([seen(peaks={name: 1}, estimates={name: 100})]) == 0.5
    assert correction([seen(peaks={name: 100})]) == correction([seen(peaks={name: 100}, estimates={name: 0})]) == 1.0
    assert plan(SDXL, 11 * GIB, MODES, None, 1.2) == Rung(Mode.MODEL_OFFLOAD)


def test_the_newest_word_on_a_label_counts() -> None:
    old = seen(peaks={"a": 1, "b": 2}, failed={"a": 5})
    assert learned(old, {"peaks": {"b": 3, "c": 4}}) == seen(peaks={"a": 1, "b": 3, "c": 4}, failed={"a": 5})


# The ladder


def test_painting_climbs_through_the_modes_and_keeps_its_tile() -> None:
    rung: Rung | None = Rung(Mode.RESIDENT, 512)
    path = []
    while rung := climb(rung, Stage.PAINTING, SDXL, MODES):
        path.append(rung)
    assert path == [Rung(mode, 512) for mode in MODES[1:]]


def test_decoding_first_has_the_device_to_itself_then_takes_smaller_tiles() -> None:
    assert climb(Rung(), Stage.DECODING, SDXL, MODES) == Rung(Mode.MODEL_OFFLOAD)
    assert climb(Rung(Mode.MODEL_OFFLOAD), Stage.DECODING, SDXL, MODES) == Rung(Mode.MODEL_OFFLOAD, 512)
    assert climb(Rung(Mode.MODEL_OFFLOAD, 512), Stage.DECODING, SDXL, MODES) == Rung(Mode.MODEL_OFFLOAD, 256)
    assert climb(Rung(Mode.MODEL_OFFLOAD, 256), Stage.DECODING, SDXL, MODES) is None
    assert climb(Rung(), Stage.DECODING, SDXL, (Mode.RESIDENT,)) == Rung(Mode.RESIDENT, 512)


def test_where_nothing_is_left_the_climb_ends() -> None:
    assert climb(Rung(Mode.SEQUENTIAL), Stage.PAINTING, SDXL, MODES) is None
    assert climb(Rung(), Stage.PAINTING, SDXL, (Mode.RESIDENT,)) is None
    assert climb(Rung(), Stage.LOADING, None, MODES) == Rung(Mode.MODEL_OFFLOAD)


def test_the_largest_size_has_the_same_shape_and_fits() -> None:
    wide = LARGE.model_copy(update={"height": 1024})
    size = largest_size(wide, 7 * GIB, (Mode.RESIDENT,))
    assert size == (1280, 640)
    for (width, height), fits in (size, True), ((1344, 640), False):
        work = wide.model_copy(update={"width": width, "height": height})
        assert (need(plan(work, 7 * GIB, (Mode.RESIDENT,)), work) <= 7 * GIB) is fits
    assert largest_size(wide, GIB, (Mode.RESIDENT,)) is None
    assert largest_size(SDXL, 100 * GIB, MODES) == (960, 960)  # this size has just failed


@pytest.mark.parametrize(
    ("mode", "more"),
    [
        (Mode.RESIDENT, 2_502_000_000),
        (Mode.MODEL_OFFLOAD, 2_502_000_000),
        (Mode.GROUP_OFFLOAD, 0),
        (Mode.SEQUENTIAL, 0),
    ],
)
def test_a_controlnet_counts_where_it_lies_on_the_device_while_painting(mode: Mode, more: int) -> None:
    with_it, without = (estimate(Stage.PAINTING, Rung(mode), work) for work in (CONTROLLED, SDXL))
    values = round(1.25 * 6 * 320 * 2 * 128 * 128 * 2)  # what it hands to the UNet
    assert with_it - without == pytest.approx(more + values, abs=2)
