"""A curve in plain text, for terminals and logs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def draw(
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    width: int = 72,
    height: int = 16,
) -> str:
    """Points over a logarithmic x axis and a linear y axis, ``width`` by ``height`` characters without the labels.

    A column shows the mean of its points. ``xs`` are positive and ascending, all values finite.
    """
    first, last = math.log10(xs[0]), math.log10(xs[-1])
    columns: list[list[float]] = [[] for _ in range(width)]
    for x, y in zip(xs, ys, strict=True):
        share = (math.log10(x) - first) / (last - first) if last > first else 0.0
        columns[min(int(share * width), width - 1)].append(y)
    means = [sum(column) / len(column) if column else None for column in columns]
    shown = [mean for mean in means if mean is not None]
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    rows = [[" "] * width for _ in range(height)]
    for column, mean in enumerate(means):
        if mean is not None:
            rows[round((high - mean) / span * (height - 1))][column] = "*"
    labels = {n: f"{high - (high - low) * n / (height - 1):.3g}" for n in (0, height // 2, height - 1)}
    margin = max(map(len, labels.values()))
    lines = [f"{labels.get(n, ''):>{margin}} |{''.join(row).rstrip()}" for n, row in enumerate(rows)]
    axis = f"{'':>{margin}} +{'-' * width}"
    left, middle, right = f"{xs[0]:.2g}", f"{10 ** ((first + last) / 2):.2g}", f"{xs[-1]:.2g}"
    gap = width // 2 - len(left) - len(middle) // 2
    ticks = left + " " * gap + middle
    ticks += " " * (width - len(ticks) - len(right)) + right
    below = [axis, f"{'':>{margin}}  {ticks}", f"{x_label:^{width + margin}}".rstrip()]
    return "\n".join([f"{'':>{margin}}  {y_label}", *lines, *below])
