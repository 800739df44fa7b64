"""Figures against cases worked out by hand."""

import pytest

from specdec.bench.config import ArmConfig, BenchConfig, ConcurrentConfig, SingleTurnConfig
from specdec.bench.figures import load_figures
from specdec.bench.measure import Call, Run
from specdec.bench.results import BenchResults, Memory
from specdec.bench.runner import check_results
from specdec.bench.summary import bench_arms, faster_than_tau, suite_group
from specdec.bench.workloads import Group, Request
from specdec.common.stats import jain_index, percentiles, worst_over_mean
from specdec.engine.metrics import StepRecord

NO_MEMORY = Memory(peak_rss_bytes=0, peak_device_bytes=None, cache_bytes=None)


def requests_of(*users):
    return [Request(str(i), "maths", [1, 2], 8, 0, user) for i, user in enumerate(users)]


def served(chunk_s, chunk_tokens, sent_s=0.0, queue_s=0.0, records=()):
    """A run whose chunks came at these times."""
    times = chunk_s[0] - sent_s - queue_s, chunk_s[-1] - chunk_s[0]
    rest = list(records), sent_s, queue_s, chunk_s, chunk_tokens
    return Run(list(range(sum(chunk_tokens))), chunk_tokens[0], *times, *rest)


def call(*rows, **used):
    is_whole = all(isinstance(row, Run) for row in rows)
    wall_s = max(row.chunk_s[-1] for row in rows) if is_whole else None
    return Call(list(rows), wall_s, NO_MEMORY, **used)


# --- Benches ---


def timed(num_tokens, decode_s, ttft_s=1.0):
    return served([ttft_s, ttft_s + decode_s], [1, num_tokens - 1])


def repeats(*rows):
    """Calls of one prompt: arguments of `timed` for each repeat; None failed."""
    return [call("no" if row is None else timed(*row)) for row in rows]


def bench_arm(ours, plain=None, eos=()):
    """The figures of an arm with these calls."""
    calls = {"plain": plain or ours, "hf_generate": plain or ours, "ngram": ours}
    config = BenchConfig(arms=[ArmConfig(type="ngram")])
    group = Group("prompts", len(ours), [[each] for each in requests_of(*[0] * len(ours))])
    return bench_arms(config, group, calls, {name: [] for name in calls}, eos)[-1]


ONCE = [repeats((11, 10.0)), repeats((101, 100.0))]  # a second a token


@pytest.mark.parametrize(
    ("ours", "ratio", "interval"),
    [
        # The short answer is ten times as fast, and saves next to nothing.
        ([repeats((11, 1.0)), repeats((101, 90.0))], 110 / 91, (100 / 90, 10.0)),
        # Another text of another length: tokens a second of all.
        ([repeats((21, 10.0)), repeats((51, 30.0))], 70 / 40, (50 / 30, 2.0)),
        # What failed, or decoded nothing, in one arm counts in neither.
        ([repeats((11, 5.0)), repeats(None)], 2.0, None),
        ([repeats((11, 5.0)), repeats((1, 0.0))], 2.0, None),
        ([repeats(None), repeats(None)], None, None),
        (ONCE, 1.0, (1.0, 1.0)),
    ],
)
def test_headline_is_the_ratio_of_total_times(ours, ratio, interval):
    found = bench_arm(ours, ONCE)
    assert found.speedup_vs_plain == (ratio and pytest.approx(ratio))
    assert found.speedup_vs_plain_ci == (interval and pytest.approx(interval))


def test_slow_repeat_moves_nothing():
    ours = [repeats((11, 5.0), (11, 5.0), (11, 99.0)), repeats((101, 50.0), None, (101, 50.0))]
    found = bench_arm(ours, [each * 3 for each in ONCE])
    assert found.speedup_vs_plain == pytest.approx(2.0)
    assert found.failed == 1


def test_other_ratios_stand_beside_the_headline():
    found = bench_arm([repeats((11, 1.0)), repeats((101, 90.0))], ONCE)
    assert found.mean_speedup_vs_plain == pytest.approx((10 + 100 / 90) / 2)
    assert found.end_to_end_speedup_vs_plain == pytest.approx((11 + 101) / (2 + 91))


