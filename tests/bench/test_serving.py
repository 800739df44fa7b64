"""Serving: who sends when, what waits, and that nothing is lost."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from tiny_models import tiny_target

from specdec import generate_baseline
from specdec.bench.config import SamplingOptions
from specdec.bench.measure import serve
from specdec.bench.workloads import Request
from specdec.engine.engine import Chunk, Engine


def request(user, number=0, num_tokens=5, arrival_s=None):
    prompt = [3 + user, 4 + number, 5][: 2 + number]
    return Request(f"{user}-{number}", "maths", prompt, num_tokens, 0, user, arrival_s)


def served(*requests, engine=None, max_rows=4):
    return serve(engine or Engine(tiny_target(), max_rows=max_rows), requests, SamplingOptions())


def test_request_is_answered_as_if_alone():
    target = tiny_target()
    requests = [request(user, number, 3 + user) for number in range(2) for user in range(3)]
    rows = served(*requests, engine=Engine(target, max_rows=2))
    for one, row in zip(requests, rows, strict=True):
        alone = generate_baseline(target, [one.prompt], max_new_tokens=one.max_new_tokens)[0]
        assert row.tokens == alone.tokens
        assert sum(row.chunk_tokens) == len(row.tokens) == one.max_new_tokens
        assert len(row.chunk_s) == len(row.chunk_tokens)
        assert len(row.records) == len(row.chunk_s) - 1


def test_user_sends_the_next_request_after_an_answer():
    rows = served(request(0, 0, 2), request(1, 0, 12), request(0, 1, 2), request(1, 1, 2))
    assert rows[2].sent_s >= rows[0].chunk_s[-1]
    assert rows[3].sent_s >= rows[1].chunk_s[-1]
    # The quick user did not wait for the slow one.
    assert rows[2].sent_s < rows[1].chunk_s[-1]


def test_request_without_row_waits_in_order():
    rows = served(*(request(user, 0, 6) for user in range(3)), max_rows=1)
    for earlier, later in pairwise(rows):
        assert later.chunk_s[0] > earlier.chunk_s[-1]
        assert later.queue_s > earlier.queue_s
        assert later.waited_s > later.queue_s + later.ttft_s
    assert rows[2].queue_s >= rows[1].chunk_s[-1] - rows[1].chunk_s[0]


def test_arriving_request_is_sent_at_its_time():
    rows = served(request(0, 0, 40, 0.0), request(0, 1, 3, 1e-4), request(1, 0, 3, 0.05))
    assert [row.sent_s for row in rows] == [0.0, 1e-4, 0.05]
    assert rows[1].sent_s < rows[0].chunk_s[-1]
    assert rows[2].chunk_s[0] > 0.05
    assert all(row.queue_s >= 0 for row in rows)


class BusyEngine:
    """Takes a step of five seconds, by its clock, before the next request can be submitted."""

    def __init__(self, clock, errors=()):
        self.clock, self.errors, self.sent = clock, errors, []

    def submit(self, prompt, sampling, *, max_new_tokens):
        self.sent.append(self.clock.now)
        return len(self.sent) - 1

    def advance(self):
        self.clock.now += 5.0
        return [Chunk(len(self.sent) - 1, [1], "", "length")]

    def result(self, index):
        times = {"ttft_s": 4.5, "decode_s": 0.0, "queue_s": 0.5}
        error = "no memory" if index in self.errors else ""
        return SimpleNamespace(tokens=[1], records=[], error=error, **times)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr("specdec.bench.measure.time", clock)
    return clock


def test_failed_request_leaves_its_reason(clock):
    requests = [request(user, arrival_s=when) for user, when in enumerate((0.0, 2.0, 6.0))]
    rows = served(*requests, engine=BusyEngine(clock, errors=[1]))
    assert [row if isinstance(row, str) else row.tokens for row in rows] == [[1], "no memory", [1]]


def test_idle_engine_sleeps_until_the_next_arrival(clock):
    engine = BusyEngine(clock)
    (row,) = served(request(0, arrival_s=3.0), engine=engine)
    assert engine.sent == [103.0]
    assert (row.sent_s, row.chunk_s) == (3.0, [8.0])


def test_late_time_counts_as_queue(clock):
    requests = request(0, arrival_s=0.0), request(1, arrival_s=2.0)
    _, row = served(*requests, engine=BusyEngine(clock))
    assert row.sent_s == 2.0
    assert row.queue_s == pytest.approx(3.0 + 0.5)
    assert row.waited_s == pytest.approx(10.0 - 2.0)
