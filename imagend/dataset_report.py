"""What a look at a dataset found: is it fit to train on, and what should be mended? Pure."""

from __future__ import annotations

from pydantic import Field

from imagend.fields import Frozen

_SHOWN = 10


class Unreadable(Frozen):
    file: str
    why: str


class Report(Frozen):
    """Of one dataset at one resolution."""

    name: str
    sha256: str
    """of all its pictures' digests, captions and repeats: another one is another dataset"""
    pictures: int
    """that can be read"""
    per_epoch: int
    """with repeats"""
    resolution: int
    buckets: dict[str, int]
    """pictures by the size in which they are trained"""
    smallest: str | None
    largest: str | None
    enlarged: tuple[str, ...] = ()
    """which are smaller than their bucket"""
    missing_captions: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    """groups whose pixels are the same"""
    unreadable: tuple[Unreadable, ...] = ()
    mistakes: tuple[str, ...] = ()
    captions: int = Field(0)
    """different ones"""

    @property
    def is_fit(self) -> bool:
        """Missing captions, small pictures and duplicates can be wanted; pictures that cannot be read are not."""
        return self.pictures > 0 and not self.unreadable and not self.mistakes

    def summary(self) -> dict[str, object]:
        """For a manifest: its names could be many."""
        counted = ("enlarged", "missing_captions", "duplicates")
        told = self.model_dump(mode="json", exclude={*counted, "unreadable", "mistakes"})
        return told | {name: len(getattr(self, name)) for name in counted}

    def lines(self) -> list[str]:
        """For people."""
        sizes = f", {self.smallest} to {self.largest}" if self.smallest != self.largest else f", {self.largest}"
        told = [
            f"{self.name}: {self.pictures} pictures{sizes if self.pictures else ''}; {self.per_epoch} an epoch; "
            f"{self.captions} different captions; sha256 {self.sha256}",
            f"buckets at {self.resolution}: "
            + (", ".join(f"{size} ({n})" for size, n in self.buckets.items()) or "none"),
        ]
        told += _some("without a caption", self.missing_captions, "put a .txt of the same name beside each")
        told += _some(
            "the same picture", tuple(" = ".join(group) for group in self.duplicates), "remove all but one of each"
        )
        told += _some(
            "smaller than its bucket", self.enlarged, "it is enlarged; use larger ones, or a smaller resolution"
        )
        told += _some(
            "cannot be read", tuple(f"{one.file} ({one.why})" for one in self.unreadable), "mend or remove it"
        )
        told += _some("wrong", self.mistakes, "mend it")
        return told

    def verdict(self) -> str:
        if self.is_fit:
            return "fit to train on"
        what = "there is no picture in it" if not (self.pictures or self.unreadable) else "mend what is said above"
        return f"not fit to train on: {what}, and look again: imagend datasets {self.name}"


def _some(what: str, found: tuple[str, ...], remedy: str) -> list[str]:
    if not found:
        return []
    more = f" and {len(found) - _SHOWN} more (--json lists them)" if len(found) > _SHOWN else ""
    return [f"{what}: {len(found)} ({', '.join(found[:_SHOWN])}{more}); {remedy}"]
