"""Draw the pictures of docs/methods.md; needs the extra `docs`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from PIL import Image

from docs.panels import PICTURES, Panel, Picture, Points

LIMIT = 1.0
COLOURS = "RdBu_r"
PANEL_INCHES = 1.9
DOTS_PER_INCH = 110
PALETTE = 256
"""Colours per file."""


def draw_all(folder: Path) -> None:
    """Write one PNG per family."""
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for family, picture in PICTURES.items():
        draw(picture, folder / f"{family}.png")


def draw(picture: Picture, path: Path) -> None:
    """Write one picture: its panels in reading order, all in one colour scale."""
    panels = picture.panels()
    columns = min(picture.columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (columns * PANEL_INCHES + 0.7, rows * (PANEL_INCHES + 0.42))
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    image: Any = None
    for axis, panel in zip(axes.flat, panels, strict=False):
        axis.set_title(panel.title, fontsize=8, fontweight="bold" if panel.method else "normal")
        if isinstance(panel, Points):
            _draw_points(axis, panel)
        else:
            image = _draw_heat_map(axis, panel)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, pad=0.01, extend="both")
        bar.ax.tick_params(labelsize=7)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DOTS_PER_INCH, bbox_inches="tight", pad_inches=0.05)
    pyplot.close(figure)
    colours = Image.open(drawn).convert("RGB")
    reduced = colours.quantize(PALETTE, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)  # a third of the size, and no word of who drew it when


def _draw_heat_map(axis: Any, panel: Panel) -> Any:
    axis.set_xticks([])
    axis.set_yticks([])
    return axis.imshow(panel.tensor.numpy(), cmap=COLOURS, vmin=-LIMIT, vmax=LIMIT, interpolation="nearest")


def _draw_points(axis: Any, panel: Points) -> None:
    axis.set_xlim(-LIMIT, LIMIT)
    axis.set_ylim(-LIMIT, LIMIT)
    axis.set_aspect("equal")
    axis.axhline(0, color="0.85", linewidth=0.8)
    axis.axvline(0, color="0.85", linewidth=0.8)
    axis.tick_params(labelsize=6)
    for name, path in panel.paths.items():
        axis.plot(path[:, 0].numpy(), path[:, 1].numpy(), label=name)
    if panel.paths:
        axis.legend(fontsize=7, loc="lower left")
    order = range(len(panel.tensor))
    axis.scatter(panel.tensor[:, 0].numpy(), panel.tensor[:, 1].numpy(), c=order, cmap="viridis", s=14, zorder=3)
