"""Where an edit paints and at which size: whatever mask and picture, it fits the picture, the model and the mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from imagend.worker.frame import Frame, fitted, frame

SIDES = st.integers(256, 2048)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (1024, 1024, (1024, 1024)),
        (256, 256, (1024, 1024)),
        (2048, 2048, (1024, 1024)),
        (1920, 1080, (1368, 768)),
        (800, 1200, (840, 1256)),
        (2048, 256, (2048, 256)),
    ],
)
def test_a_size_has_the_models_area_and_the_pictures_shape(width: int, height: int, size: tuple[int, int]) -> None:
    assert fitted(width, height, 1024) == size


@given(SIDES, SIDES)
def test_any_picture_fits(width: int, height: int) -> None:
    wide, high = fitted(width, height, 1024)
    assert wide % 8 == high % 8 == 0
    assert min(wide, high) >= 64
    assert max(wide, high) <= 2048
    assert wide * high <= 1.04 * 1024**2
    assert abs(wide / high * height / width - 1) < 0.04
    if max(wide, high) < 2040:
        assert wide * high >= 0.96 * 1024**2


@given(SIDES, SIDES, st.data())
@settings(deadline=None, max_examples=50)
def test_the_surroundings_of_any_mask_hold_it_and_lie_in_the_picture(
    width: int, height: int, data: st.DataObject
) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    padding = data.draw(st.integers(0, 512))
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    where = frame(mask, 1024, padding)
    x0, y0, x1, y1 = where.box
    assert 0 <= x0 <= max(0, left - padding)
    assert 0 <= y0 <= max(0, top - padding)
    assert min(width, right + padding) <= x1 <= width
    assert min(height, bottom + padding) <= y1 <= height
    assert x1 - x0 >= min((y1 - y0) // 2, width)
    assert y1 - y0 >= min((x1 - x0) // 2, height)
    assert (where.width, where.height) == fitted(x1 - x0, y1 - y0, 1024)


def test_a_long_crop_is_widened_around_its_middle_and_moved_off_the_border() -> None:
    mask = Image.new("L", (400, 400))
    ImageDraw.Draw(mask).rectangle((0, 100, 9, 299), fill=255)
    assert frame(mask, 1024, 0).box == (0, 100, 100, 300)
    mask = Image.new("L", (400, 400))
    ImageDraw.Draw(mask).rectangle((200, 100, 209, 299), fill=255)
    assert frame(mask, 1024, 0).box == (155, 100, 255, 300)


def test_without_padding_it_is_the_whole_picture() -> None:
    mask = Image.new("L", (300, 200))
    mask.putpixel((150, 100), 255)
    assert frame(mask, 128, None) == Frame((0, 0, 300, 200), *fitted(300, 200, 128))


def test_of_the_thinnest_mask_some_cell_is_painted() -> None:
    mask = Image.new("L", (2048, 2048))
    mask.putpixel((1001, 1501), 255)
    found = np.asarray(frame(mask, 1024, None).cells(mask))
    assert found.shape == (1024, 1024)
    assert set(np.unique(found)) == {0, 255}
    ys, xs = np.nonzero(found)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (496, 503, 744, 751)


def test_what_is_cut_and_put_back_at_its_own_size_is_itself() -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (128, 128, 3), np.uint8))
    whole = Frame((0, 0, 128, 128), 128, 128)
    mask = Image.fromarray(np.random.default_rng(2).integers(0, 256, (128, 128), np.uint8))
    assert whole.put_back(whole.cut(picture), picture, mask).tobytes() == picture.tobytes()
