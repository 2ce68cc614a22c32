"""The loss of a training: as JSON lines, and drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from imagend.train_spec import Train

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 960, 480, 70, 30, 40
_SMOOTH = 0.05
"""How much a step counts in the smooth line, where there are many."""


def lines(losses: Sequence[float], spec: Train) -> bytes:
    """One for each step."""
    rows = (
        {"step": number + 1, "loss": loss, "learning_rate": spec.learning_rate_at(number)}
        for number, loss in enumerate(losses)
    )
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def smooth(losses: Sequence[float]) -> list[float]:
    """An average that forgets; at the beginning of all there were."""
    found, mean = [], 0.0
    for number, loss in enumerate(losses, 1):
        mean += (loss - mean) * max(_SMOOTH, 1 / number)
        found.append(mean)
    return found


def draw(losses: Sequence[float], title: str) -> Image.Image:
    """Each step's loss in grey, the average in blue; the axis begins at 0."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    right, floor = WIDTH - 20, HEIGHT - BOTTOM
    top = sorted(losses)[int(0.99 * (len(losses) - 1))] * 1.1 or 1.0  # one wild step must not flatten all others

    def at(number: int, loss: float) -> tuple[float, float]:
        across = LEFT + (right - LEFT) * number / max(1, len(losses) - 1)
        return across, floor - (floor - TOP) * min(1.0, loss / top)

    for part in range(5):
        value = top * part / 4
        _, height = at(0, value)
        pen.line([(LEFT, height), (right, height)], fill=(225, 225, 225))
        pen.text((LEFT - 8, height), f"{value:.4g}", fill="black", font=font, anchor="rm")
        step = round(1 + (len(losses) - 1) * part / 4)
        pen.text((at(step - 1, 0)[0], floor + 8), str(step), fill="black", font=font, anchor="ma")
    pen.line([at(number, loss) for number, loss in enumerate(losses)], fill=(190, 190, 190))
    pen.line([at(number, loss) for number, loss in enumerate(smooth(losses))], fill=(30, 80, 200), width=2)
    pen.text((LEFT, 8), title, fill="black", font=font)
    return image
