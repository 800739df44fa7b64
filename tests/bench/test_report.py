"""The table and the picture: nothing is cut off, nothing overlaps, at any width."""

import copy

import pytest
from rich.console import Console

from specdec.report.runs import results_title
from specdec.report.tables import results_table


def arm(name, tau=None, speed=1.0):
    interval = [0.9 * speed, 1.1 * speed]
    return {
        "name": name,
        "tau": tau,
        "tau_ci": tau and [tau - 0.1, tau + 0.1],
        "acceptance_rate": tau and 0.5,
        "per_depth": [0.6, 0.4, 0.1] if tau else [],
        "decode_tokens_per_s": 123.0 * speed,
        "speedup_vs_plain": speed,
        "speedup_vs_plain_ci": interval,
        "speedup_vs_hf": speed,
        "speedup_vs_hf_ci": interval,
        "end_to_end_speedup_vs_plain": 0.9 * speed,
        "loop_efficiency": tau and 0.95,
        "mismatches": 0,
        "differences": [],
        "failed": 0,
        "prompts": 18,
    }


@pytest.fixture
def results():
    config = {
        "target": {"path": "demo"},
        "prompts": {"source": "demo"},
        "sampling": {"temperature": 0.0},
        "batch_size": 1,
    }
    names = ("ngram", "suffix", "draft model", "draft model tree")
    arms = [arm("plain", 1.0), arm("hf_generate"), *(arm(name, 2.1, 1.7) for name in names)]
    provenance = {"config": config, "device": "cpu", "dtype": "float32"}
    return {"provenance": provenance, "arms": arms}


def lines(results, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(results, width))
    return console.export_text().splitlines()


@pytest.mark.parametrize(("width", "num_intervals"), [(80, 0), (100, 1), (140, 3)])
def test_a_table_gives_up_intervals_before_anything_is_cut(results, width, num_intervals):
    text = lines(results, width)
    assert max(map(len, text)) <= width
    assert not any("…" in line for line in text)
    row = next(line for line in text if line.startswith("ngram"))
    assert row.count("[") == num_intervals
    assert row.split()[-2:] == ["0", "0"]
    assert any(line.startswith("draft model tree ") for line in text)


def test_a_long_name_goes_on_in_the_next_line(results):
    results["arms"][2]["name"] = "a head with many nodes and an adapter"
    text = "\n".join(lines(results, 80))
    assert "…" not in text
    for word in results["arms"][2]["name"].split():
        assert word in text


def test_the_caption_says_how_near_the_ties_were(results):
    assert not any("apart" in line for line in lines(results, 140))
    for gap in (0.02, 0.03125, None):
        difference = {"prompt": 0, "against": "plain", "position": 1, "top2_gap": gap}
        results["arms"][2]["differences"].append(difference)
    assert any("at most 0.031 apart" in line for line in lines(results, 140))


@pytest.mark.parametrize(
    ("path", "shown"),
    [("demo", "demo"), ("org/model", "org/model"), ("/a/b/model", "model"), ("./model", "model")],
)
def test_the_title_names_a_folder_by_its_last_part(results, path, shown):
    results["provenance"]["config"]["target"]["path"] = path
    assert results_title(results) == f"{shown} on cpu, float32, batch 1, T = 0, 18 demo prompts"


def draw(results):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from specdec.report.quick_plots import draw

    figure = draw(results, Figure)
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize("num_more", [0, 6])
def test_no_label_of_the_picture_is_cut_off_or_overlaps(results, num_more):
    for number in range(num_more):
        more = arm(f"a head with many nodes and an adapter, number {number}", 3.0, 3.3)
        results["arms"].append(copy.deepcopy(more))
    figure = draw(results)
    names = figure.axes[0].get_yticklabels()
    values = [text for text in figure.axes[0].texts if text.get_text()]
    assert len(names) == len(values) == 6 + num_more
    boxes = [text.get_window_extent() for text in names]
    assert all(low.y0 <= high.y0 for low, high in zip(boxes[1:], boxes[:-1], strict=True))
    assert not any(a.overlaps(b) for a, b in zip(boxes[1:], boxes[:-1], strict=True))
    axes = figure.axes[0].get_window_extent()
    assert all(box.x0 >= 0 for box in boxes)
    assert all(text.get_window_extent().x1 <= axes.x1 for text in values)


def test_an_arm_has_one_colour_in_both_panels(results):
    from matplotlib.colors import to_rgba

    speed, acceptance = draw(results).axes
    bars = [patch.get_facecolor() for patch in speed.patches]
    curves = {line.get_label(): to_rgba(line.get_color()) for line in acceptance.lines}
    assert [curves[a["name"]] for a in results["arms"][2:]] == bars[2:]
    assert bars[0] == bars[1]


def test_arms_that_measured_nothing_leave_the_picture_standing(results):
    for each in results["arms"]:
        each |= {"speedup_vs_plain": None, "speedup_vs_plain_ci": None, "per_depth": []}
    figure = draw(results)
    assert figure.axes[0].texts[:] == []
    assert any("-" in line for line in lines(results, 80))
