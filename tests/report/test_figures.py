"""Pictures: no label is cut off, every arm keeps its color, and gaps stay gaps."""

import re

import made_runs
import pytest

from specdec.bench.results import BenchResults, SuiteResults
from specdec.report.bench import draw

pytest.importorskip("matplotlib")


@pytest.fixture
def results():
    return BenchResults.read(made_runs.bench())


def drawn(results):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(results)
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize("num_more", [0, 6])
def test_no_label_is_cut_off_or_overlaps(results, num_more):
    for number in range(num_more):
        name = f"a head with many nodes and an adapter, number {number}"
        results.arms.append(results.arms[2].model_copy(update={"name": name}))
    figure = drawn(results)
    names = figure.axes[0].get_yticklabels()
    values = [text for text in figure.axes[0].texts if text.get_text()]
    assert len(names) == len(values) == 5 + num_more
    boxes = [text.get_window_extent() for text in names]
    assert all(low.y0 <= high.y0 for low, high in zip(boxes[1:], boxes[:-1], strict=True))
    assert not any(a.overlaps(b) for a, b in zip(boxes[1:], boxes[:-1], strict=True))
    axes = figure.axes[0].get_window_extent()
    assert all(box.x0 >= 0 for box in boxes)
    assert all(text.get_window_extent().x1 <= axes.x1 for text in values)


def test_arm_has_one_color_in_both_panels(results):
    from matplotlib.colors import to_rgba

    speed, acceptance = drawn(results).axes
    bars = [patch.get_facecolor() for patch in speed.patches]
    curves = {c.get_label(): to_rgba(c.lines[0].get_color()) for c in acceptance.containers}
    assert [curves[arm.name] for arm in results.arms[2:]] == bars[2:]
    assert bars[0] == bars[1]


def test_arms_that_measured_nothing_leave_the_picture(results):
    for arm in results.arms:
        arm.speedup_vs_plain, arm.speedup_vs_plain_ci, arm.per_depth = None, None, []
    assert drawn(results).axes[0].texts[:] == []


@pytest.mark.parametrize("name", ["single-turn", "multi-turn", "long-context", "concurrent"])
def test_suite_shows_every_arm_in_every_panel(name):
    found = SuiteResults.read(made_runs.suite(name))
    names = [arm.name for arm in found.groups[0].arms]
    figure = draw(found)
    panels = figure.axes
    assert len(panels) == (6 if name == "concurrent" else 4)
    for axes in panels:
        assert len(axes.get_xticklabels()) == len(found.groups)
        drawn = {container.get_label() for container in axes.containers}
        assert set(names[1:]) <= drawn <= set(names)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    last = [group.arms[-1] for group in found.groups]
    values = [a.load.tokens_per_s if a.load else a.speedup_vs_plain for a in last]
    assert list(panels[0].containers[-1].lines[0].get_ydata()) == values


def test_suite_draws_intervals_and_leaves_out_gaps():
    content = made_runs.suite("single-turn")
    first, second = (group["arms"][1] for group in content["groups"])
    first |= {"speedup_vs_plain": None, "speedup_vs_plain_ci": None}
    second |= {"speedup_vs_plain": 1.2, "speedup_vs_plain_ci": [1.0, 1.5]}
    line = draw(SuiteResults.read(content)).axes[0].containers[0]
    assert list(line.lines[0].get_ydata()) == [1.2]
    ((low, high),) = [segment[:, 1] for segment in line.lines[2][0].get_segments()]
    assert (low, high) == pytest.approx((1.0, 1.5))


def imported(text):
    return re.findall(r"^ *(?:import|from) (\w+)", text, re.M)


def test_one_module_imports_matplotlib():
    folders = (made_runs.ROOT / name for name in ("specdec", "experiments"))
    files = [path for folder in folders for path in folder.rglob("*.py")]
    found = [path.name for path in files if "matplotlib" in imported(path.read_text())]
    assert found == ["style.py"]
