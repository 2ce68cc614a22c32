"""Fixtures of the engine tests."""

from engine_conftest import _fresh, painter, plain

__all__ = ["_fresh", "painter", "plain"]
