import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.planning.roofline import (
    Device,
    DraftModel,
    Efficiency,
    Hardware,
    Link,
    Model,
    draft_s,
    estimate,
    expected_tokens,
    load_hardware,
    target_s,
)
from tests.json_schema import violations

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "roofline-70b.yaml")
SCHEMA = json.loads((ROOT / "docs" / "estimate.schema.json").read_text())


def hardware(**changes):
    """A 10B target of 8 bits on two devices that reach all that is stated."""
    settings = {
        "target": Model("T", 10.0, 8.0, 1e5, num_layers=20, hidden_size=1000),
        "devices": [Device("a", 2.0, 100.0), Device("b", 1.0, 50.0)],
        "drafters": [DraftModel("D", 1.0, 8.0, 1e4, device="b", alpha=0.5)],
        "link": Link(10.0, 100.0),
        "efficiency": Efficiency(1.0, 1.0),
        "context": 1000,
    }
    return Hardware(**{**settings, **changes})


def test_a_pipeline_adds_the_times_of_its_devices_and_of_the_link():
    # 10 GB of weights and 0.1 GB of cache, two thirds at 2 TB/s and one third at 1 TB/s.
    memory_s = 10.1e9 * (2 / 3 / 2e12 + 1 / 3 / 1e12)
    link_s = 100e-6 + 1000 * 2 / 10e9
    assert target_s(hardware(), 1, 1) == pytest.approx(memory_s + link_s)


def test_a_tensor_split_waits_for_its_slowest_device_twice_a_layer():
    devices = [Device("a", 2.0, 100.0, share=0.5), Device("b", 1.0, 50.0, share=0.5)]
    link_s = 2 * 20 * (100e-6 + 1000 * 2 / 10e9)
    found = target_s(hardware(split="tensor", devices=devices), 1, 1)
    assert found == pytest.approx(0.5 * 10.1e9 / 1e12 + link_s)


def test_many_tokens_are_bound_by_arithmetic():
    one = hardware(devices=[Device("b", 1.0, 50.0)])
    # 2 operations a weight and token: 10e9 * 2 * 64 * 16 at 50 TFLOP/s.
    assert target_s(one, 16, 64) == pytest.approx(2 * 10e9 * 64 * 16 / 50e12)


def test_efficiency_and_overhead_lengthen_a_forward():
    half = hardware(efficiency=Efficiency(0.5, 1.0))
    assert draft_s(half, half.drafters[0], 1) == pytest.approx(1.01e9 / 0.5e12)
    late = DraftModel("D", 1.0, 8.0, 1e4, overhead_us=50.0, device="b", alpha=0.5)
    assert draft_s(hardware(), late, 1) == pytest.approx(1.01e9 / 1e12 + 50e-6)


@pytest.mark.parametrize(("alpha", "length"), [(0.0, 4), (0.5, 1), (0.8, 6)])
def test_expected_tokens_of_one_alpha_are_the_geometric_sum(alpha, length):
    formula = (1 - alpha ** (length + 1)) / (1 - alpha)
    assert expected_tokens([alpha] * length) == pytest.approx(formula)


def test_expected_tokens_of_alphas_by_depth():
    assert expected_tokens([0.8, 0.5, 0.1]) == pytest.approx(1 + 0.8 + 0.4 + 0.04)
    assert expected_tokens([1.0] * 5) == 6


def test_the_best_length_is_the_fastest_of_those_tried():
    found = estimate(hardware(max_draft_tokens=6))["drafters"][0]
    speeds = [row["estimated_speedup"] for row in found["lengths"]]
    assert len(speeds) == 7
    assert speeds[0] == 1.0
    assert found["best"]["estimated_speedup"] == max(speeds)
    tokens, draft, plain = 1.75, draft_s(hardware(), hardware().drafters[0], 1), None
    plain = target_s(hardware(), 1, 1)
    wanted = tokens * plain / (2 * draft + target_s(hardware(), 1, 3))
    assert speeds[2] == pytest.approx(wanted)


def test_a_drafter_that_is_never_right_is_best_left_out():
    never = [DraftModel("D", 1.0, 8.0, device="b", alpha=0.0)]
    assert estimate(hardware(drafters=never))["drafters"][0]["best"]["num_draft_tokens"] == 0


