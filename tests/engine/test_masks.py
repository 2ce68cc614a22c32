"""Masks: pictures, boxes or all of a picture, grown, inverted, blurred. Told by their pixels."""

from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from imagend.errors import BadMask
from imagend.mask_field import Mask
from imagend.worker.masks import combine

SIZE = (60, 40)


def mask_of(given: np.ndarray | None = None, size: tuple[int, int] = SIZE, **fields: Any) -> np.ndarray:
    image = None if given is None else Image.fromarray(given)
    return np.asarray(combine(size, Mask.model_validate_json(json.dumps(fields)), image))


def box(*edges: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    pixels = np.zeros(size[::-1], np.uint8)
    left, top, right, bottom = edges
    pixels[top:bottom, left:right] = 255
    return pixels


def test_boxes_are_white_to_their_right_and_bottom_edges_which_are_not() -> None:
    made = mask_of(boxes=[[10, 5, 20, 15], [15, 10, 30, 12]], blur=0)
    assert (made == np.maximum(box(10, 5, 20, 15), box(15, 10, 30, 12))).all()


def test_a_box_over_the_border_is_cut_and_one_outside_refused() -> None:
    assert (mask_of(boxes=[[50, 30, 100, 100]], blur=0) == box(50, 30, 60, 40)).all()
    with pytest.raises(BadMask, match="the box 60,0,61,1 lies outside the picture, which has 60x40 pixels"):
        mask_of(boxes=[[60, 0, 61, 1]])


def test_the_whole_picture_is_white() -> None:
    assert (mask_of(whole=True) == 255).all()


def test_a_masks_greys_stay_as_they_are() -> None:
    ramp = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    assert (mask_of(ramp, image="masks/ramp", blur=0) == ramp).all()


def test_a_coloured_mask_counts_by_its_luminance() -> None:
    red = np.zeros((40, 60, 3), np.uint8)
    red[:, :30] = 255
    red[:, 30:, 0] = 200
    assert (mask_of(red, image="masks/red", blur=0)[0, [0, 59]] == [255, 60]).all()


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(BadMask, match="it has 30x40 pixels, and its picture 60x40"):
        mask_of(np.full((40, 30), 255, np.uint8), image="masks/small")


def test_it_grows_by_a_disc() -> None:
    point = box(30, 20, 31, 21)
    grown = mask_of(point, image="masks/point", expand=9, blur=0)
    y, x = np.mgrid[:40, :60]
    assert (grown == np.where((x - 30) ** 2 + (y - 20) ** 2 <= 81, 255, 0)).all()


def test_shrinking_is_growing_of_the_rest_and_the_border_is_none() -> None:
    given = box(0, 5, 30, 25)
    shrunk = mask_of(given, image="masks/box", expand=-4, blur=0)
    grown = mask_of(255 - given, image="masks/box", expand=4, blur=0)
    assert (shrunk == 255 - grown).all()
    assert (shrunk == box(0, 9, 26, 21)).all()


def test_what_is_all_white_can_neither_grow_nor_shrink() -> None:
    white = np.full(SIZE[::-1], 255, np.uint8)
    assert (mask_of(white, image="masks/white", expand=5, blur=0) == 255).all()
    assert (mask_of(white, image="masks/white", expand=-5, blur=0) == 255).all()


def test_growing_comes_before_inverting() -> None:
    made = mask_of(boxes=[[20, 10, 30, 20]], expand=3, invert=True, blur=0)
    assert (made == 255 - mask_of(boxes=[[20, 10, 30, 20]], expand=3, blur=0)).all()
    assert made[15, 17] == 0
    assert made[15, 16] == 255


@pytest.mark.parametrize(("blur", "reach"), [(2, 1), (3, 1), (20, 10), (21, 10)])
def test_the_edge_fades_so_far_and_no_further(blur: int, reach: int) -> None:
    half = box(0, 0, 30, 40)
    row = mask_of(half, image="masks/half", blur=blur)[20]
    assert (row[: 30 - reach] == 255).all()
    assert (row[30 + reach :] == 0).all()
    assert (np.diff(row.astype(int)) <= 0).all()
    assert 0 < row[30] < 128 <= row[29] < 255
    assert (mask_of(half, image="masks/half", blur=blur) == row).all()  # it goes on beyond the border


def test_21_pixels_are_the_default() -> None:
    half = box(0, 0, 30, 40)
    assert (
        mask_of(half, image="masks/half") == cv2.GaussianBlur(half, (21, 21), 0, None, 0, cv2.BORDER_REPLICATE)
    ).all()
    assert (mask_of(half, image="masks/half", blur=0) == half).all()
    assert (mask_of(half, image="masks/half", blur=1) == half).all()


def test_a_mask_that_marks_nothing_is_refused() -> None:
    black = np.full(SIZE[::-1], 127, np.uint8)
    with pytest.raises(BadMask, match="Paint what is meant white in it"):
        mask_of(black, image="masks/black")
    with pytest.raises(BadMask, match="It is inverted, and nothing is left over"):
        mask_of(boxes=[[0, 0, 60, 40]], invert=True)
    with pytest.raises(BadMask, match="less to shrink it by"):
        mask_of(boxes=[[10, 10, 20, 20]], expand=-6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "takes one of image, boxes, find and whole; none is there"),
        ({"image": "a/b", "find": "the car"}, "takes one of image, boxes, find and whole; not image and find"),
        ({"boxes": [[0, 0, 9, 9]], "whole": True}, "not boxes and whole"),
        ({"boxes": []}, "is empty; leave it out, or give at least one"),
        ({"boxes": [[9, 0, 9, 9]]}, "left, top, right, bottom, in pixels from the top left corner; this one is empty"),
        ({"boxes": [[0, 0, 9]]}, "Field required"),
        ({"boxes": [[-1, 0, 9, 9]]}, "greater than or equal to 0"),
        ({"boxes": [[0.5, 0, 9, 9]]}, "valid integer"),
        ({"find": " "}, "must say what to find, such as: the car"),
        ({"find": []}, "is empty"),
        ({"find": ["a", "b\n"]}, "one line without control characters"),
        ({"whole": True, "threshold": 0.5}, "threshold and text_threshold go with find"),
        ({"whole": True, "invert": True}, "whole takes neither expand nor invert"),
        ({"find": "a", "blur": 256}, "less than or equal to 255"),
        ({"find": "a", "expand": 513}, "less than or equal to 512"),
    ],
)
def test_fields_that_make_no_mask_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Mask.model_validate_json(json.dumps(fields))


def test_what_to_find_is_one_text_or_several() -> None:
    assert Mask.model_validate({"find": "the car"}).texts == ("the car",)
    assert Mask.model_validate_json('{"find": ["the car", "a dog"], "threshold": 0.5}').texts == ("the car", "a dog")