def test_ended_answer_is_told_from_a_cut_one():
    ours = [[call(Run([5, last], 1, 0.1, 0.1, [], 0, 0, [0.1]))] for last in (7, 6)]
    found = bench_arm([*ours, repeats(None)], eos=[7])
    assert found.finish.model_dump() == {"eos": 1, "length": 1}
    assert [row and row.finish for row in found.per_prompt] == ["eos", "length", None]


def test_bench_waits_are_percentiles_of_medians():
    ours = [
        repeats((3, 0.2, 1.0), (3, 0.2, 9.0), (3, 0.8, 2.0)),
        repeats((3, 0.4, 3.0), None, (3, 1.2, 5.0)),
        repeats(None, None, None),
    ]
    found = bench_arm(ours)
    # Medians: 2 and 4 s to the first token, 0.1 and 0.4 s a token; a failed run has no time.
    assert found.ttft_s == pytest.approx({"p50": 3.0, "p90": 3.8, "p99": 3.98})
    assert found.itl_s == pytest.approx({"p50": 0.25, "p90": 0.37, "p99": 0.397})
    assert bench_arm([repeats(None)]).ttft_s == {}


@pytest.mark.parametrize(
    ("low", "tau", "high", "prompts", "batch_size", "fails"),
    [
        (2.3, 2.0, 2.0, 5, 1, True),
        (2.1, 2.0, 2.0, 5, 1, False),  # within the noise of a machine
        (2.3, 2.0, 2.2, 5, 1, False),  # within tau's own interval
        (2.3, 2.0, 2.0, 4, 1, False),  # an interval over next to nothing
        (2.3, None, None, 5, 1, False),  # transformers' own arms have no steps
        (2.3, 2.0, 2.0, 5, 4, False),  # rows that end early make a batch cheaper
    ],
)
def test_arm_faster_than_its_tau_fails_the_run(low, tau, high, prompts, batch_size, fails):
    changes = {
        **{"name": "a", "tau": tau, "tau_ci": tau and (1.0, high), "prompts": prompts},
        **{"speedup_vs_plain": 3.0, "speedup_vs_plain_ci": (low, 9.0)},
    }
    where = {
        **{"command": "x", "git_commit": None, "git_dirty": False, "versions": {}, "date": ""},
        **{"device": "cpu", "cpu": "", "cpu_count": 1, "threads": 1, "load_average": 0.0},
        **{"dtype": "float32", "quantized": False, "config_fingerprint": ""},
        "config": BenchConfig(batch_size=batch_size),
    }
    arm = bench_arm(ONCE).model_copy(update=changes)
    results = BenchResults(provenance=where, memory=NO_MEMORY, arms=[arm])
    said = faster_than_tau(results)
    assert len(said) == fails
    if fails:
        assert "'a' is 3.00 times as fast as plain decoding (at least 2.30) but" in said[0]
        with pytest.raises(RuntimeError, match="which no speed can pass"):
            check_results(results)
    else:
        check_results(results)


# --- Suites ---


def suite_arm(calls, plain=None, config=None):
    """The figures of an arm whose call is of users that ask once."""
    users = [range(len(each[0].rows)) for each in calls]
    group = Group("some", 1, [requests_of(*each) for each in users])
    calls = {"plain": plain or calls, "arm": calls}
    return suite_group(config or SingleTurnConfig(), group, calls, {"plain": [], "arm": []}).arms[1]


def test_percentiles_lie_linearly_between_two_values():
    wanted = (50, 95, 99)
    found = percentiles([4.0, 1.0, 3.0, 2.0, 5.0], wanted)
    # Five values: the p-th percentile is at place 4 p / 100, counted from 0.
    assert found == pytest.approx({"p50": 3.0, "p95": 4.8, "p99": 4.96})
    assert percentiles([7.0], wanted) == {"p50": 7.0, "p95": 7.0, "p99": 7.0}
    assert percentiles([], wanted) == {}


