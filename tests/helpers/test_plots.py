import base64
from io import BytesIO
from itertools import combinations, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from helpers.errors import CourseError
from helpers.evaluation import score
from helpers.plots import COLORS, STYLE, bars_with_intervals, curve, pareto, show, use_style

LABELS = {"title": "Loss falls with data", "xlabel": "tokens (millions)", "ylabel": "loss (nats per token)"}
X = [1, 2, 4, 8]


def a_curve(series=None, **settings):
    return curve(series or {"small": (X, [4, 3, 2.5, 2]), "large": (X, [4, 2.5, 2, 1.5])}, **{**LABELS, **settings})


def some_bars(scores=None, **settings):
    scores = scores or {"facts": score(94, 100), "sums": score(0, 100)}
    return bars_with_intervals(scores, **{"title": "It knows facts", "xlabel": "accuracy", **settings})


def a_pareto(points=None, **settings):
    points = points or {"fp32": (16, 0.9), "int8": (4, 0.9), "nf4": (2, 0.8), "bad": (4, 0.5)}
    return pareto(points, **{**LABELS, **settings})


def texts_of(figure):
    """The texts inside the axes, from the lowest to the highest."""
    figure.canvas.draw()
    return sorted(figure.axes[0].texts, key=lambda text: text.get_window_extent().y0)


@pytest.mark.parametrize("draw", [a_curve, some_bars, a_pareto])
def test_every_plot_is_a_figure_with_title_and_labels_on_its_axes(draw):
    figure = draw(title="The claim", xlabel="size (MB)", alt="What one sees.")
    axes = figure.axes[0]
    assert isinstance(figure, Figure) and len(figure.axes) == 1
    assert (axes.get_title(loc="left"), axes.get_xlabel()) == ("The claim", "size (MB)")
    assert draw is some_bars or axes.get_ylabel() == LABELS["ylabel"]
    assert plt.get_fignums() == []  # or the notebook would show it a second time, without its text


@pytest.mark.parametrize("draw", [a_curve, some_bars, a_pareto])
def test_nothing_is_cut_off_at_the_edge_of_a_figure(draw):
    figure = draw(title="A claim that is so long that it has to go on in a second line, as many of them will do")
    figure.canvas.draw()
    box = figure.get_tightbbox()  # inches
    width, height = figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


@pytest.mark.parametrize("draw", [a_curve, some_bars, a_pareto])
def test_a_plot_has_the_style_of_the_course_and_leaves_that_of_the_session_alone(draw):
    before = dict(plt.rcParams)
    axes = draw().axes[0]
    assert dict(plt.rcParams) == before
    assert not axes.spines["top"].get_visible()
    assert to_hex(axes.title.get_color()).upper() == STYLE["text.color"]
    if draw is a_curve:
        assert axes.lines[0].get_linewidth() == STYLE["lines.linewidth"]


def test_use_style_is_for_figures_of_ones_own():
    with plt.rc_context():
        use_style()
        assert plt.rcParams["axes.grid"] and plt.rcParams["figure.constrained_layout.use"]


# ---------------------------------------------------------------- show


@pytest.fixture
def shell():
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_show_displays_one_png_together_with_its_text(shell):
    with capture_output() as captured:
        show(a_curve(), alt="Two  lines\n    that fall.")
    assert len(captured.outputs) == 1
    bundle, metadata = captured.outputs[0].data, captured.outputs[0].metadata
    assert bundle["text/plain"] == metadata["image/png"]["alt"] == "Two lines that fall."
    image = Image.open(BytesIO(base64.b64decode(bundle["image/png"])))
    assert image.format == "PNG"
    assert image.width / image.height == pytest.approx(
        metadata["image/png"]["width"] / metadata["image/png"]["height"], rel=0.01
    )
    assert set(bundle) == {"image/png", "text/plain"}


def test_the_same_figure_is_the_same_file_each_time(shell):
    with capture_output() as captured:
        for _ in range(2):
            show(a_pareto(), alt="Points.")
    assert captured.outputs[0].data == captured.outputs[1].data


