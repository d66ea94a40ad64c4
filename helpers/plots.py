"""One look for all figures, the three plots that several lessons draw, and `show`, which gives a figure its alt text.

Every plot returns a matplotlib `Figure` and changes no global state; only `use_style` does. A title is the claim
that the figure shows; axes carry units. The colours are Okabe and Ito's (2008), which stay apart for colour-blind
readers, without their yellow, which is too light for a line on white.
"""

import base64
import math
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise

import matplotlib.pyplot as plt
from cycler import cycler
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from helpers.errors import CourseError
from helpers.evaluation import Score

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
GREY, INK = "#767676", "#262626"
PERCENT = PercentFormatter(1.0, decimals=0, symbol=" %")
WIDTH, HEIGHT, DPI = 7.0, 4.0, 150  # inches, inches, dots per inch
STYLE = {
    "figure.figsize": (WIDTH, HEIGHT),
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": DPI,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same figure on every machine
    "font.size": 10,
    "text.color": INK,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "legend.frameon": False,
}


def use_style() -> None:
    """Give all later figures of this session the look of the course."""
    plt.rcParams.update(STYLE)


def show(figure: Figure, alt: str | None = None) -> None:
    """Display a figure in the notebook together with the text that stands in for it, and close it.

    `alt` says in a sentence or two what a reader sees; it may have been given to the plot instead. Screen readers
    speak it, and terminals print it. Raises `CourseError` when it is missing.
    """
    alt = " ".join((alt or figure.get_label() or "").split())
    if not alt:
        raise CourseError('A figure needs a text that describes it: write show(figure, alt="what one sees in it").')
    _break_long_lines(figure)
    png = BytesIO()
    figure.savefig(png, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    plt.close(figure)
    display(
        {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": alt},
        metadata={"image/png": {"alt": alt, "width": width, "height": height}},
        raw=True,
    )


def _break_long_lines(figure: Figure) -> None:
    """Break each text, such as a title, that would run out of the figure at its right edge."""
    figure.draw_without_rendering()  # places the axes
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        if box.width and box.x0 < figure.bbox.x1 < box.x1:
            room = (figure.bbox.x1 - box.x0) / box.width
            text.set_text(textwrap.fill(text.get_text(), max(1, int(room * len(text.get_text())))))


def scored_line(x: Sequence[float], scores: Sequence[Score]) -> tuple[Sequence[float], list, list, list]:
    """A series for `curve`: the accuracies of the scores with their intervals as a band."""
    return x, [s.accuracy for s in scores], [s.low for s in scores], [s.high for s in scores]


@plt.rc_context(STYLE)
def curve(
    series: Mapping[str, tuple],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    alt: str = "",
    log_x: bool = False,
    log_y: bool = False,
    percent: bool = False,
    limits_y: tuple[float, float] | None = None,
    references: Mapping[str, float] | None = None,
) -> Figure:
    """Draw lines that carry their names: label -> (x, y), or (x, y, low, high) with a band around the line.

    `references` are horizontal dashed lines, label -> y, for example the level of chance. With `percent` the values
    are shares between 0 and 1. Short series get a mark at each point. Raises `CourseError` for more series than there
    are colours, and for one without a finite number.
    """
    figure, axes = _figure(title, xlabel, ylabel, alt)
    ends = []
    for (label, (x, y, *band)), color in zip(series.items(), _colors(len(series)), strict=True):
        x, y = list(x), list(y)
        marker = "o" if len(x) <= 16 else None
        # without limits of one's own all points lie in the axes, and those on their edge are shown in full
        axes.plot(x, y, color=color, marker=marker, label=label, clip_on=limits_y is not None, zorder=3)
        if band:
            axes.fill_between(x, *band, color=color, alpha=0.18, linewidth=0)
        finite = [value for value in y if math.isfinite(value)]  # a loss may have become nan
        if not finite:
            raise CourseError(f"The series {label!r} of a plot holds no finite number: leave it out.")
        ends.append((label, finite[-1], color))
    for label, level in (references or {}).items():
        axes.axhline(level, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=2)
        ends.append((label, level, GREY))
    axes.margins(x=0.02)
    if log_x:
        _use_logarithms(axes.xaxis)
    if log_y:
        _use_logarithms(axes.yaxis)
    if percent:
        axes.yaxis.set_major_formatter(PERCENT)
    if limits_y or percent:
        axes.set_ylim(*(limits_y or (0, 1)))
    if len(ends) > 1:
        _name_at_the_right(axes, ends)
    return figure


@plt.rc_context(STYLE)
def bars_with_intervals(
    scores: Mapping[str, Score | Mapping[str, Score]],
    *,
    title: str,
    xlabel: str,
    alt: str = "",
    references: Mapping[str, float] | None = None,
) -> Figure:
    """Draw one bar a score with its confidence interval and its number, the first on top.

    `scores` is label -> Score, or label -> {variant -> Score} to compare variants such as "base" and "tuned" on
    each task. `references` are vertical dashed lines, label -> share, for example the level of chance.
    """
    grouped = {label: entry if isinstance(entry, Mapping) else {"": entry} for label, entry in scores.items()}
    variants = list(dict.fromkeys(variant for entry in grouped.values() for variant in entry))
    rows = sum(map(len, grouped.values()))
    figure, axes = _figure(title, xlabel, "", alt, height=1.5 + 0.34 * rows + 0.18 * len(grouped))
    colors = dict(zip(variants, _colors(len(variants)), strict=True))
    position, ticks = 0.0, []
    for entry in grouped.values():
        ticks.append(position + (len(entry) - 1) / 2)
        for variant, score in entry.items():
            name = variant if variant and variant not in axes.get_legend_handles_labels()[1] else None
            axes.barh(position, score.accuracy, height=0.74, color=colors[variant], label=name, zorder=2)
            axes.plot([score.low, score.high], [position] * 2, color=INK, linewidth=1.6, zorder=3)
            axes.annotate(
                f"{score.accuracy:.0%}".replace("%", " %"),
                (score.high, position),
                (6, 0),
                textcoords="offset points",
                va="center",
                zorder=4,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )
            position += 1
        position += 0.55
    if references:
        axes.set_title(axes.get_title(loc="left"), pad=20)  # room for their names
    for label, level in (references or {}).items():
        axes.axvline(level, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=2.5)
        axes.annotate(
            label, (level, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", color=GREY,
            ha="center", fontsize=9,
        )  # fmt: skip
    axes.set_yticks(ticks, [textwrap.fill(label, 26) for label in grouped])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(position - 0.55 - 0.5, -0.5)  # the first on top
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PERCENT)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    if len(variants) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.06, 1.0), borderaxespad=0, handlelength=1.0)
    return figure


