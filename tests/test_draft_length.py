"""Draft lengths: schedules, and what the online controller makes of simulated acceptance."""

import random
from itertools import pairwise

import numpy as np
import pytest

from specdec import OnlineController, Schedule, StepRecord

# Seconds of a step on a small machine: plain, then drafting each level and verifying.
VERIFY_MS = {1: 4.5, 2: 4.3, 4: 4.7, 6: 5.0, 8: 5.2}
STEP_S = {1: {0: 3.8e-3, **{n: (0.9 * n + ms) / 1e3 for n, ms in VERIFY_MS.items()}}}
# A chain of eight drafted by heads at once: the longest draft costs little more than the shortest.
CHEAP = {1: {0: 1.0, 1: 1.2, 8: 1.4}}


class Text:
    """Text on which a chain is accepted with these chances by depth, the last one from there on."""

    def __init__(self, chances, seed=0):
        self.chances, self.random = chances, random.Random(seed)

    def chance(self, depth):
        return self.chances[min(depth, len(self.chances) - 1)]

    def accepted(self, nodes):
        count = 0
        while count < nodes and self.random.random() < self.chance(count):
            count += 1
        return count

    def expected(self, nodes):
        total, reached = 0.0, 1.0
        for depth in range(nodes):
            reached *= self.chance(depth)
            total += reached
        return total


class Tree(Text):
    """Text on which a tree of n nodes is worth a chain of log2(1 + n), rounded down."""

    def accepted(self, nodes):
        return super().accepted((nodes + 1).bit_length() - 1)

    def expected(self, nodes):
        return super().expected((nodes + 1).bit_length() - 1)


def cost(step_s, nodes):
    """A step's seconds, interpolated as the controller should."""
    return float(np.interp(nodes, list(step_s), list(step_s.values())))


def decode(controller, text, num_steps, step_s=STEP_S, batch_size=1):
    """Seconds per token over those of plain decoding, and the drafts that were chosen."""
    costs, seconds, num_tokens, chosen = step_s.get(batch_size, step_s[max(step_s)]), 0.0, 0.0, []
    for step in range(num_steps):
        nodes = controller.choose(batch_size)
        counts = [text.accepted(nodes) for _ in range(batch_size)]
        controller.learn(
            [
                StepRecord(row, step, batch_size, nodes, n, min(n + 1, nodes), n + 1, 0.0, 0.0, 0.0)
                for row, n in enumerate(counts)
            ]
        )
        seconds += cost(costs, nodes)
        num_tokens += 1 + sum(counts) / batch_size
        chosen.append(nodes)
    return seconds / num_tokens / costs[0], chosen


def best(text, costs):
    """The least seconds per token of any fixed length, over those of plain decoding."""
    lengths = range(max(costs) + 1)
    return min(cost(costs, n) / (1 + text.expected(n)) for n in lengths) / costs[0]


def test_schedule_takes_largest_batch_size_not_above():
    schedule = Schedule({1: 6, 4: 3, 8: 0, 16: None})
    assert [schedule.choose(size) for size in (1, 3, 4, 7, 8, 15, 16, 99)] == (
        [6, 6, 3, 3, 0, 0, None, None]
    )


EASY = [[0.6], [0.8], [0.9], [0.95], [0.8, 0.6, 0.4], [0.6, 0.8, 0.9], [0.99] * 3 + [0.1]]


@pytest.mark.parametrize("chances", EASY, ids=str)
def test_controller_nears_the_best_fixed_length(chances):
    took = [decode(OnlineController(STEP_S), Text(chances, seed), 2000)[0] for seed in range(4)]
    assert sum(took) / 4 < 1.03 * best(Text(chances), STEP_S[1])


@pytest.mark.parametrize("chances", [[0.0], [0.1], [0.3], [0.4, 0.1]], ids=str)
@pytest.mark.parametrize("num_steps", [64, 300, 1500])
def test_hostile_text_costs_under_three_percent(chances, num_steps):
    for seed in range(8):
        took, _ = decode(OnlineController(STEP_S), Text(chances, seed), num_steps)
        assert took < 1.03


def test_hopeless_text_is_probed_ever_less():
    _, chosen = decode(OnlineController(STEP_S), Text([0.0]), 2500)
    drafts = [step for step, nodes in enumerate(chosen) if nodes]
    pauses = [after - before for before, after in pairwise(drafts)]
    assert max(chosen) <= 2
    assert pauses[0] < pauses[-1] <= 90
    assert len(drafts) > 25


