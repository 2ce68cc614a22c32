"""Draws a pose of COCO's 17 points in OpenPose's colours, with which ControlNets were trained. It knows no model."""

from __future__ import annotations

import math

import cv2
import numpy as np
from PIL import Image

SCORE = 0.3
"""Points that the model is less sure of are not drawn."""
_RADIUS = 4
_FROM_COCO = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
"""OpenPose's 18 points: nose, neck, right arm, left arm, right leg, left leg, eyes, ears, the right ones first"""
_SHOULDERS = (5, 6)
_LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10)),
    *((1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
_COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)),
    *((0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)),
    *((0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
"""of points; a limb has that of its number, at 60 %"""


def draw(points: np.ndarray, scores: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """On black; `points` are (x, y) in COCO's order."""
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    found = _openpose(points, scores)
    for (one, other), colour in zip(_LIMBS, _COLOURS, strict=False):
        begin, end = found[one], found[other]
        if begin is not None and end is not None:
            middle = (int((begin[0] + end[0]) / 2), int((begin[1] + end[1]) / 2))
            length, angle = math.dist(begin, end), math.degrees(math.atan2(begin[1] - end[1], begin[0] - end[0]))
            polygon = cv2.ellipse2Poly(middle, (int(length / 2), _RADIUS), int(angle), 0, 360, 1)
            cv2.fillConvexPoly(canvas, polygon, [int(value * 0.6) for value in colour])
    for point, colour in zip(found, _COLOURS, strict=True):
        if point is not None:
            cv2.circle(canvas, (int(point[0]), int(point[1])), _RADIUS, colour, thickness=-1)
    return Image.fromarray(canvas)


def _openpose(points: np.ndarray, scores: np.ndarray) -> list[tuple[float, float] | None]:
    """OpenPose's points, None where nothing is seen; the neck is between the shoulders."""

    def at(index: int) -> tuple[float, float] | None:
        return (float(points[index][0]), float(points[index][1])) if scores[index] >= SCORE else None

    left, right = (at(index) for index in _SHOULDERS)
    neck = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2) if left and right else None
    return [neck if index is None else at(index) for index in _FROM_COCO]
