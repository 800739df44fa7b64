"""Figures of suites against cases worked out by hand."""

import pytest

from specdec.bench.store import Memory
from specdec.bench.suites.store import Call, Power, Served
from specdec.bench.suites.summary import load_figures, summarise
from specdec.bench.workloads import Ask, Group
from specdec.common.stats import jain_index, percentiles, worst_over_mean
from specdec.engine.metrics import StepRecord

NO_MEMORY = Memory(0, None, None)


def ask(name, user=0):
    return Ask(name, "maths", [1, 2], 8, 0, user)


def served(chunk_s, chunk_tokens, sent_s=0.0, queue_s=0.0, records=()):
    tokens = list(range(sum(chunk_tokens)))
    return Served(tokens, sent_s, queue_s, chunk_s, chunk_tokens, list(records))


def call(*rows, power=Power()):  # noqa: B008 (frozen)
    return Call(list(rows), max(row.end_s for row in rows), NO_MEMORY, power)


def failed(*rows):
    return Call(list(rows), None, NO_MEMORY, Power())


def test_percentiles_lie_linearly_between_two_values():
    wanted = (50, 95, 99)
    found = percentiles([4.0, 1.0, 3.0, 2.0, 5.0], wanted)
    # Five values: the p-th percentile is at place 4 p / 100, counted from 0.
    assert found == pytest.approx({"p50": 3.0, "p95": 4.8, "p99": 4.96})
    assert percentiles([7.0], wanted) == {"p50": 7.0, "p95": 7.0, "p99": 7.0}
    assert percentiles([], wanted) == {}


def test_jain_s_index_is_one_for_equal_speeds_and_one_over_n_where_one_gets_all():
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([1.0, 2.0, 3.0]) == pytest.approx(36 / (3 * 14))
    assert jain_index([0.0, 0.0]) is None


def test_the_worst_user_is_told_as_a_share_of_the_mean():
    assert worst_over_mean([1.0, 2.0, 3.0]) == pytest.approx(0.5)
    assert worst_over_mean([0.0, 0.0]) is None


def test_a_request_s_waits_are_counted_from_its_sending():
    one = served([1.5, 2.0, 3.0], [1, 3, 2], sent_s=0.5, queue_s=0.25)
    assert one.run.ttft_s == pytest.approx(1.0)
    assert one.run.decode_s == pytest.approx(1.5)
    assert one.gaps_s == pytest.approx([0.5, 1.0])
    group = Group("one", 1, [[ask("a")]])
    figures = summarise("arm", group, [[call(one)]], [[call(one)]], [], has_load=False)
    # Five tokens after the first, in 1.5 s: a mean gap of 0.3 s, while chunks are 0.75 s apart.
    assert figures["itl_s"]["p50"] == pytest.approx(0.3)
    assert figures["chunk_gap_s"]["p50"] == pytest.approx(0.75)
    assert figures["queue_s"]["p99"] == pytest.approx(0.25)
    assert figures["latency_s"]["p50"] == pytest.approx(2.5)
    assert figures["decode_tokens_per_s"] == pytest.approx(5 / 1.5)


def test_waits_are_percentiles_over_requests_of_the_median_of_their_repeats():
    group = Group("two", 1, [[ask("a")], [ask("b")]])

    def one(first_s, last_s, queue_s):
        return call(served([first_s, last_s], [1, 2], queue_s=queue_s))

    calls = [
        [one(1.0, 2.0, 0.1), one(9.0, 19.0, 0.9), one(2.0, 4.0, 0.2)],
        [one(4.0, 8.0, 0.4), one(4.0, 8.0, 0.4), one(4.0, 8.0, 0.4)],
    ]
    figures = summarise("arm", group, calls, calls, [], has_load=False)
    # Medians of the first request and of the second; the slow repeat is none of its own request.
    for key, (low, high) in {
        "ttft_s": (2.0, 4.0),
        "itl_s": (1.0, 2.0),
        "queue_s": (0.2, 0.4),
        "latency_s": (4.0, 8.0),
    }.items():
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        wanted = {name: low + share * (high - low) for name, share in shares.items()}
        assert figures[key] == pytest.approx(wanted), key
    # A request has many gaps, so all count: 1, 10, 2, and three times 4 s.
    assert figures["chunk_gap_s"]["p50"] == pytest.approx(4.0)
    assert figures["chunk_gap_s"]["p99"] == pytest.approx(10 - 0.05 * 6)


def test_a_request_that_failed_once_keeps_the_waits_of_its_other_repeats():
    good, slow = call(served([1.0, 2.0], [1, 3])), call(served([3.0, 6.0], [1, 3]))
    group = Group("one", 1, [[ask("a")]])
    calls = [[good, failed("RuntimeError: no"), slow]]
    figures = summarise("arm", group, calls, calls, [], has_load=False)
    assert figures["ttft_s"] == {"p50": 2.0, "p95": 2.0, "p99": 2.0}
    calls = [[failed("RuntimeError: no")]]
    figures = summarise("arm", group, calls, calls, [], has_load=False)
    assert figures["ttft_s"] == figures["chunk_gap_s"] == {}


