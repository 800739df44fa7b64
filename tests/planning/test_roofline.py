"""Roofline estimates against formulas written out, and what is refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.planning.roofline import Estimate, Hardware, estimate, expected_tokens, load_hardware

RECIPE = str(Path(__file__).parents[2] / "recipes" / "roofline-70b.yaml")
A = {"name": "a", "bandwidth_tb_s": 2.0, "compute_tflops": 100.0}
B = {"name": "b", "bandwidth_tb_s": 1.0, "compute_tflops": 50.0}
DRAFTER = {
    **{"name": "D", "parameters_b": 1.0, "bits": 8.0, "kv_bytes_per_token": 1e4},
    **{"device": "b", "alpha": 0.5},
}
HOP_S = 100e-6 + 1000 * 2 / 10e9  # a token's state from device to device


def hardware(**changes):
    """A 10B target of 8 bits on two devices that reach all that is stated."""
    settings = {
        "target": {
            **{"parameters_b": 10.0, "bits": 8.0, "kv_bytes_per_token": 1e5},
            **{"num_layers": 20, "hidden_size": 1000},
        },
        "devices": [A, B],
        "drafters": [DRAFTER],
        "link": {"bandwidth_gb_s": 10.0, "latency_us": 100.0},
        "efficiency": {"bandwidth": 1.0, "compute": 1.0},
        "context": 1000,
    }
    return Hardware(**{**settings, **changes})


def target_s(given, batch_size, new_tokens):
    return given.forward_s(given.target, batch_size, new_tokens)


@pytest.mark.parametrize(
    ("changes", "batch_size", "new_tokens", "wanted_s"),
    [
        # 10 GB of weights and 0.1 GB of cache, two thirds at 2 TB/s and one third at 1 TB/s.
        ({}, 1, 1, 10.1e9 * (2 / 3 / 2e12 + 1 / 3 / 1e12) + HOP_S),
        # Tensors wait for the slowest device, and travel twice a layer.
        (
            {"split": "tensor", "devices": [{**A, "share": 0.5}, {**B, "share": 0.5}]},
            *(1, 1, 0.5 * 10.1e9 / 1e12 + 2 * 20 * HOP_S),
        ),
        # 2 operations a weight and token, at 50 TFLOP/s.
        ({"devices": [B]}, 16, 64, 2 * 10e9 * 64 * 16 / 50e12),
    ],
)
def test_a_forward_takes_what_its_formula_says(changes, batch_size, new_tokens, wanted_s):
    assert target_s(hardware(**changes), batch_size, new_tokens) == pytest.approx(wanted_s)


def test_efficiency_and_overhead_lengthen_a_forward():
    late = {**DRAFTER, "overhead_us": 50.0}
    half = hardware(efficiency={"bandwidth": 0.5, "compute": 1.0}, drafters=[late])
    assert half.forward_s(half.drafters[0], 1, 1) == pytest.approx(1.01e9 / 0.5e12 + 50e-6)


@pytest.mark.parametrize(
    ("alpha", "wanted"),
    [
        (0.0, [1, 1, 1]),
        (0.8, [(1 - 0.8 ** (n + 1)) / (1 - 0.8) for n in range(7)]),
        (1.0, [1, 2, 3, 4, 5, 6]),
        # The last one holds behind the list's end.
        ([0.8, 0.5], [1, 1.8, 2.2, 2.4, 2.5]),
    ],
)
def test_expected_tokens_sum_products_of_alphas(alpha, wanted):
    assert expected_tokens(alpha, len(wanted) - 1) == pytest.approx(wanted)


def test_the_best_length_is_the_fastest_tried():
    given = hardware(max_draft_tokens=6)
    (found,) = estimate(given).drafters
    speeds = [row.estimated_speedup for row in found.lengths]
    assert (len(speeds), speeds[0]) == (7, 1.0)
    assert found.best.estimated_speedup == max(speeds)
    step_s = 2 * given.forward_s(given.drafters[0], 1, 1) + target_s(given, 1, 3)
    assert speeds[2] == pytest.approx(1.75 * target_s(given, 1, 1) / step_s)
    never = hardware(drafters=[{**DRAFTER, "alpha": 0.0}])
    assert estimate(never).drafters[0].best.num_draft_tokens == 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, ""),
        (
            {"devices": [{**A, "memory_gb": 4.0}, {**B, "memory_gb": 24.0}]},
            "DOES NOT FIT: a holds 4 GB but its share of the target takes 6.",
        ),
        (
            {"devices": [{**A, "memory_gb": 24.0}, {**B, "memory_gb": 4.0}]},
            "DOES NOT FIT: b holds 4 GB but its share of the target with the drafter D takes 4.4 ",
        ),
        (
            {"drafters": [{**DRAFTER, "kv_bytes_per_token": 0.0}]},
            "keys and values of D are left out",
        ),
    ],
)
def test_missing_memory_and_caches_are_told(changes, line):
    found = [
        each
        for each in estimate(hardware(**changes)).assumptions
        if each.startswith(("DOES NOT FIT", "keys and values"))
    ]
    assert len(found) == bool(line)
    assert "".join(found).startswith(line)


def test_the_command_estimates_and_says_its_assumptions(tmp_path):
    done = CliRunner().invoke(app, ["plan", RECIPE, "--roofline", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "ESTIMATE from stated parameters" in done.stdout
    assert "It assumes:" in done.stdout
    written = json.loads((tmp_path / "estimate.json").read_text())
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["label"] == written["label"] == "estimate: nothing here was measured"
    assert {row["name"] for row in last["best"]} == {"1B", "3B", "8B"}
    figures = {key for row in written["drafters"] for key in row["best"]}
    assert {key for key in figures if not key.startswith("estimated_")} == {"num_draft_tokens"}
    assert Estimate.read(written).drafters[0].best.estimated_speedup > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["drafters.0.alpha=1.2"], r"drafters\.0\.alpha is 1\.2 but must be a number in \[0, 1\]"),
        (["drafters.1.alpha=[0.5,-1]"], r"drafters\.1\.alpha"),
        (["drafters.0.alpha=[]"], r"drafters\.0\.alpha"),
        (["drafters.0.device=third"], "'third' but must be one of fast, slow"),
        (["devices.0.bandwidth=2"], r"devices\.0\.bandwidth does not exist; did you mean"),
        (["devices.0.bandwidth_tb_s=0"], "bandwidth_tb_s is 0 but must be above 0"),
        (["devices.0.bandwidth_tb_s=.inf"], "bandwidth_tb_s is inf but must be a finite number"),
        (["devices.0.share=0.5"], "must sum to 1"),
        (["devices.1.name=fast"], "must differ"),
        (["devices=[]"], r"devices is \[\] but must be a list of at least 1"),
        (["drafters=[]"], r"drafters is \[\] but must be a list of at least 1"),
        (["split=rows"], "split is 'rows' but must be one of 'pipeline' or 'tensor'"),
        (["efficiency.bandwidth=1.5"], r"efficiency\.bandwidth is 1\.5 but must be at most 1"),
        (["batch_sizes=[0]"], "batch_sizes"),
        (["target.hidden_size=0"], r"target\.hidden_size is 0 but must be above 0"),
        (["target.bits=0"], r"target\.bits is 0 but must be above 0"),
        (["split=tensor", "target.num_layers=1"], "num_layers is 1 but must be at least 2"),
    ],
)
def test_bad_parameters_are_refused_by_name(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_hardware(RECIPE, overrides)


def test_a_missing_file_is_bad_input(tmp_path):
    done = CliRunner().invoke(app, ["plan", "nowhere.yaml", "--roofline", "--out", str(tmp_path)])
    assert (done.exit_code, "nowhere.yaml" in done.stderr) == (2, True)
