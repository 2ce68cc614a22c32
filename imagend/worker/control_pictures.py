"""From a plain picture to one that a ControlNet reads. On the CPU, and without a model for edges."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from imagend.control import Control

LOW_THRESHOLD, HIGH_THRESHOLD = 100, 200
"""of Canny's: those that SDXL's ControlNets were trained with"""


def control_picture(control: Control, image: Image.Image) -> Image.Image:
    """What a control of a job shows its ControlNet."""
    return canny(image) if control.preprocess else image


def canny(image: Image.Image) -> Image.Image:
    """The edges of an RGB picture, white on black (Canny 1986)."""
    edges = cv2.Canny(np.asarray(image), LOW_THRESHOLD, HIGH_THRESHOLD)
    return Image.fromarray(np.repeat(edges[..., None], 3, axis=2))