def test_speeds_are_paired_by_request_and_the_median_of_the_repeats_counts():
    group = Group("two", 1, [[ask("a")], [ask("b")]])
    slow = [[call(served([1.0, 3.0], [1, 4]))] * 3, [call(served([1.0, 5.0], [1, 4]))] * 3]
    times = ((2.0, 3.0, 2.0), (2.0, 2.0, 9.0))  # when the second chunk came, by repeat
    ours = [[call(served([1.0, end], [1, 4])) for end in ends] for ends in times]
    figures = summarise("arm", group, ours, slow, [], has_load=False)
    # Two and four seconds against one each.
    assert figures["speedup_vs_plain"] == pytest.approx(6 / 2)
    low, high = figures["speedup_vs_plain_ci"]
    assert (low, high) == pytest.approx((2, 4))
    # With the prefill: 5 tokens in 3 s against 2 s, and in 5 s against 2 s.
    assert figures["end_to_end_speedup_vs_plain"] == pytest.approx((3 + 5) / (2 + 2))


def test_tau_and_its_depths_are_of_the_steps_of_all_requests():
    steps = [
        StepRecord(0, 0, 1, 3, 2, 3, 3, 0.1, 0.2, 0.4, 0.05, 0.01),
        StepRecord(0, 1, 1, 3, 0, 1, 1, 0.1, 0.2, 0.4, 0.05, 0.01),
    ]
    one = served([1.0, 2.0, 3.0], [1, 3, 1], records=steps)
    group = Group("one", 1, [[ask("a")]])
    figures = summarise("arm", group, [[call(one)]], [[call(one)]], [], has_load=False)
    assert figures["tau"] == pytest.approx(2.0)
    assert figures["per_depth"] == pytest.approx([0.5, 0.5, 0.0])
    assert figures["acceptance_rate"] == pytest.approx(2 / 6)
    assert figures["time_s"]["verify"] == pytest.approx(0.1)
    assert figures["time_s"]["wall"] == pytest.approx(0.8)


def load(calls, plain):
    asks = [ask("a", 0), ask("b", 1), ask("c", 0)]
    return load_figures(asks, calls, plain)


def test_a_load_s_figures_add_up_users_and_requests():
    # User 0: 4 tokens in 2 s and 2 tokens in 2 s; user 1: 8 tokens in 8 s.
    ours = call(
        served([1.0, 2.0], [1, 3]),
        served([1.0, 3.0, 8.0], [1, 3, 4]),
        served([3.0, 4.0], [1, 1], sent_s=2.0),
    )
    # Twice as slow.
    plain = call(
        served([2.0, 4.0], [1, 3]),
        served([2.0, 6.0, 16.0], [1, 3, 4]),
        served([6.0, 8.0], [1, 1], sent_s=4.0),
    )
    figures = load([ours], [plain])
    assert figures["users"] == 2
    assert figures["tokens_per_s"] == pytest.approx(14 / 8)
    assert figures["tokens_per_s_vs_plain"] == pytest.approx(2.0)
    # User 0 has nothing left to ask after 4 s, when 10 tokens had come.
    assert figures["full_load_tokens_per_s"] == pytest.approx(10 / 4)
    assert figures["user_tokens_per_s"] == pytest.approx([6 / 4, 8 / 8])
    assert figures["user_tokens_per_s_mean"] == pytest.approx(1.25)
    assert figures["jain_index"] == pytest.approx(2.5**2 / (2 * (1.5**2 + 1)))
    assert figures["worst_over_mean"] == pytest.approx(1 / 1.25)
    assert figures["user_speed_vs_plain"] == pytest.approx(2.0)
    assert figures["user_speed_vs_plain_ci"] == pytest.approx((2.0, 2.0))


def test_a_user_s_speed_weighs_requests_by_the_time_waited():
    ours = [call(served([1.0, 2.0], [1, 1]), served([1.0, 2.0], [1, 1]))]
    plain = [call(served([1.0, 2.0], [1, 1]), served([1.0, 10.0], [1, 1]))]
    figures = load_figures([ask("a", 0), ask("b", 1)], ours, plain)
    # 4 tokens in 2 + 2 s against 4 in 2 + 10 s; the plain mean of the ratios is also 3.
    assert figures["user_speed_vs_plain"] == pytest.approx(3.0)
    low, high = figures["user_speed_vs_plain_ci"]
    assert (low, high) == pytest.approx((1.0, 5.0))


def test_a_call_with_a_failure_is_not_timed_but_its_other_requests_keep_their_waits():
    good = call(served([1.0, 2.0], [1, 3]), served([1.0, 2.0], [1, 3]))
    bad = failed(served([9.0, 99.0], [1, 3]), "RuntimeError: no")
    group = Group("2 users", 2, [[ask("a", 0), ask("b", 1)]])
    figures = summarise("arm", group, [[good, bad]], [[good, good]], [], has_load=True)
    assert figures["failed"] == 1
    assert figures["failures"] == [{"request": "b", "repeat": 1, "reason": "RuntimeError: no"}]
    assert figures["load"]["tokens_per_s"] == pytest.approx(8 / 2)
    assert figures["ttft_s"]["p99"] > 1.0
    nothing = summarise("arm", group, [[bad]], [[bad]], [], has_load=True)
    assert nothing["load"]["tokens_per_s"] is None
    assert nothing["load"]["jain_index"] is None


def test_energy_is_told_by_token_where_it_was_measured():
    rows = [served([1.0, 2.0], [1, 3])]
    group = Group("one", 1, [[ask("a")]])
    calls = [[call(*rows, power=Power(30.0, 15.0)), call(*rows, power=Power(50.0, 25.0))]]
    measured = summarise("arm", group, calls, calls, [], has_load=False)["power"]
    assert measured == {"energy_j": 80.0, "power_w": 20.0, "energy_j_per_token": 10.0}
    without = summarise("arm", group, [[call(*rows)]], [[call(*rows)]], [], has_load=False)
    assert set(without["power"].values()) == {None}
