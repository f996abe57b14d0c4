"""The report's two charts as inline SVG, drawn by matplotlib without a display. Needs the ``bench`` extra."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from commhub.bench import _format

from ._results import PARTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from ._results import HookResult, Outcome

# Okabe and Ito's colours: told apart by people with any colour vision (https://jfly.uni-koeln.de/color/).
HOOK_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
PART_COLOURS = {"compute": "#b8c2cc", "encode": "#e69f00", "wait": "#d55e00", "decode": "#0072b2"}
_LINE_STYLES = ("-", "--", ":", "-.")
_INK, _FAINT = "#334155", "#e2e8f0"
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud, and takes the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#94a3b8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "legend.frameon": False,
}


def loss_chart(outcome: Outcome) -> str:
    """Training loss against training time, a line per hook: faint as measured, strong as a running mean."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(height=3.8)
        for index, result in enumerate(outcome.results):
            if not result.records:
                continue
            elapsed, losses = result.curve()
            colour = HOOK_COLOURS[index % len(HOOK_COLOURS)]
            style = _LINE_STYLES[index // len(HOOK_COLOURS) % len(_LINE_STYLES)]
            axes.plot(elapsed, losses, color=colour, alpha=0.22, linewidth=1)
            axes.plot(elapsed, _smooth(losses), style, color=colour, linewidth=2, label=result.hook)
        axes.set_xlabel("training time (s)")
        axes.set_ylabel("training loss (nats per byte)")
        axes.set_xlim(left=0)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.legend(loc="upper right")
        return _svg(figure, "loss", "Training loss against training time, one line per hook")


def split_chart(outcome: Outcome) -> str:
    """The median step as one bar per hook, split into compute, encode, wait and decode."""
    timed = [result for result in outcome.results if result.split]
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(height=1.3 + 0.46 * max(1, len(timed)))
        unit = 1.0 if max((x.step_seconds or 0 for x in timed), default=0.0) >= 1 else 1e3
        left = [0.0] * len(timed)
        for part in PARTS:
            widths = [result.split[part] * unit for result in timed]
            axes.barh(range(len(timed)), widths, 0.6, left=left, color=PART_COLOURS[part], label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        _label_bars(axes, timed, left)
        axes.set_xlabel(f"median step time ({'s' if unit == 1 else 'ms'})")
        axes.set_xlim(0, max(left, default=0) * 1.12 or 1)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.legend(ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.4)
        return _svg(figure, "split", "Median step time, split into its parts, one bar per hook")


def _label_bars(axes: Axes, timed: Sequence[HookResult], ends: Sequence[float]) -> None:
    axes.set_yticks(range(len(timed)), [result.hook for result in timed])
    axes.invert_yaxis()
    for row, (result, end) in enumerate(zip(timed, ends, strict=True)):
        axes.annotate(_format.seconds(result.step_seconds), (end, row), (5, 0), textcoords="offset points", va="center")


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.6, height), layout="constrained")
    return figure, figure.add_subplot()


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over about a twentieth of the steps, without the pull towards zero at its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + value, keep * weight + 1
        smooth.append(mean / weight)
    return smooth


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an ``<svg>`` element that can stand in a page with others, without any address in it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows svg and xlink without their declarations
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg \1 role="img" aria-label="{title}"><title>{title}</title>',
        svg,
        count=1,
    ).strip()
