"""Which way an edit goes, written into its spec: with what of the original it is guided by, if anything. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from imagend import router
from imagend.config import Config
from imagend.control import Control, ControlType
from imagend.edit_spec import Edit
from imagend.router import Route


def routed(spec: Edit, config: Config, able: Mapping[ControlType, str]) -> tuple[Edit, Route]:
    """The spec with `path` said, and ControlNets for its guides among `control`, so that it is painted the same again
    whatever words, rules and models say by then. `able`: the ControlNets by which an edit can be guided here."""
    rules = config.edit.rules
    route = _asked(spec) or router.route(
        spec.prompt, references=bool(spec.references), control=bool(spec.control), rules=rules
    )
    if route.path == "simple":
        return _with(spec, route, ()), route
    wanted = _named(spec)
    if wanted is None:
        wanted = () if spec.control else router.guides(spec.prompt, rules)
    guides = tuple(guide for guide in wanted if guide in able)
    if spec.guide is not None or (spec.path == "complex" and not guides):
        guides = wanted  # what is missing, the worker says, and how to get it
    if wanted and not guides and not spec.references:
        lacking = f"{route.reason}; but for {' and '.join(wanted)} there is no ControlNet with a preprocessor here"
        route = Route(path="simple", reason=lacking, confidence=route.confidence)
    return _with(spec, route, tuple(_control(spec, guide, able) for guide in guides)), route


def guided(spec: Edit, able: Mapping[ControlType, str]) -> Edit | None:
    """The spec for the complex way, by all that can guide it here; None if nothing can."""
    if not able:
        return None
    route = Route(path="complex", reason="", confidence=router.VAGUE)
    return _with(spec, route, tuple(_control(spec, guide, able) for guide in able))


def _named(spec: Edit) -> tuple[ControlType, ...] | None:
    return None if spec.guide is None else tuple(ControlType(guide) for guide in spec.guide)


def _asked(spec: Edit) -> Route | None:
    if spec.path != "auto":
        return Route(path=spec.path, reason="the job says so", confidence=1.0)
    return Route(path="complex", reason="it names guides", confidence=1.0) if spec.guide else None


def _control(spec: Edit, guide: ControlType, able: Mapping[ControlType, str]) -> Control:
    return Control(type=guide, model=able.get(guide), image=spec.image, preprocess=True)


def _with(spec: Edit, route: Route, added: tuple[Control, ...]) -> Edit:
    return spec.model_copy(update={"path": route.path, "guide": (), "control": (*spec.control, *added)})
