"""The engine: requests that come at any time, order, memory, failures, cancelling."""

import pytest
from tiny_models import perturbed, tiny_llama, tiny_target

from specdec import Engine, SamplingConfig, generate_baseline
from specdec.drafters.draft_model import DraftModel
from specdec.targets.hf import HFTarget

PROMPTS = [[5, 6, 7, 8], [9] * 30, [1], list(range(20, 60)), [3] * 12]


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def drafter(target):
    return DraftModel(HFTarget(perturbed(tiny_llama(), 0.15), None), target.vocab_size, 4)


def plain_tokens(target, prompt, count, sampling=SamplingConfig()):  # noqa: B008 (frozen)
    return generate_baseline(target, [prompt], sampling, max_new_tokens=count)[0].tokens


def run(engine):
    """Step until nothing is left; the chunks, in order."""
    chunks = []
    while engine.num_waiting or engine.num_running:
        chunks += engine.step()
    return chunks


def test_requests_that_join_a_running_batch_decode_as_if_alone(target, drafter):
    engine = Engine(target, drafter, max_rows=3)
    ids = [engine.submit(PROMPTS[0], max_new_tokens=30)]
    for prompt in PROMPTS[1:]:
        engine.step()
        engine.step()
        ids.append(engine.submit(prompt, max_new_tokens=30))
    run(engine)
    for index, prompt in zip(ids, PROMPTS, strict=True):
        assert engine.result(index).tokens == plain_tokens(target, prompt, 30)


def test_chunks_add_up_to_the_result_and_the_last_says_why(target, drafter):
    engine = Engine(target, drafter, max_rows=2)
    ids = [engine.submit(prompt, max_new_tokens=9) for prompt in PROMPTS]
    chunks = run(engine)
    for index in ids:
        mine = [chunk for chunk in chunks if chunk.index == index]
        streamed = [token for chunk in mine for token in chunk.tokens]
        assert streamed == engine.result(index).tokens
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + ["length"]


def test_what_waits_says_how_long(target):
    engine = Engine(target, max_rows=1)
    first, second = (engine.submit([5, 6], max_new_tokens=6) for _ in range(2))
    run(engine)
    results = [engine.result(index) for index in (first, second)]
    assert results[1].queue_s > results[0].ttft_s + results[0].decode_s
    assert results[0].queue_s < results[1].queue_s


def test_a_cancelled_request_frees_its_row_at_once_and_harms_nobody(target, drafter):
    engine = Engine(target, drafter, max_rows=2)
    ids = [engine.submit(prompt, max_new_tokens=20) for prompt in PROMPTS[:3]]
    engine.step()
    engine.step()
    engine.cancel(ids[0])
    assert engine.num_running == 1
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 0)
    run(engine)
    assert engine.peek(ids[0]).finish_reason == "cancelled"
    for index, prompt in zip(ids[1:], PROMPTS[1:], strict=False):
        assert engine.result(index).tokens == plain_tokens(target, prompt, 20)


def test_a_waiting_request_can_be_cancelled(target):
    engine = Engine(target, max_rows=1)
    first, second = (engine.submit([5, 6], max_new_tokens=6) for _ in range(2))
    engine.cancel(second)
    assert engine.num_waiting == 1
    run(engine)
    assert engine.result(second).tokens == []
    assert len(engine.result(first).tokens) == 6


def test_a_result_can_be_taken_once_and_only_when_there_is_one(target):
    engine = Engine(target)
    index = engine.submit([5, 6], max_new_tokens=3)
    with pytest.raises(ValueError, match="request 0 has not ended"):
        engine.result(index)
    run(engine)
    engine.result(index)
    with pytest.raises(KeyError, match="no request 0"):
        engine.result(index)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_rows": 0}, "max_rows is 0"), ({"rule": "tokens"}, "tokens")],
)
def test_options_that_cannot_work_are_named(target, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(target, **options)
