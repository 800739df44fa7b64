"""The engine after failures: no request is lost, and no token is told twice."""

import pytest
from engine_cases import PROMPTS, Cases, breaking, plain_tokens, run
from tiny_models import perturbed, tiny_llama, tiny_target

from specdec import Engine, SamplingConfig, generate
from specdec.drafters.draft_model import DraftModel
from specdec.targets.hf import HFTarget


@pytest.fixture(scope="module")
def target():
    return tiny_target()


def run_on(engine, before=((), ()), most=1000):
    """Step until nothing is left, whatever a step raises; chunks and errors, with those before."""
    chunks, errors, steps = [*before[0]], [*before[1]], 0
    while (engine.num_waiting or engine.num_running) and steps < most:
        steps += 1
        try:
            chunks += engine.step()
        except (MemoryError, ArithmeticError, KeyboardInterrupt) as error:
            errors.append(error)
    return chunks, errors


def streamed(chunks, index):
    return [token for chunk in chunks if chunk.index == index for token in chunk.tokens]


JOIN = [("target", "reserve", 2), ("target", "prefill", 2), ("drafter", "begin", 2)]
STEP = [
    ("drafter", "propose", 2),
    ("target", "score", 2),
    ("target", "commit", 3),
    ("drafter", "observe", 3),
    ("target", "reorder", 1),
    ("drafter", "reorder", 1),
]
# Joining differs by the kind of cache; what a step leaves is forgotten in the same way by all.
PLACES = [(name, *place) for name in Cases.NAMES for place in JOIN]
PLACES += [("eagle3", *place) for place in STEP]


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize(
    ("name", "owner", "method", "call"), [p for p in PLACES if p[:2] != ("none", "drafter")]
)
def test_failed_allocation_costs_no_token(monkeypatch, name, done, owner, method, call):
    target = tiny_target()
    drafter = Cases.build(name, target)
    failing = target if owner == "target" else drafter
    configs = [SamplingConfig(repetition_penalty=1.3 if i == 1 else 1.0) for i in range(5)]
    limits = [14, 9, 5, 12, 7]
    alone = [
        plain_tokens(target, prompt, limit, config)
        for prompt, limit, config in zip(PROMPTS, limits, configs, strict=True)
    ]
    engine = Engine(target, drafter, max_rows=4, max_cache_bytes=10**9)
    breaking(monkeypatch, failing, method, call, MemoryError("no room"), done=done)
    ids, so_far = [], ([], [])
    for prompt, limit, config in zip(PROMPTS, limits, configs, strict=True):
        ids.append(engine.submit(prompt, config, max_new_tokens=limit))
        if len(ids) > 1:  # the first two join together, the others beside those that run
            so_far = run_on(engine, so_far, most=2)
    chunks, errors = run_on(engine, so_far)
    assert [str(error) for error in errors] == ["no room"]
    assert list(dict.fromkeys(chunk.index for chunk in chunks)) == ids
    for index, tokens in zip(ids, alone, strict=True):
        assert streamed(chunks, index) == engine.result(index).tokens == tokens


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("rule", ["token", "match"])
def test_preempted_row_draws_the_same_tokens(monkeypatch, rule, done):
    target = tiny_target()
    sampling = SamplingConfig(temperature=0.9, top_p=0.95, frequency_penalty=0.4, seed=3)
    alone = plain_tokens(target, PROMPTS[0], 20, sampling)
    drafter = DraftModel(HFTarget(perturbed(tiny_llama(), 0.15), None), target.vocab_size, 4)
    if rule == "token":  # what it samples depends on the drafts
        alone = generate(target, drafter, [PROMPTS[0]], [sampling], max_new_tokens=20)[0].tokens
    engine = Engine(target, drafter, max_rows=2, rule=rule)
    ids = [engine.submit(PROMPTS[0], sampling, max_new_tokens=20)]
    for _ in range(3):
        engine.step()
    breaking(monkeypatch, drafter, "begin", 1, MemoryError("no room"), done=done)
    ids.append(engine.submit(PROMPTS[1], max_new_tokens=4))
    assert len(run_on(engine)[1]) == 1
    assert engine.result(ids[0]).tokens == alone
    assert engine.result(ids[1]).finish_reason == "length"


