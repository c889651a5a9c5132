"""The picture of ``compare.py``."""

from pathlib import Path

import matplotlib as mpl
from _report import TITLES, mark, number
from _rows import ROWS, Results, Row

mpl.use("Agg")
import matplotlib.pyplot as plt

#: What is drawn, by measure and figure, with its title.
_PANELS = {
    ("requests", "cpu"): "CPU per small POST, µs",
    ("requests", "rate"): "requests a second on one core",
    ("1000 streams", "cpu"): "CPU per streamed event, 1,000 streams, µs",
    ("burst", "rate"): "events a second, without pause",
    ("latency", "p50"): "latency added, p50, µs",
    ("9500 idle streams", "KiB"): "memory per idle stream, KiB",
}
_OURS, _THEIRS = "#1b6ca8", "#b8b8b8"


def draw(results: Results, file: Path) -> None:
    """Write a PNG with a panel for each of the figures that matter most and that were measured."""
    rows = {(row.measure, row.figure): row for row in ROWS}
    panels = [(rows[place], title) for place, title in _PANELS.items() if place[0] in results["figures"]]
    if not panels:
        return
    height = (len(panels) + 1) // 2
    figure, axes = plt.subplots(height, 2, figsize=(11, 2.6 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (row, title) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, results, row, title)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_panel(axis: "plt.Axes", results: Results, row: Row, title: str) -> None:
    names = [name for name in reversed(TITLES) if name in results["contestants"] and name != "direct"]
    values = {name: row.value(results, name) for name in names}
    shown = {name: value for name, value in values.items() if value is not None and value > 0}
    colours = [_OURS if name.startswith("vllmproxy") else _THEIRS for name in shown]
    missing = ", ".join(TITLES[name] for name in names if name not in shown)
    if missing:
        title += f" (not measured: {missing})"
    if shown and max(shown.values()) > 30 * min(shown.values()):
        axis.set_xscale("log")  # on which a bar's length means nothing
        axis.scatter(list(shown.values()), range(len(shown)), color=colours, s=60)
        title += ", log scale"
    else:
        axis.barh(range(len(shown)), list(shown.values()), color=colours)
    axis.set_yticks(range(len(shown)), [TITLES[name] for name in shown])
    for place, (name, value) in enumerate(shown.items()):
        label = number(value) + mark(results, row, name)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line of what is asked
        axis.annotate(label, (value, place), (6, -3), textcoords="offset points", fontsize=8, bbox=white, zorder=3)
    _draw_asked(axis, results, row)
    axis.set_title(title, fontsize=10, loc="left")
    axis.margins(x=0.15)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _draw_asked(axis: "plt.Axes", results: Results, row: Row) -> None:
    """Draw where the figure of everything on is to be."""
    for bar in row.bars:
        other = row.value(results, bar.of) if bar.of else 1.0
        if other is not None:
            axis.axvline(bar.limit * other, color="#c0392b", linestyle="--", linewidth=1)