def test_fairness_is_one_for_equal_speeds():
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([1.0, 2.0, 3.0]) == pytest.approx(36 / (3 * 14))
    assert worst_over_mean([1.0, 2.0, 3.0]) == pytest.approx(0.5)
    assert jain_index([0.0, 0.0]) is worst_over_mean([0.0, 0.0]) is None


def test_waits_of_a_request_begin_with_its_sending():
    one = served([1.5, 2.0, 3.0], [1, 3, 2], sent_s=0.5, queue_s=0.25)
    figures = suite_arm([[call(one)]])
    assert figures.ttft_s["p50"] == pytest.approx(1.0)
    # Five tokens after the first, in 1.5 s: a mean gap of 0.3 s, while chunks are 0.75 s apart.
    assert figures.itl_s["p50"] == pytest.approx(0.3)
    assert figures.chunk_gap_s["p50"] == pytest.approx(0.75)
    assert figures.queue_s["p99"] == pytest.approx(0.25)
    assert figures.latency_s["p50"] == pytest.approx(2.5)
    assert figures.decode_tokens_per_s == pytest.approx(5 / 1.5)


def test_suite_waits_are_percentiles_of_medians():
    def one(first_s, last_s, queue_s):
        return call(served([first_s, last_s], [1, 2], queue_s=queue_s))

    calls = [
        [one(1.0, 2.0, 0.1), one(9.0, 19.0, 0.9), one(2.0, 4.0, 0.2)],
        [one(4.0, 8.0, 0.4), one(4.0, 8.0, 0.4), one(4.0, 8.0, 0.4)],
    ]
    figures = suite_arm(calls)
    # Medians of the first request and of the second; the slow repeat is none of its own request.
    medians = {
        **{"ttft_s": (2.0, 4.0), "itl_s": (1.0, 2.0)},
        **{"queue_s": (0.2, 0.4), "latency_s": (4.0, 8.0)},
    }
    for key, (low, high) in medians.items():
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
        wanted = {name: low + share * (high - low) for name, share in shares.items()}
        assert getattr(figures, key) == pytest.approx(wanted), key
    # A request has many gaps, so all count: 1, 10, 2, and three times 4 s.
    assert figures.chunk_gap_s["p50"] == pytest.approx(4.0)
    assert figures.chunk_gap_s["p99"] == pytest.approx(10 - 0.05 * 6)


def test_suite_speeds_are_paired_by_request():
    slow = [[call(served([1.0, 3.0], [1, 4]))] * 3, [call(served([1.0, 5.0], [1, 4]))] * 3]
    times = ((2.0, 3.0, 2.0), (2.0, 2.0, 9.0))  # when the second chunk came, by repeat
    ours = [[call(served([1.0, end], [1, 4])) for end in ends] for ends in times]
    figures = suite_arm(ours, slow)
    # Two and four seconds against one each.
    assert figures.speedup_vs_plain == pytest.approx(6 / 2)
    assert figures.speedup_vs_plain_ci == pytest.approx((2, 4))
    # With the prefill: 5 tokens in 3 s against 2 s, and in 5 s against 2 s.
    assert figures.end_to_end_speedup_vs_plain == pytest.approx((3 + 5) / (2 + 2))


def test_tau_and_its_depths_are_of_all_steps():
    steps = [
        StepRecord(0, 0, 1, 3, 2, 3, 3, 0.1, 0.2, 0.4, 0.05, 0.01),
        StepRecord(0, 1, 1, 3, 0, 1, 1, 0.1, 0.2, 0.4, 0.05, 0.01),
    ]
    figures = suite_arm([[call(served([1.0, 2.0, 3.0], [1, 3, 1], records=steps))]])
    assert figures.tau == pytest.approx(2.0)
    assert figures.per_depth == pytest.approx([0.5, 0.5, 0.0])
    assert figures.acceptance_rate == pytest.approx(2 / 6)
    assert figures.time_s.verify == pytest.approx(0.1)
    assert figures.time_s.wall == pytest.approx(0.8)
    assert figures.time_s.other == pytest.approx(0.8 - 0.2 - 0.4 - 0.1 - 0.02)


