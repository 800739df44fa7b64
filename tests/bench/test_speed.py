"""The headline is what a user saves: total seconds of plain decoding over the arm's."""

import pytest

from specdec.bench.runner import check_results
from specdec.bench.store import Run
from specdec.bench.suites.runner import check_suite
from specdec.bench.summary import (
    decode_work,
    end_to_end_work,
    faster_than_tau,
    mean_ratio,
    total_speed,
)


def runs(*repeats):
    """One prompt: (tokens, seconds after the first token) of each repeat; None failed."""
    return [None if r is None else Run([0] * r[0], 1, 1.0, r[1]) for r in repeats]


def headline(ours, plain):
    return total_speed("x", [decode_work(ours)], [decode_work(plain)])


ONCE = [runs((11, 10.0)), runs((101, 100.0))]  # a second a token


@pytest.mark.parametrize(
    ("ours", "plain", "ratio", "interval"),
    [
        # The short answer is ten times as fast, and saves next to nothing.
        ([runs((11, 1.0)), runs((101, 90.0))], ONCE, 110 / 91, (100 / 90, 10.0)),
        # Another text of another length: tokens a second of all.
        ([runs((21, 10.0)), runs((51, 30.0))], ONCE, 70 / 40, (50 / 30, 2.0)),
        # One slow repeat moves nothing, one that failed takes nothing away.
        ([runs((11, 5.0), (11, 5.0), (11, 99.0)), runs((101, 50.0), None)], ONCE, 2.0, (2.0, 2.0)),
        # What failed, or decoded nothing, in one arm counts in neither.
        ([runs((11, 5.0)), runs(None)], ONCE, 2.0, None),
        ([runs((11, 5.0)), runs((1, 0.0))], ONCE, 2.0, None),
        ([runs(None), runs(None)], ONCE, None, None),
    ],
)
def test_the_headline_is_the_ratio_of_total_times(ours, plain, ratio, interval):
    found = headline(ours, plain)
    assert found["x"] == (ratio and pytest.approx(ratio))
    assert found["x_ci"] == (interval and pytest.approx(interval))
    assert headline(plain, plain) == {"x": 1.0, "x_ci": (1.0, 1.0)}


def test_the_mean_of_ratios_and_the_whole_answer_stand_beside_it():
    ours = [runs((11, 1.0)), runs((101, 90.0))]
    assert mean_ratio(ours, ONCE) == pytest.approx((10 + 100 / 90) / 2)
    both = end_to_end_work(ours), end_to_end_work(ONCE)
    assert total_speed("x", both[:1], both[1:])["x"] == pytest.approx((11 + 101) / (2 + 91))


def arm(speed, low, tau, high, prompts=5):
    return {
        "name": "a",
        "prompts": prompts,
        "tau": tau,
        "tau_ci": tau and (1.0, high),
        "speedup_vs_plain": speed,
        "speedup_vs_plain_ci": (low, 9.0),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            arm(3.0, 2.3, 2.0, 2.0),
            "'a' is 3.00 times as fast as plain decoding (at least 2.30) but",
        ),
        (arm(3.0, 2.1, 2.0, 2.0), None),  # within the noise of a machine
        (arm(3.0, 2.3, 2.0, 2.2), None),  # within tau's own interval
        (arm(3.0, 2.3, 2.0, 2.0, prompts=4), None),  # an interval over next to nothing
        (arm(3.0, 2.3, None, None), None),  # transformers' own arms have no steps
    ],
)
def test_no_arm_is_faster_than_its_tau_by_more_than_noise(given, message):
    said = faster_than_tau({"arms": [given]})
    assert len(said) == bool(message)
    assert (message or "") in "".join(said)


def test_a_bench_or_suite_of_single_rows_with_such_an_arm_fails():
    known = {"failed": 0, "mismatches": 0, "requests": 5}
    arms = [arm(3.0, 2.3, 2.0, 2.0) | known]
    where = {"dtype": "float32", "quantized": False}
    for size, suite, fails in ((1, "single_turn", True), (4, "concurrent", False)):
        bench = {"arms": arms, "provenance": {**where, "config": {"batch_size": size}}}
        groups = {"groups": [{"name": "g", "arms": arms}], "suite": suite, "provenance": where}
        for check, results in ((check_results, bench), (check_suite, groups)):
            if fails:
                with pytest.raises(RuntimeError, match="which no speed can pass"):
                    check(results)
            else:
                check(results)
