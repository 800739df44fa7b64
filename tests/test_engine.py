"""The engine: requests that come at any time, order, memory, cancelling."""

import random

import pytest
import torch
from engine_cases import PROMPTS, Cases, plain_tokens, run
from tiny_models import perturbed, tiny_llama, tiny_target

from specdec import Engine, SamplingConfig, generate, generate_baseline
from specdec.drafters.draft_model import DraftModel
from specdec.engine.interfaces import Target
from specdec.engine.scheduler import CacheLimit
from specdec.targets.hf import HFTarget


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def drafter(target):
    return DraftModel(HFTarget(perturbed(tiny_llama(), 0.15), None), target.vocab_size, 4)


def bytes_of(target, drafter=None):
    return CacheLimit(target, drafter, 1).bytes_for


def test_joining_requests_decode_as_if_alone(target, drafter):
    engine, chunks = Engine(target, drafter, max_rows=3), []
    ids = [engine.submit(PROMPTS[0], max_new_tokens=30)]
    for prompt in PROMPTS[1:]:
        chunks += [*engine.step(), *engine.step()]
        ids.append(engine.submit(prompt, max_new_tokens=30))
    chunks += run(engine)
    for index, prompt in zip(ids, PROMPTS, strict=True):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + ["length"]
        streamed = [token for chunk in mine for token in chunk.tokens]
        assert streamed == engine.result(index).tokens == plain_tokens(target, prompt, 30)


def test_waiting_request_reports_its_queue_time(target):
    engine = Engine(target, max_rows=1)
    first, second = (engine.submit([5, 6], max_new_tokens=6) for _ in range(2))
    run(engine)
    results = [engine.result(index) for index in (first, second)]
    assert results[1].queue_s > results[0].ttft_s + results[0].decode_s
    assert results[0].queue_s < results[1].queue_s


def test_short_requests_do_not_hold_up_running_ones(target):
    engine = Engine(target, max_rows=2)
    long = engine.submit(PROMPTS[0], max_new_tokens=6)
    engine.step()
    for _ in range(10):  # two steps a token: one for those that end as they join, one for it
        engine.submit([1], max_new_tokens=1)
        engine.step()
    assert engine.result(long).tokens == plain_tokens(target, PROMPTS[0], 6)


def test_cancelled_request_frees_its_row(target, drafter):
    engine = Engine(target, drafter, max_rows=2)
    ids = [engine.submit(prompt, max_new_tokens=20) for prompt in PROMPTS[:4]]
    engine.cancel(ids[3])  # which waits
    engine.step()
    engine.step()
    engine.cancel(ids[0])
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 0)
    run(engine)
    assert [engine.peek(index).finish_reason for index in ids] == [
        *("cancelled", "length", "length", "cancelled")
    ]
    assert engine.result(ids[3]).tokens == []
    for index, prompt in zip(ids[1:3], PROMPTS[1:3], strict=True):
        assert engine.result(index).tokens == plain_tokens(target, prompt, 20)


def test_result_is_taken_once_at_the_end(target):
    engine = Engine(target)
    index = engine.submit([5, 6], max_new_tokens=3)
    with pytest.raises(ValueError, match="request 0 has not ended"):
        engine.result(index)
    run(engine)
    engine.result(index)
    with pytest.raises(KeyError, match="no request 0"):
        engine.result(index)