def test_load_adds_up_users_and_requests():
    def rows(slower):
        # User 0: 4 tokens in 2 s and 2 tokens in 2 s; user 1: 8 tokens in 8 s.
        return call(
            served([slower * 1.0, slower * 2.0], [1, 3]),
            served([slower * 1.0, slower * 3.0, slower * 8.0], [1, 3, 4]),
            served([slower * 3.0, slower * 4.0], [1, 1], sent_s=slower * 2.0),
        )

    figures = load_figures(requests_of(0, 1, 0), [rows(1)], [rows(2)])
    assert figures.users == 2
    assert figures.tokens_per_s == pytest.approx(14 / 8)
    assert figures.tokens_per_s_vs_plain == pytest.approx(2.0)
    # User 0 has nothing left to ask after 4 s, when 10 tokens had come.
    assert figures.full_load_tokens_per_s == pytest.approx(10 / 4)
    assert figures.user_tokens_per_s == pytest.approx([6 / 4, 8 / 8])
    assert figures.user_tokens_per_s_mean == pytest.approx(1.25)
    assert figures.jain_index == pytest.approx(2.5**2 / (2 * (1.5**2 + 1)))
    assert figures.worst_over_mean == pytest.approx(1 / 1.25)
    assert figures.user_speed_vs_plain == pytest.approx(2.0)
    assert figures.user_speed_vs_plain_ci == pytest.approx((2.0, 2.0))


def test_user_speed_weighs_requests_by_time_waited():
    ours = [call(served([1.0, 2.0], [1, 1]), served([1.0, 2.0], [1, 1]))]
    plain = [call(served([1.0, 2.0], [1, 1]), served([1.0, 10.0], [1, 1]))]
    figures = load_figures(requests_of(0, 1), ours, plain)
    # 4 tokens in 2 + 2 s against 4 in 2 + 10 s; the plain mean of the ratios is also 3.
    assert figures.user_speed_vs_plain == pytest.approx(3.0)
    assert figures.user_speed_vs_plain_ci == pytest.approx((1.0, 5.0))


def test_call_with_a_failure_is_not_timed():
    good = call(served([1.0, 2.0], [1, 3]), served([1.0, 2.0], [1, 3]))
    bad = call(served([9.0, 99.0], [1, 3]), "RuntimeError: no")
    figures = suite_arm([[good, bad]], [[good, good]], ConcurrentConfig())
    assert figures.failed == 1
    (failure,) = figures.failures
    assert failure.model_dump() == {"request": "1", "repeat": 1, "reason": "RuntimeError: no"}
    assert figures.load.tokens_per_s == pytest.approx(8 / 2)
    assert figures.ttft_s["p99"] > 1.0
    nothing = suite_arm([[bad]], config=ConcurrentConfig())
    assert nothing.load.tokens_per_s is nothing.load.jain_index is None


def test_energy_is_told_by_token_where_measured():
    one = served([1.0, 2.0], [1, 3])
    measured = suite_arm([[call(one, energy_j=30.0), call(one, energy_j=50.0)]]).power
    told = {"energy_j": 80.0, "power_w": 20.0, "energy_j_per_token": 10.0, "tokens_per_j": 0.1}
    assert measured.model_dump(exclude_none=True) == told
    assert set(suite_arm([[call(one)]]).power.model_dump().values()) == {None}


def test_use_of_the_machine_is_over_the_seconds_of_whole_calls():
    one = served([1.0, 2.0], [1, 3])
    calls = [call(one, cpu_s=3.0, gpu_busy_s=1.0, gpu_memory_bytes=5.0), call(one, cpu_s=1.0)]
    failed = call("RuntimeError: no", cpu_s=99.0, gpu_memory_bytes=99.0)
    used = suite_arm([[*calls, failed]]).power
    assert used.model_dump(exclude_none=True) == {
        **{"cpu_cores": 1.0, "gpu_utilization": 0.5, "gpu_memory_bytes": 5.0}
    }
