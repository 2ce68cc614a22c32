"""From a plain picture to one that a ControlNet reads: edges by OpenCV, depth and pose by models. On the CPU always."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from imagend.architecture import ModelKind
from imagend.control import PREPROCESSORS, ControlType
from imagend.errors import JobFailed, NoPreprocessor
from imagend.models import Model, Models, digest
from imagend.worker.bases import network_of, reading
from imagend.worker.pose import draw

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        AutoModelForDepthEstimation,
        DPTImageProcessorPil,
        VitPoseForPoseEstimation,
        VitPoseImageProcessorPil,
    )

LOW_THRESHOLD, HIGH_THRESHOLD = 100, 200
"""of Canny's: those that SDXL's ControlNets were trained with"""


class Preprocessors:
    """What a job's pictures are made by: `used`, for the manifest."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.used: list[dict[str, Any]] = []

    def make(self, type_: ControlType, image: Image.Image) -> Image.Image:
        """The control picture of an RGB picture, of its size. Raises NoPreprocessor, BrokenModel, BrokenWeights."""
        if type_ is ControlType.CANNY:
            self._tell({"type": type_, "name": "opencv", "version": cv2.__version__})
            return canny(image)
        model = self._find(type_)
        files = self._models.digests(model)
        self._tell({"type": type_, "name": model.name, "sha256": digest(files), "files": files})
        with reading(model, self._models), torch.no_grad():
            return depth(model, image) if type_ is ControlType.DEPTH else pose(model, image)

    def _tell(self, told: dict[str, Any]) -> None:
        if told not in self.used:
            self.used.append(told)

    def _find(self, type_: ControlType) -> Model:
        """The first by name that can be used."""
        for name in self._models.list(ModelKind.PREPROCESSOR):
            with contextlib.suppress(JobFailed):
                model = self._models.find(name, ModelKind.PREPROCESSOR)
                if model.architecture.format == type_:
                    return model
        raise NoPreprocessor(type_, PREPROCESSORS[type_])


def canny(image: Image.Image) -> Image.Image:
    """The edges of a picture, white on black (Canny 1986)."""
    edges = cv2.Canny(np.asarray(image), LOW_THRESHOLD, HIGH_THRESHOLD)
    return Image.fromarray(np.repeat(edges[..., None], 3, axis=2))


def depth(model: Model, image: Image.Image) -> Image.Image:
    """How near everything is: the nearest white, the farthest black (Depth Anything, DPT)."""
    processor = DPTImageProcessorPil.from_pretrained(model.path, local_files_only=True)
    network = network_of(AutoModelForDepthEstimation, model)
    found = network(**processor(images=image, return_tensors="pt"))
    sizes = [(image.height, image.width)]
    near = processor.post_process_depth_estimation(found, target_sizes=sizes)[0]["predicted_depth"]
    span = (near.max() - near.min()).clamp(min=torch.finfo(near.dtype).tiny)
    grey = ((near - near.min()) / span * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2))


def pose(model: Model, image: Image.Image) -> Image.Image:
    """The pose of one person, whom the picture is taken to show whole (ViTPose), as OpenPose draws it."""
    processor = VitPoseImageProcessorPil.from_pretrained(model.path, local_files_only=True)
    network = network_of(VitPoseForPoseEstimation, model)
    boxes = [[[0, 0, image.width, image.height]]]
    found = network(**processor(images=image, boxes=boxes, return_tensors="pt"))
    person = processor.post_process_pose_estimation(found, boxes=boxes)[0][0]
    return draw(person["keypoints"].numpy(), person["scores"].numpy(), image.size)