def test_the_text_may_be_given_to_the_plot_and_is_required(shell):
    with capture_output() as captured:
        show(a_curve(alt="Two lines."))
    assert captured.outputs[0].metadata["image/png"]["alt"] == "Two lines."
    for alt in (None, "", " \n"):
        with pytest.raises(CourseError, match="needs a text that describes it"):
            show(a_curve(), alt)


def test_a_title_that_would_run_out_of_the_figure_is_broken(shell):
    title = "Each of the defences stops something, and few of them stop the best of six"
    figure = some_bars({"a defence whose name needs a lot of room beside its bar": score(1, 10)}, title=title)
    show(figure, alt="Two bars.")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert " ".join(axes.get_title(loc="left").split()) == title
    assert axes.get_tightbbox().x1 <= figure.bbox.x1 + 2  # dots


def test_show_closes_a_figure_of_pyplot(shell):
    figure, _ = plt.subplots()
    with capture_output():
        show(figure, "Empty axes.")
    assert plt.get_fignums() == []


# ---------------------------------------------------------------- colours


def test_neighbouring_series_stay_apart_for_colour_blind_readers():
    """The matrix is Machado et al. 2009's for deuteranopia (severity 1), applied to linear RGB."""
    deuteranopia = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    seen = [deuteranopia @ (np.array(to_rgb(color)) ** 2.2) for color in COLORS]
    assert min(np.linalg.norm(one - two) for one, two in combinations(seen, 2)) > 0.1


def test_more_series_than_colours_are_refused():
    series = {f"model {number}": (X, X) for number in range(len(COLORS))}
    colors = [line.get_color() for line in a_curve(series).axes[0].lines]
    assert len(set(colors)) == len(COLORS)
    with pytest.raises(CourseError, match="can tell 7 series apart but got 8: draw fewer"):
        a_curve(series | {"one more": (X, X)})
    with pytest.raises(CourseError, match="7 series apart but got 8"):
        some_bars({"task": {f"model {number}": score(1, 2) for number in range(8)}})


# ---------------------------------------------------------------- curve


@settings(max_examples=8)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=7), st.booleans())
def test_the_names_at_the_right_never_overlap_and_stay_beside_the_axes(ends, long):
    names = [f"series {number}" + " with a long name" * (long and number % 2) for number in range(len(ends))]
    series = {name: (X, [0.5, 0.5, 0.5, end]) for name, end in zip(names, ends, strict=True)}
    figure = a_curve(series, percent=True, references={"chance": 0.5})
    texts = texts_of(figure)
    assert sorted(text.get_text().replace("\n", " ") for text in texts) == sorted([*names, "chance"])
    boxes = [text.get_window_extent() for text in texts]
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(boxes))  # pixels
    frame = figure.axes[0].get_window_extent()
    assert all(box.x0 > frame.x1 and frame.y0 - 14 < box.y0 and box.y1 < frame.y1 + 14 for box in boxes)


def test_names_stand_in_the_order_of_the_ends_and_in_the_colour_of_their_line():
    figure = a_curve({"low": (X, [4, 3, 2, 1]), "high": (X, [4, 4, 4, 4]), "middle": (X, [4, 3, 3, 2.5])})
    assert [text.get_text() for text in texts_of(figure)] == ["low", "middle", "high"]
    colors = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert {text.get_text(): text.get_color() for text in texts_of(figure)} == colors


def test_a_single_line_needs_no_name():
    assert texts_of(a_curve({"loss": (X, X)})) == []


def test_a_band_is_drawn_around_its_line():
    band = a_curve({"loss": (X, [3, 3, 3, 3], [2, 2, 2, 2], [4, 4, 4, 4])}).axes[0].collections[0].get_paths()[0]
    assert (band.vertices[:, 1].min(), band.vertices[:, 1].max()) == (2, 4)


