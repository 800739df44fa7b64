"""Long prompts that join in parts: running rows step in between, and nothing is lost."""

from itertools import pairwise

import pytest
from engine_cases import PROMPTS, Cases, breaking, plain_tokens, run
from test_engine_failures import run_on, streamed
from tiny_models import tiny_target

from specdec import Engine, SamplingConfig, generate
from specdec.engine.scheduler import CacheLimit

LONG = list(range(30, 70))
CHUNK = 8


@pytest.fixture
def target():
    return tiny_target()


def watched(target):
    """Shapes [rows, n] of the tokens of every forward."""
    shapes = []

    def hook(module, args, kwargs, output):
        shapes.append(tuple(kwargs["input_ids"].shape))

    target.model.register_forward_hook(hook, with_kwargs=True)
    return shapes


def half_read(target, drafter=None, num_parts=3, **options):
    """An engine with a running row (0) and a request (1), some parts of whose prompt are read."""
    engine = Engine(target, drafter, join_chunk=CHUNK, **options)
    engine.submit(PROMPTS[0], max_new_tokens=40)
    engine.step()
    engine.submit(LONG, max_new_tokens=6)
    shapes, chunks = watched(target), []
    while sum(size > 1 for _, size in shapes) < num_parts:
        chunks += engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    return engine, chunks


def test_running_row_steps_between_parts(target):
    engine = Engine(target, join_chunk=CHUNK)
    first = engine.submit(PROMPTS[0], max_new_tokens=40)
    engine.step()
    engine.step()
    shapes = watched(target)
    second = engine.submit(LONG, max_new_tokens=6)
    while engine.num_running < 2:
        engine.step()
    parts = [place for place, shape in enumerate(shapes) if shape == (1, CHUNK)]
    assert len(parts) == len(LONG) / CHUNK
    assert all(behind - before == 2 for before, behind in pairwise(parts))
    assert {shape for place, shape in enumerate(shapes) if place not in parts} == {(1, 1)}
    run(engine)
    assert engine.result(first).tokens == plain_tokens(target, PROMPTS[0], 40)
    assert engine.result(second).tokens == plain_tokens(target, LONG, 6)


def test_short_prompts_join_together_within_chunk(target):
    engine = Engine(target, join_chunk=10)
    engine.submit(PROMPTS[0], max_new_tokens=40)
    engine.step()
    shapes = watched(target)
    for _ in range(3):
        engine.submit([1, 2, 3, 4], max_new_tokens=30)
    run(engine)
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 4), (1, 4)]


@pytest.mark.parametrize("name", Cases.NAMES)
@pytest.mark.parametrize("chunk", [1, 7])
def test_prompts_read_in_parts_change_no_token(name, chunk, target):
    drafter = Cases.build(name, target)
    configs = [SamplingConfig(temperature=0.8 * (i % 2), seed=i) for i in range(len(PROMPTS))]
    alone = [
        generate(target, drafter, [prompt], config, max_new_tokens=30)[0].tokens
        for prompt, config in zip(PROMPTS, configs, strict=True)
    ]
    engine, chunks, ids = Engine(target, drafter, max_rows=3, join_chunk=chunk), [], []
    for prompt, config in zip(PROMPTS, configs, strict=True):
        ids.append(engine.submit(prompt, config, max_new_tokens=30))
        chunks += [*engine.step(), *engine.step()]
    chunks += run(engine)
    assert list(dict.fromkeys(chunk.index for chunk in chunks)) == ids
    for index, tokens in zip(ids, alone, strict=True):
        assert streamed(chunks, index) == engine.result(index).tokens == tokens


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("method", ["prefill_ahead", "_forward_chain", "score", "prefill"])
@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()])
def test_failure_amid_a_join_loses_nothing(monkeypatch, target, method, done, error):
    drafter = Cases.build("eagle3", target)
    engine, chunks = half_read(target, drafter, max_rows=2)
    breaking(monkeypatch, target, method, 1, error, done=done)
    chunks, errors = run_on(engine, (chunks, []))
    assert len(errors) == 1
    results = [engine.result(index) for index in (0, 1)]
    assert [result.finish_reason for result in results] == ["length", "length"]
    assert results[1].tokens == streamed(chunks, 1) == plain_tokens(target, LONG, 6)
    assert results[0].tokens == plain_tokens(target, PROMPTS[0], 40)
    assert target._ahead is None


@pytest.mark.parametrize(
    ("method", "reasons"),
    [("prefill_ahead", ["length", "error"]), ("score", ["error", "length"])],
)
def test_error_ends_the_half_read_or_the_running(monkeypatch, target, method, reasons):
    engine, _ = half_read(target)
    breaking(monkeypatch, target, method, 1, ArithmeticError("broken"), done=False)
    assert len(run_on(engine)[1]) == 1
    results = [engine.result(index) for index in (0, 1)]
    assert [result.finish_reason for result in results] == reasons
    for result, (prompt, count) in zip(results, [(PROMPTS[0], 40), (LONG, 6)], strict=True):
        assert result.tokens == plain_tokens(target, prompt, count)[: len(result.tokens)]


def test_half_read_request_can_be_cancelled_or_late(target):
    for end in ("cancelled", "time"):
        engine, chunks = half_read(target)
        held = engine.cache_bytes
        if end == "time":
            engine._requests[1].deadline = 0.0
        else:
            engine.cancel(1)
        chunks += run(engine)
        assert engine.cache_bytes < held
        assert [c.finish_reason for c in chunks if c.index == 1] == ["time"] * (end == "time")
        late = engine.result(1)
        assert (late.finish_reason, late.tokens, late.ttft_s) == (end, [], 0.0)
        assert late.queue_s > 0  # its prefill had begun
        assert engine.result(0).tokens == plain_tokens(target, PROMPTS[0], 40)


def test_preempted_engine_holds_no_part(target):
    engine, _ = half_read(target)
    engine.preempt()
    assert engine.num_waiting == 2
    assert target._ahead is None
    run(engine)
    assert engine.result(1).tokens == plain_tokens(target, LONG, 6)


@pytest.mark.parametrize("max_bytes", [None, 10**9])
def test_half_read_prompt_outlives_the_last_row(target, max_bytes):
    engine, _ = half_read(target, num_parts=3, max_cache_bytes=max_bytes)
    engine.cancel(0)
    shapes = watched(target)
    engine.step()
    assert shapes == [(1, len(LONG) - 3 * CHUNK)]
    run(engine)
    assert engine.result(1).tokens == plain_tokens(target, LONG, 6)


def test_part_beside_full_cache_keeps_the_limit(target):
    needed = CacheLimit(target, None, 1).bytes_for
    limit = needed(2, len(LONG) + 10)
    engine = Engine(target, join_chunk=CHUNK, max_rows=4, max_cache_bytes=limit)
    for count in (30, 4, 4):  # whose room is in the way
        engine.submit([1, 2], max_new_tokens=count)
    engine.step()
    long = engine.submit(LONG, max_new_tokens=10)
    most = 0
    while engine.num_waiting or engine.num_running:
        engine.step()
        most = max(most, engine.num_running)
        assert engine.cache_bytes <= limit
    assert most == 3
    assert engine.result(long).tokens == plain_tokens(target, LONG, 10)
