"""The safety filter, as config.yaml says it and as a worker is told: what is done with pictures that a classifier finds
unsafe. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from imagend.fields import Frozen, ModelName


def _mode(value: Any) -> Any:
    return "off" if value is False else value  # as YAML reads the word


def _list(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("must be a list of labels, such as [nsfw]")
    return tuple(value)


Mode = Annotated[Literal["off", "flag", "block"], BeforeValidator(_mode)]
Labels = Annotated[tuple[str, ...], Field(max_length=100), BeforeValidator(_list)]


class Classifier(Frozen):
    """The keys under `safety_classifier`; a description here is the comment in config.yaml."""

    model: ModelName | None = Field(None, description="A folder under models/safety/; null: the only one there is.")
    labels: Labels = Field(
        ("nsfw", "unsafe", "porn", "hentai", "sexy"),
        description="What it calls unsafe pictures; those of these labels that it has are added up.",
    )
    threshold: float = Field(
        0.5, gt=0.0, le=1.0, description="A picture is unsafe if they have so much of its probability, or more."
    )


class Filter(Frozen):
    """What is to be done with the pictures of a job."""

    mode: Literal["flag", "block"]
    classifier: Classifier


def filter_of(classifier: Classifier, *modes: Mode | None) -> Filter | None:
    """By the strictest of the modes that are said; None if that is off."""
    if "block" in modes:
        return Filter(mode="block", classifier=classifier)
    return Filter(mode="flag", classifier=classifier) if "flag" in modes else None