def test_controller_follows_a_change_of_text():
    for seed in range(6):
        controller = OnlineController(STEP_S)
        decode(controller, Text([0.02], seed), 1000)
        took, _ = decode(controller, Text([0.85], seed), 600)
        assert took < 1.15 * best(Text([0.85]), STEP_S[1])
        took, _ = decode(controller, Text([0.02], seed), 600)
        assert took < 1.03


def test_alternating_texts_save_time_in_total():
    controller, saved = OnlineController(STEP_S), 0.0
    for turn in range(30):
        chances = [0.85] if turn % 2 else [0.0]
        took, chosen = decode(controller, Text(chances, turn), 40)
        saved += (1 - took) * len(chosen)
    assert saved > 0


def test_measured_acceptance_sets_the_start():
    _, naive = decode(OnlineController(CHEAP), Text([0.9]), 3, CHEAP)
    _, told = decode(OnlineController(CHEAP, [0.02]), Text([0.9]), 3, CHEAP)
    assert naive[0] > 0
    assert told[0] <= 1


def test_controller_never_drafts_where_none_pays():
    dear = {16: {0: 1.0, 1: 2.1, 4: 5.5}}
    _, chosen = decode(OnlineController(dear), Text([1.0]), 500, dear, batch_size=16)
    assert set(chosen) == {0}


def test_nearest_batch_size_sets_the_cost():
    both = {1: CHEAP[1], 16: {0: 1.0, 8: 20.0}}
    controller = OnlineController(both)
    decode(controller, Text([1.0]), 100, both)
    assert controller.choose(1) == controller.choose(6) == 8
    assert controller.choose(12) == controller.choose(40) == 0


def test_pause_outlasts_a_change_of_batch_size():
    sizes = dict.fromkeys((1, 2, 4, 8), STEP_S[1])
    controller = OnlineController(sizes)
    decode(controller, Text([0.0]), 500, sizes)
    asked = [controller.choose(size) for size in (2, 4, 8, 1)]
    assert sum(nodes > 0 for nodes in asked) <= 1


def test_all_rows_of_a_batch_teach():
    alone, together = OnlineController(STEP_S), OnlineController(STEP_S)
    text = Text([0.9])
    decode(alone, text, 12)
    decode(together, text, 12, batch_size=8)
    assert together.choose(1) >= alone.choose(1)


def test_tree_is_judged_by_its_budgets():
    step_s = {1: {0: 1.0, 3: 1.3, 7: 1.5, 15: 1.9, 31: 3.5}}
    for seed in range(4):
        text = Tree([0.85], seed)
        took, chosen = decode(OnlineController(step_s, trees=True), text, 2000, step_s)
        assert set(chosen) <= {0, 3, 7, 15, 31}
        assert took < 1.04 * best(text, step_s[1])
        took, _ = decode(OnlineController(step_s, trees=True), Tree([0.0], seed), 500, step_s)
        assert took < 1.03


def test_equal_records_give_equal_choices():
    runs = [decode(OnlineController(STEP_S), Text([0.7], 5), 200)[1] for _ in range(2)]
    assert runs[0] == runs[1]


def test_drafter_that_finds_nothing_is_seldom_asked():
    controller, num_asked = OnlineController(STEP_S), 0
    for step in range(1000):
        num_asked += controller.choose(1) > 0
        controller.learn([StepRecord(0, step, 1, 0, 0, 0, 1, 0.0, 0.0, 0.0)])
    assert 10 < num_asked < 60


@pytest.mark.parametrize(
    ("build", "given", "options", "message"),
    [
        (Schedule, {2: 4}, {}, "needs an entry for batch size 1"),
        (Schedule, {1: -1}, {}, "is -1"),
        (Schedule, {1: 4, 0: 2}, {}, "batch size 0"),
        (Schedule, {1: 2.5}, {}, r"nodes is \{1: 2.5\}"),
        (OnlineController, {}, {}, "step_s is empty"),
        (OnlineController, {1: {1: 2.0}}, {}, r"step_s\[1\] has the nodes \[1\]"),
        (OnlineController, {1: {0: 2.0}}, {}, r"step_s\[1\] has the nodes \[0\]"),
        (OnlineController, {1: {0: 2.0, 1: 0.0}}, {}, "positive"),
        (OnlineController, STEP_S, {"acceptance": [1.2]}, "acceptance is"),
        (OnlineController, STEP_S, {"acceptance": []}, "acceptance is"),
        (OnlineController, STEP_S, {"half_life": 0}, "half_life 0"),
    ],
)
def test_impossible_table_or_option_is_refused(build, given, options, message):
    with pytest.raises(ValueError, match=message):
        build(given, **options)