def test_a_loss_that_became_nan_keeps_its_name_and_one_without_a_number_is_refused():
    figure = a_curve({"diverged": (X, [3.0, 2.0, float("nan"), float("inf")]), "sound": (X, [3, 2, 1.5, 1])})
    assert [text.get_text() for text in texts_of(figure)] == ["sound", "diverged"]
    for values in ([float("nan")] * 4, []):
        with pytest.raises(CourseError, match="series 'diverged' of a plot holds no finite number"):
            a_curve({"diverged": (X[: len(values)], values)})


def test_shares_run_from_0_to_100_percent():
    axes = a_curve({"one": (X, [0, 0.2, 0.3, 0.4])}, percent=True).axes[0]
    assert axes.get_ylim() == (0, 1)
    assert axes.yaxis.get_major_formatter()(0.25) == "25 %"


def test_lines_outside_of_the_limits_are_cut():
    line = a_curve({"loss": (X, [40, 3, 2, 1])}, limits_y=(0, 4)).axes[0].lines[0]
    assert line.get_clip_on()


def test_logarithmic_axes_carry_plain_numbers():
    axes = a_curve({"loss": ([1, 10, 100], [5, 3, 2])}, log_x=True, log_y=True).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    axes.figure.canvas.draw()
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert {"1", "2", "5", "10", "20", "50", "100"} <= set(shown)
    assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))


# ---------------------------------------------------------------- bars and points


def test_each_bar_has_its_length_its_interval_and_its_number():
    low_high = score(94, 100)
    axes = some_bars({"facts": low_high, "sums": score(0, 100)}).axes[0]
    assert [patch.get_width() for patch in axes.patches] == [0.94, 0]
    assert list(axes.lines[0].get_xdata()) == [low_high.low, low_high.high]
    assert [text.get_text() for text in axes.texts] == ["94 %", "0 %"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["facts", "sums"]
    assert axes.yaxis.get_inverted()  # the first on top


def test_variants_have_one_colour_each_and_a_legend_beside_the_bars():
    figure = some_bars({task: {"base": score(1, 4), "tuned": score(3, 4)} for task in ("facts", "sums")})
    axes = figure.axes[0]
    figure.canvas.draw()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["base", "tuned"]
    assert [to_hex(patch.get_facecolor()).upper() for patch in axes.patches] == [COLORS[0], COLORS[1]] * 2
    legend = axes.get_legend().get_window_extent()
    assert legend.x0 > max(text.get_window_extent().x1 for text in axes.texts)


def test_the_name_of_a_reference_does_not_touch_the_title():
    figure = some_bars(references={"chance": 0.125}, title="A title that reaches over the name of the reference")
    figure.canvas.draw()
    axes = figure.axes[0]
    name = next(text for text in axes.texts if text.get_text() == "chance")
    title = next(text for text in axes.get_children() if getattr(text, "get_text", str)() == axes.get_title("left"))
    assert name.get_window_extent().y1 < title.get_window_extent().y0


def test_the_frontier_holds_the_points_that_no_other_beats():
    axes = a_pareto().axes[0]
    assert [tuple(point) for point in axes.lines[0].get_xydata()] == [(2, 0.8), (4, 0.9)]
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    assert colors["int8"] == colors["nf4"] != colors["fp32"] == colors["bad"]


def test_the_frontier_follows_the_directions_that_are_better():
    points = {"a": (1, 1), "b": (2, 2), "c": (3, 3)}

    def frontier(**settings):
        return [tuple(point) for point in a_pareto(points, **settings).axes[0].lines[0].get_xydata()]

    assert frontier() == [(1, 1), (2, 2), (3, 3)]
    assert frontier(lower_y_is_better=True) == [(1, 1)]
    assert frontier(lower_x_is_better=False) == [(3, 3)]
    assert frontier(lower_x_is_better=False, lower_y_is_better=True) == [(1, 1), (2, 2), (3, 3)]


def test_the_names_of_points_that_are_close_do_not_overlap():
    texts = texts_of(a_pareto({"one": (1, 1.0), "two": (1.02, 1.005), "three": (1.01, 0.99), "far": (5, 2)}))
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(two) for one, two in combinations(boxes, 2))