def test_what_does_not_fit_is_said():
    small = [Device("a", 2.0, 100.0, memory_gb=4.0), Device("b", 1.0, 50.0, memory_gb=24.0)]
    found = estimate(hardware(devices=small))["assumptions"]
    (line,) = [line for line in found if line.startswith("DOES NOT FIT")]
    assert line.startswith("DOES NOT FIT: a holds 4 GB but its share of the target takes 6.")
    assert not any("DOES NOT FIT" in line for line in estimate(hardware())["assumptions"])


def test_a_drafter_that_does_not_fit_beside_the_target_is_named():
    tight = [Device("a", 2.0, 100.0, memory_gb=24.0), Device("b", 1.0, 50.0, memory_gb=4.0)]
    found = estimate(hardware(devices=tight))["assumptions"]
    (line,) = [line for line in found if line.startswith("DOES NOT FIT")]
    assert "its share of the target with the drafter D takes 4.4 GB" in line


def test_caches_that_were_not_stated_are_said_to_be_left_out():
    bare = [DraftModel("D", 1.0, 8.0, device="b", alpha=0.5)]
    assert any(
        line.startswith("keys and values of D are left out")
        for line in estimate(hardware(drafters=bare))["assumptions"]
    )
    assert not any("are left out" in line for line in estimate(hardware())["assumptions"])


def test_every_figure_is_labelled_an_estimate():
    found = estimate(load_hardware(RECIPE))
    assert violations(found, SCHEMA) == []
    figures = [key for row in found["drafters"] for key in row["best"]]
    assert {key for key in figures if not key.startswith("estimated_")} == {"num_draft_tokens"}
    assert found["label"].startswith("estimate")


def test_the_command_estimates_and_says_what_it_assumes(tmp_path):
    done = CliRunner().invoke(app, ["plan", RECIPE, "--roofline", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "ESTIMATE from stated parameters" in done.stdout
    assert "It assumes:" in done.stdout
    written = json.loads((tmp_path / "estimate.json").read_text())
    assert violations(written, SCHEMA) == []
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["label"] == written["label"]
    assert {row["name"] for row in last["best"]} == {"1B", "3B", "8B"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("drafters.0.alpha=1.2", r"drafters\.0\.alpha is 1\.2 but must be a number in \[0, 1\]"),
        ("drafters.1.alpha=[0.5,-1]", r"drafters\.1\.alpha"),
        ("drafters.0.alpha=[]", r"drafters\.0\.alpha"),
        ("drafters.0.device=third", "'third' but must be one of fast, slow"),
        ("devices.0.bandwidth=2", r"devices\.0\.bandwidth does not exist; did you mean"),
        ("devices.0.bandwidth_tb_s=0", "bandwidth_tb_s is 0.0 but must be above 0"),
        ("devices.0.bandwidth_tb_s=.inf", "bandwidth_tb_s is inf but must be a finite number"),
        ("devices.0.share=0.5", "must sum to 1"),
        ("devices.1.name=fast", "must differ"),
        ("devices=[]", "devices is empty"),
        ("drafters=[]", "drafters is empty"),
        ("split=rows", "split is 'rows'"),
        ("efficiency.bandwidth=1.5", r"efficiency\.bandwidth is 1\.5"),
        ("batch_sizes=[0]", "batch_sizes"),
        ("target.hidden_size=0", r"target\.hidden_size is 0 but must be above 0"),
        ("target.bits=0", r"target\.bits is 0\.0 but must be above 0"),
    ],
)
def test_bad_parameters_are_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        load_hardware(RECIPE, [override])


def test_a_file_that_is_not_there_is_bad_input(tmp_path):
    done = CliRunner().invoke(app, ["plan", "nowhere.yaml", "--roofline", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "nowhere.yaml" in done.stderr


def test_layers_of_a_split_target_must_be_stated():
    with pytest.raises(ValueError, match=r"target\.num_layers is 1 but must be at least 2"):
        load_hardware(RECIPE, ["split=tensor", "target.num_layers=1"])
