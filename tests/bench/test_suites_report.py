"""Tables and pictures of suites, and the command that shows them."""

import json

import pytest
from rich.console import Console
from tiny_suites import save_models, save_suite
from typer.testing import CliRunner

from specdec.bench.runner import run_bench
from specdec.bench.sweep import load_cells
from specdec.cli import app
from specdec.demo import demo_path
from specdec.report.quick_plots import draw_suite
from specdec.report.tables import suite_tables

KEYS = {
    "single_turn": "buckets: [{name: short, low: 1, high: 30, num: 1}]",
    "multi_turn": "turns: 2\nconversations: 1",
    "long_context": "bins: 2\nnum: 1",
    "concurrent": "users: [1, 2]\nprompt_len: {low: 5, high: 40}\nanswer_len: {low: 2, high: 6}",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        (cell,) = load_cells(save_suite(folder, models, name, KEYS[name]), ["repeats=1"])
        return run_bench(cell.config, folder / "o").model_dump(mode="json", by_alias=True)

    return {name: run(name) for name in KEYS}


def shown(tables, width=140):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables:
        console.print(table)
    return console.export_text()


@pytest.mark.parametrize("name", list(KEYS))
def test_the_tables_hold_every_group_and_arm_once_each_and_fit(results, name):
    for table in suite_tables(results[name], 140):
        text = shown([table])
        assert max(map(len, text.splitlines())) <= 140
        for group in results[name]["groups"]:
            assert text.count(group["name"]) == 1
        assert text.count("model") == len(results[name]["groups"])
    first, waiting = (shown([table]) for table in suite_tables(results[name], 140))
    assert "power: not measured" in first
    assert "J/token" not in first
    assert "chunk gap" in waiting
    assert ("queue" in waiting) == (name == "concurrent")


def test_figures_of_the_tables_are_those_of_the_results(results):
    changed = json.loads(json.dumps(results["concurrent"]))
    arm = changed["groups"][1]["arms"][2]
    arm["load"] |= {
        "tokens_per_s": 1234.0,
        "user_speed_vs_plain": 1.75,
        "user_speed_vs_plain_ci": [1.5, 2.0],
        "jain_index": 0.875,
    }
    arm["memory"] |= {"cache_bytes": 77 * 2**20, "peak_device_bytes": 88 * 2**20}
    arm["power"] = {"energy_j": 5.0, "power_w": 60.0, "energy_j_per_token": 0.125}
    arm["ttft_s"] = {"p50": 0.0111, "p95": 0.0222, "p99": 0.0333}
    first, waiting = suite_tables(changed, 160)
    line = next(line for line in shown([first], 160).splitlines() if "1234" in line)
    for figure in ("model", "1.75 [1.50, 2.00]", "0.875", "77", "88", "0.125"):
        assert figure in line
    assert "power: not measured" not in shown([first], 160)
    assert "11.1    22.2    33.3" in shown([waiting], 160)


@pytest.mark.parametrize("name", list(KEYS))
def test_the_picture_shows_every_arm_in_every_panel(results, name):
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = draw_suite(results[name], figure_module.Figure)
    panels = figure.axes
    assert len(panels) == (6 if name == "concurrent" else 4)
    ticks = [label.get_text() for label in panels[0].get_xticklabels()]
    assert len(ticks) == len(results[name]["groups"])
    for axes in panels:
        drawn = {container.get_label() for container in axes.containers}
        assert {"ngram", "model"} <= drawn <= {"plain", "ngram", "model"}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "ngram", "model"]
    first = panels[0].containers[-1].lines[0].get_ydata()
    key = [
        arm["load"]["tokens_per_s"] if name == "concurrent" else arm["speedup_vs_plain"]
        for arm in (group["arms"][2] for group in results[name]["groups"])
    ]
    assert list(first) == [value for value in key if value is not None]


def test_what_an_arm_has_no_figure_of_is_left_out_of_the_picture(results):
    figure_module = pytest.importorskip("matplotlib.figure")
    changed = json.loads(json.dumps(results["concurrent"]))
    for key, value in changed["groups"][0]["arms"][1]["load"].items():
        changed["groups"][0]["arms"][1]["load"][key] = [] if isinstance(value, list) else None
    figure = draw_suite(changed, figure_module.Figure)
    figure.canvas.draw_idle()
    ngram = next(c for c in figure.axes[0].containers if c.get_label() == "ngram")
    assert len(ngram.lines[0].get_ydata()) == 1


def test_the_command_runs_a_packaged_suite_and_ends_with_a_line_for_machines(tmp_path):
    pytest.importorskip("matplotlib")
    try:
        demo_path("target")
    except FileNotFoundError:
        pytest.skip("the demo models are not there")
    small = [
        "repeats=1",
        "threads=1",
        "users=[2]",
        "requests_per_user=1",
        "answer_len={low: 3, high: 4}",
    ]
    done = CliRunner().invoke(app, ["bench", "demo/concurrent", *small, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["schema"] == "specdec-suite-2"
    assert [group["name"] for group in last["groups"]] == ["2 users"]
    assert all(arm["mismatches"] == 0 for arm in last["groups"][0]["arms"])
    assert (tmp_path / "suite.png").stat().st_size > 20_000


def test_a_wrong_suite_ends_with_status_2_and_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["bench", "demo/concurrent", "users=[0]", "--out", str(out)])
    assert done.exit_code == 2
    assert "users.0 is 0" in done.stderr
    assert not out.exists()
