"""Plots of the report, as image elements that hold their own data."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Line:
    """A line of a plot through (x, y)."""

    label: str
    points: Sequence[tuple[float, float]]
    color: str
    dashed: bool = False


def plot(title: str, x_label: str, y_label: str, lines: Sequence[Line], markers: bool = False) -> str:
    """An `<img>` with the plot as SVG; its alternative text says where each line begins and ends."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot: no window system, nothing global
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        x, y = zip(*line.points, strict=True)
        marker = "o" if markers and not line.dashed else ""
        style = "--" if line.dashed else "-"
        axes.plot(x, y, color=line.color, label=line.label, linewidth=1.8, linestyle=style, marker=marker, markersize=5)
    axes.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ed", linewidth=0.8)
    if any(line.label for line in lines):
        figure.legend(loc="outside lower center", ncols=2, fontsize=8.5, frameon=False)
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": title}):  # equal data, equal file
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    ends = "; ".join(f"{line.label} {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}".strip() for line in lines)
    source = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/svg+xml;base64,{source}" alt="{escape(f"{title}, {y_label}: {ends}")}">'