@pytest.mark.slow
@pytest.mark.parametrize("name", Cases.NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_memory_limit_keeps_order_and_tokens(name, seed):
    rng = random.Random(seed)
    target = tiny_target()
    drafter = Cases.build(name, target)
    prompts = [[rng.randrange(97) for _ in range(rng.choice([1, 3, 20, 90]))] for _ in range(7)]
    limits = [rng.choice([1, 5, 16, 40]) for _ in range(7)]
    arrivals = sorted(rng.randrange(40) for _ in range(7))
    configs = [SamplingConfig(temperature=rng.choice([0.0, 0.8]), seed=i) for i in range(7)]
    alone = [
        generate(target, drafter, [prompt], config, max_new_tokens=limit)[0].tokens
        for prompt, limit, config in zip(prompts, limits, configs, strict=True)
    ]
    longest = max(len(p) + n for p, n in zip(prompts, limits, strict=True))
    max_bytes = int(bytes_of(target, drafter)(1, longest) * rng.choice([1.0, 1.3, 2.2, 3.5]))
    limits_of_joins = {"max_cache_bytes": max_bytes, "join_chunk": (8, 30, 128)[seed]}
    engine = Engine(target, drafter, max_rows=4, **limits_of_joins)
    ids, begun, num_steps, most = [], [], 0, 0
    while len(ids) < len(prompts) or engine.num_waiting or engine.num_running:
        while len(ids) < len(prompts) and arrivals[len(ids)] <= num_steps:
            place = len(ids)
            ids.append(engine.submit(prompts[place], configs[place], max_new_tokens=limits[place]))
        chunks = engine.step()
        begun += [chunk.index for chunk in chunks if chunk.index not in begun]
        most = max(most, engine.num_running)
        assert engine.cache_bytes <= max_bytes
        num_steps += 1
    assert begun == ids == sorted(ids)
    assert engine.peak_cache_bytes <= max_bytes
    assert most <= 4
    results = [engine.result(index) for index in ids]
    assert [result.tokens for result in results] == alone
    assert {result.finish_reason for result in results} == {"length"}


def test_longer_rows_reuse_freed_memory(target):
    needed = bytes_of(target)
    engine = Engine(target, max_cache_bytes=needed(4, 50))
    stays = engine.submit([1], max_new_tokens=49)
    for _ in range(3):
        engine.submit([2], max_new_tokens=5)
    while engine.num_running != 1:
        engine.step()
    long = engine.submit([3] * 60, max_new_tokens=40)
    engine.step()
    assert engine.num_running == 2
    assert engine.cache_bytes == needed(2, 100)
    run(engine)
    assert engine.result(stays).tokens == plain_tokens(target, [1], 49)
    assert engine.result(long).tokens == plain_tokens(target, [3] * 60, 40)


def test_submit_refuses_what_never_fits(target):
    engine = Engine(target, max_cache_bytes=bytes_of(target)(1, 50))
    engine.submit([1] * 30, max_new_tokens=20)
    with pytest.raises(ValueError, match=r"prompt 1 needs .* bytes .* lower max_new_tokens"):
        engine.submit([1] * 30, max_new_tokens=21)
    assert engine.submit([1], max_new_tokens=1) == 1


def test_limit_does_not_bind_the_next_call(target):
    engine = Engine(target, max_cache_bytes=10**9)
    engine.submit([1] * 30, max_new_tokens=20)
    run(engine)
    generate_baseline(target, [[1, 2]], max_new_tokens=2)
    assert target.cache.capacity == 128


def test_target_that_hides_its_cache_takes_no_limit(target):
    members = (*Target.__annotations__, "prefill", "score", "commit", "reorder")
    hidden = type("Hidden", (), {name: getattr(target, name) for name in members})()
    with pytest.raises(ValueError, match="Hidden does not tell the size of its cache"):
        Engine(hidden, max_cache_bytes=10**9)


def nan_behind_a_pair_of_96(module, inputs, output):
    tokens = inputs[0]
    is_second = torch.zeros_like(tokens, dtype=torch.bool)
    is_second[:, 1:] = (tokens[:, 1:] == 96) & (tokens[:, :-1] == 96)
    return output.masked_fill(is_second.unsqueeze(-1), float("nan"))


@pytest.mark.parametrize("name", Cases.NAMES)
@pytest.mark.parametrize("when", [0, 2])
def test_row_with_nan_logits_ends_alone(name, when):
    target = tiny_target()
    drafter = Cases.build(name, target)
    # Only the broken prompt has this pair: its features, keys and values are NaN from there on.
    target.model.model.embed_tokens.register_forward_hook(nan_behind_a_pair_of_96)
    prompts = [[1, 2, 3], [10] * 40, [9] * 20, [4, 5, 6, 7, 8]]
    alone = [plain_tokens(target, prompt, 20) for prompt in prompts]
    engine = Engine(target, drafter, max_rows=3)
    ids = [engine.submit(prompt, max_new_tokens=20) for prompt in prompts[:when]]
    broken = engine.submit([5] * 30 + [96, 96], max_new_tokens=20)
    ids += [engine.submit(prompt, max_new_tokens=20) for prompt in prompts[when:]]
    chunks = run(engine)
    assert [chunk.finish_reason for chunk in chunks if chunk.index == broken] == ["error"]
    result = engine.result(broken)
    assert (result.tokens, result.finish_reason) == ([], "error")
    assert "logits are NaN" in result.error
    assert (result.ttft_s, result.decode_s) == (0.0, 0.0)  # never timed
    assert [engine.result(index).tokens for index in ids] == alone


def test_overdue_requests_end_and_others_go_on(target):
    engine = Engine(target, max_rows=1)
    late = engine.submit([1], max_new_tokens=50, max_time_s=1e-9)
    waits = engine.submit([1], max_new_tokens=50, max_time_s=1e-9)
    other = engine.submit([1], max_new_tokens=5)
    run(engine)
    results = [engine.result(index) for index in (late, waits, other)]
    assert [result.finish_reason for result in results] == ["time", "time", "length"]
    assert [len(result.tokens) for result in results] == [1, 0, 5]