@plt.rc_context(STYLE)
def pareto(
    points: Mapping[str, tuple[float, float]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    alt: str = "",
    lower_x_is_better: bool = True,
    lower_y_is_better: bool = False,
    log_x: bool = False,
) -> Figure:
    """Draw label -> (x, y) as points and join those of the frontier; the points behind it are grey.

    A point is on the frontier if no other is better in one respect and at least as good in the other.
    """
    figure, axes = _figure(title, xlabel, ylabel, alt)
    costs = {
        label: (x if lower_x_is_better else -x, y if lower_y_is_better else -y) for label, (x, y) in points.items()
    }
    frontier = [
        label
        for label, cost in costs.items()
        if not any(other != cost and other[0] <= cost[0] and other[1] <= cost[1] for other in costs.values())
    ]
    frontier.sort(key=lambda label: points[label])
    best = [points[label] for label in frontier]
    axes.plot(*zip(*best, strict=True), color=COLORS[0], alpha=0.45, zorder=2)
    for label, (x, y) in points.items():
        axes.plot(x, y, "o", color=COLORS[0] if label in frontier else GREY, markersize=8, zorder=3)
    axes.margins(0.12)
    if log_x:
        _use_logarithms(axes.xaxis)
    _name_beside(axes, [(label, *point, INK if label in frontier else GREY) for label, point in points.items()], best)
    return figure


def _figure(title: str, xlabel: str, ylabel: str, alt: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))  # not pyplot's: it would be shown again, without its text
    FigureCanvasAgg(figure)  # measures the sizes of texts
    axes = figure.subplots()
    axes.set_title(textwrap.fill(title, 68))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    figure.set_label(alt)
    return figure, axes


def _colors(number: int) -> list[str]:
    if number > len(COLORS):
        raise CourseError(f"A plot can tell {len(COLORS)} series apart but got {number}: draw fewer, or several plots.")
    return COLORS[:number]


def _use_logarithms(axis: Axis) -> None:
    """Make an axis logarithmic, with plain numbers on it where it spans a few decades."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    if high < 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else range(1, 10)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())


def _name_at_the_right(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Write each label beside the end of its line, moved up or down where two would overlap: (label, y, color)."""
    to_fraction = axes.transData + axes.transAxes.inverted()
    wanted = [to_fraction.transform((axes.get_xlim()[1], y))[1] for _, y, _ in ends]
    order = sorted(range(len(ends)), key=wanted.__getitem__)
    texts = [textwrap.fill(ends[index][0], 24) for index in order]
    room = [0.062 * (text.count("\n") + 1) for text in texts]  # of the axes' height
    floor, ceiling, heights = -math.inf, math.inf, []
    for index, size in zip(order, room, strict=True):  # upwards from the lowest
        heights.append(max(wanted[index], floor + size / 2, 0.0))
        floor = heights[-1] + size / 2
    for row in reversed(range(len(order))):  # and back down, where they have grown out of the axes
        heights[row] = min(heights[row], ceiling - room[row] / 2, 1.0)
        ceiling = heights[row] - room[row] / 2
    for index, text, height in zip(order, texts, heights, strict=True):
        axes.text(1.02, height, text, transform=axes.transAxes, color=ends[index][2], va="center", linespacing=1.0)


def _name_beside(axes: Axes, points: Sequence[tuple[str, float, float, str]], line: Sequence) -> None:
    """Write each label beside its point, on the side where it covers least of what is there."""
    figure = axes.figure
    figure.canvas.draw()  # places the axes, so that distances on the page are known
    renderer = figure.canvas.get_renderer()
    marks = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    path = [axes.transData.transform(point) for point in line]
    for (x1, y1), (x2, y2) in pairwise(path):
        marks += [(x1 + (x2 - x1) * step / 20, y1 + (y2 - y1) * step / 20) for step in range(1, 20)]
    taken, frame = [], axes.get_window_extent(renderer)
    for label, x, y, color in points:
        best = None
        for dx, dy, ha, va in [
            (8, 0, "left", "center"), (-8, 0, "right", "center"), (0, 8, "center", "bottom"), (0, -8, "center", "top"),
            (6, 6, "left", "bottom"), (6, -6, "left", "top"), (-6, 6, "right", "bottom"), (-6, -6, "right", "top"),
        ]:  # fmt: skip
            text = axes.annotate(label, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, color=color)
            box = text.get_window_extent(renderer)
            hidden = sum(box.contains(*mark) for mark in marks) + 5 * sum(box.overlaps(other) for other in taken)
            hidden += 3 * (box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1)
            if best is None or hidden < best[0]:
                if best:
                    best[1].remove()
                best = (hidden, text, box)
            else:
                text.remove()
        taken.append(best[2])
