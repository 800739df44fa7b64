from types import SimpleNamespace

import pytest

from specdec.planning import measure
from specdec.planning.candidates import Candidate, Shape
from specdec.planning.costs import Costs, ForwardCost
from specdec.planning.measure import FULL, Measurements
from specdec.planning.times import Step, TimedRun
from tests.planning.toys import CONTEXT, Machine, candidate

SHAPES = [Shape(n, 1, n, False) for n in (1, 2, 3, 4, 6, 8, 12)]


def test_a_configuration_that_is_timed_as_given_costs_the_mean_of_its_steps():
    """Long drafts from a lookup are cheap and short ones of a model dear: no line says both."""
    machine = Machine()
    plain = machine.step(Shape(0, 1, 0, False), 0, 1)
    cheap, dear = (
        Step(1e-4, 5e-3, 1e-3, context=CONTEXT, nodes=10),
        Step(4e-3, 5e-3, 2e-3, context=CONTEXT, nodes=6),
    )
    mixed = Candidate("mixed", "hybrid", {}, "hybrid", Shape(0, 1, 10, True), True)
    runs = [
        TimedRun(None, [plain], plain.wall_s),
        TimedRun(mixed, [cheap] * 10 + [dear] * 30, plain.wall_s),
    ]
    found = Costs(ForwardCost(machine.points((1,))), {1: runs}).step(mixed, 1, {7: 1.0}, CONTEXT)
    assert found.draft_s == pytest.approx(0.25 * 1e-4 + 0.75 * 4e-3)
    assert found.wall_s == pytest.approx(0.25 * cheap.wall_s + 0.75 * dear.wall_s)


def test_times_are_brought_to_the_speed_of_the_plain_runs_beside_them():
    machine = Machine()
    plain = machine.step(Shape(0, 1, 0, False), 0, 1)
    slow = Step(0.0, 2 * plain.target_s, 2 * plain.other_s, context=CONTEXT, nodes=0)
    one = candidate(SHAPES[3])
    step = machine.step(one.shape, 4, 1)
    twice = Step(2 * step.draft_s, 2 * step.target_s, 2 * step.other_s, context=CONTEXT, nodes=4)
    runs = [
        TimedRun(None, [plain], plain.wall_s),
        TimedRun(one, [step], plain.wall_s),
        TimedRun(None, [slow], slow.wall_s),
        TimedRun(one, [twice], slow.wall_s),
    ]
    costs = Costs(ForwardCost(machine.points((1,))), {1: runs})
    ratio = costs.step(one, 1, {4: 1.0}, CONTEXT).wall_s / costs.plain[1].time.wall_s
    assert ratio == pytest.approx(step.wall_s / plain.wall_s, rel=1e-3)


def test_a_drafter_that_remembers_is_timed_on_every_prompt_once(monkeypatch):
    """Timed three times a round, it meets the prompts of three rounds, and is built anew after."""

    seen = []

    class Drafters:
        def __init__(self, target):
            pass

        def get(self, run, generation=0):
            return generation

    def time_run(target, drafter, work, batch_size, first):
        seen.append((drafter, first % len(work.prompts)))
        return [Step(0.0, 1e-3, 1e-4, context=CONTEXT, nodes=0)]

    class Journal:
        entries = ()

        def append(self, row):
            pass

    class Work:
        prompts = tuple(range(4))

    monkeypatch.setattr(measure, "Drafters", Drafters)
    monkeypatch.setattr(measure, "time_run", time_run)
    mixed = Candidate("mixed", "hybrid", {}, "hybrid", Shape(0, 1, 10, True), True)
    measured = Measurements(None, Work, FULL, Journal(), lambda done, total, text: None)
    measured.decodings([mixed] * 3, 1, 2)
    drafted = [each for each in seen if each[0] is not None and each[0] >= 0]
    assert len(drafted) == len(set(drafted)) == 6


@pytest.mark.parametrize(
    ("steps_ms", "load", "reason"),
    [
        ((5.0, 5.2, 5.1, 5.3), 1.0, ""),
        ((5.0, 5.2, 9.1, 8.7), 1.0, "the same step of plain decoding took 5.1 to 9.0 ms"),
        ((5.0, 5.2, 5.1, 5.3), 7.0, "the load average was 7.0 on 2 cores"),
    ],
)
def test_a_plan_of_a_busy_machine_is_not_trusted(monkeypatch, steps_ms, load, reason):
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 2)
    runs = [
        TimedRun(None, [Step(0.0, ms / 1000, 0.0, context=CONTEXT, nodes=0)] * 3, ms / 1000)
        for ms in steps_ms
    ]
    journal = SimpleNamespace(entries=[{"phase": "forward", "load": load}])
    found = Measurements(None, None, FULL, journal, lambda done, total, text: None).trust(runs)
    assert found["is_trusted"] == (not reason)
    assert found["reasons"] == ([reason] if reason else [])
