"""Plots for the dashboard, as SVG: colours are classes of its style sheet, and nothing in them is a client's text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from imagend.job import Outcome

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 540, 160, 44, 10, 20
_ROOM = _HEIGHT - _TOP - _BOTTOM


def bars(counts: Sequence[Counter[Outcome]], words: Sequence[str], begins: str, ends: str) -> str:
    """A stacked bar for each moment; `words` tell of each when one points at it."""
    top = max(1, *(sum(count.values()) for count in counts))
    pitch = (_WIDTH - _LEFT) / len(counts)
    drawn = []
    for index, (count, word) in enumerate(zip(counts, words, strict=True)):
        base = float(_HEIGHT - _BOTTOM)
        for outcome in Outcome:
            height = _ROOM * count[outcome] / top
            base -= height
            if height:
                x = _LEFT + index * pitch
                place = f'x="{x:.1f}" y="{base:.1f}" width="{pitch - 1:.1f}" height="{height:.1f}"'
                drawn.append(f'<rect class="{outcome}" {place}><title>{word}</title></rect>')
    return _framed("jobs that ended, by half hours", drawn, f"{top}", begins, ends)


def dots(seconds: Sequence[float], median: float, begins: str, ends: str) -> str:
    """How long jobs took, one after the other."""
    top = max(seconds) or 1.0
    pitch = (_WIDTH - _LEFT - 8) / len(seconds)

    def height(value: float) -> float:
        return _HEIGHT - _BOTTOM - _ROOM * value / top

    drawn = [
        f'<circle class="done" cx="{_LEFT + 4 + (index + 0.5) * pitch:.1f}" cy="{height(value):.1f}" r="2.5">'
        f"<title>{value:.1f} s</title></circle>"
        for index, value in enumerate(seconds)
    ]
    line = f'<line class="median" x1="{_LEFT}" x2="{_WIDTH}" y1="{height(median):.1f}" y2="{height(median):.1f}"/>'
    return _framed("how long jobs took", [*drawn, line], f"{top:.1f} s" if top < 100 else f"{top:.0f} s", begins, ends)


def progress(done: float) -> str:
    """A bar, so far full."""
    full = f'<rect class="done" width="{160 * min(1.0, max(0.0, done)):.0f}" height="8" rx="4"/>'
    track = '<rect class="track" width="160" height="8" rx="4"/>'
    return f'<svg class="progress" viewBox="0 0 160 8" role="img" aria-label="{done:.0%}">{track}{full}</svg>'


def _framed(label: str, drawn: Sequence[str], top: str, begins: str, ends: str) -> str:
    floor = _HEIGHT - _BOTTOM
    frame = (
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH}" y1="{floor}" y2="{floor}"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{top}</text>'
        f'<text x="{_LEFT - 6}" y="{floor}" text-anchor="end">0</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 5}">{begins}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 5}" text-anchor="end">{ends}</text>'
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(drawn)}{frame}</svg>'