def crowd(monkeypatch, target, most):
    """Let the target run out of memory where more than `most` tokens are cached."""
    whole = target.prefill

    def prefill(*args, **kwargs):
        output = whole(*args, **kwargs)
        if sum(target.lengths) > most:
            raise MemoryError("too many tokens")
        return output

    monkeypatch.setattr(target, "prefill", prefill)


def batch_sizes(engine, ids):
    return {record.batch_size for index in ids for record in engine.peek(index).records}


def test_row_without_memory_waits_for_room(monkeypatch):
    target = tiny_target()
    engine = Engine(target, max_rows=3)
    crowd(monkeypatch, target, 80)
    limits = (4, 8, 3, 3)
    ids = [engine.submit([1] * 30, max_new_tokens=limit) for limit in limits]
    chunks, errors = run_on(engine)
    assert len(errors) == 1
    assert list(dict.fromkeys(chunk.index for chunk in chunks)) == ids
    assert max(batch_sizes(engine, ids)) == 2
    for index, limit in zip(ids, limits, strict=True):
        assert engine.result(index).tokens == plain_tokens(target, [1] * 30, limit)
    small = [engine.submit([1] * 9, max_new_tokens=3) for _ in range(3)]
    run(engine)
    assert batch_sizes(engine, small) == {3}


def test_row_without_memory_alone_ends_with_error(monkeypatch):
    target = tiny_target()
    engine = Engine(target, max_rows=3)
    crowd(monkeypatch, target, 80)
    ids = [engine.submit([1] * n, max_new_tokens=6) for n in (5, 90, 7)]
    chunks, errors = run_on(engine)
    assert errors
    results = [engine.result(index) for index in ids]
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert results[1].error == "prompt 1: MemoryError: too many tokens"
    assert results[1].tokens == []
    ends = [(chunk.index, chunk.finish_reason) for chunk in chunks if chunk.finish_reason]
    assert sorted(ends) == [(0, "length"), (1, "error"), (2, "length")]


@pytest.mark.parametrize(
    ("method", "call", "ends"),
    [  # those that were joining, or all that run where none was
        ("prefill", 2, [("length", 6), ("error", 0), ("error", 0), ("length", 6)]),
        ("score", 2, [("error", 2), ("error", 1), ("error", 1), ("length", 6)]),
    ],
)
def test_error_ends_rows_of_its_part_only(monkeypatch, target, method, call, ends):
    engine = Engine(target, max_rows=3)
    breaking(monkeypatch, target, method, call, ArithmeticError("broken"), done=False)
    ids = [engine.submit([5, 6], max_new_tokens=6)]
    before = run_on(engine, most=1)
    ids += [engine.submit([7, 8], max_new_tokens=6) for _ in range(3)]
    chunks, errors = run_on(engine, before)
    assert [str(error) for error in errors] == ["broken"]
    results = [engine.result(index) for index in ids]
    assert [(r.finish_reason, len(r.tokens)) for r in results] == ends
    assert results[1].error == "prompt 1: ArithmeticError: broken"
    for index, result in zip(ids, results, strict=True):
        assert streamed(chunks, index) == result.tokens
        assert result.tokens == plain_tokens(target, result.prompt_tokens, 6)[: len(result.tokens)]


def test_keyboard_interrupt_ends_no_request(monkeypatch, target):
    engine = Engine(target, max_rows=2)
    ids = [engine.submit([5, 6], max_new_tokens=6)]
    engine.step()
    engine.step()  # of the first alone, after which others may join
    ids.append(engine.submit([7, 8], max_new_tokens=6))
    breaking(monkeypatch, target, "prefill", 1, KeyboardInterrupt(), done=True)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert (engine.num_waiting, engine.num_running) == (2, 0)
    assert {engine.peek(index).finish_reason for index in ids} == {"interrupted"}
    run(engine)
    for index, prompt in zip(ids, ([5, 6], [7, 8]), strict=True):
        assert engine.result(index).tokens == plain_tokens(target, prompt, 6)


def test_preempted_row_can_be_cancelled(monkeypatch, target):
    engine = Engine(target, max_rows=2)
    index = engine.submit([5, 6], max_new_tokens=6)
    engine.step()
    engine.step()
    breaking(monkeypatch, target, "score", 1, MemoryError("no room"), done=False)
    engine.submit([7, 8], max_new_tokens=6)
    engine.step()
    with pytest.raises(MemoryError):
        engine.step()
    engine.cancel(index)
    assert len(engine.result(index).tokens) == 2
    assert [chunk.finish_reason for chunk in run(engine)][-1] == "length"
