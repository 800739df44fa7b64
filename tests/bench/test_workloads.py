"""Workloads: lengths and texts of requests, the same every time, and turns that follow answers."""

from itertools import pairwise

import pytest
from tiny_chat import chatty_target, letter_tokenizer
from tiny_models import tiny_llama, tiny_target
from tiny_suites import save_pool

from specdec import generate_baseline
from specdec.bench.config import (
    BenchConfig,
    ConcurrentConfig,
    LengthBucket,
    LengthRange,
    LongContextConfig,
    MultiTurnConfig,
    PromptConfig,
    SingleTurnConfig,
)
from specdec.bench.prompts import load_prompts
from specdec.bench.workloads import bench_group, make_groups, unfold_turns
from specdec.common.messages import BenchPrompt
from specdec.targets.hf import HFTarget


def quiet(done, total, text):
    pass


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return str(save_pool(tmp_path_factory.mktemp("pool")))


@pytest.fixture(scope="module")
def target():
    return HFTarget(tiny_llama(), letter_tokenizer())


@pytest.fixture
def make(pool, target):
    """Make the groups of a suite from all texts of the pool, or from fewer."""

    def make(config, asked=target, num=80):
        config.prompts = PromptConfig(source=pool, num=num)
        return make_groups(config, asked, quiet)

    return make


def bucket(low, high, num=4, name="some"):
    return LengthBucket(name=name, low=low, high=high, num=num)


def decoded(target, request):
    return target.tokenizer.decode(request.prompt)


def test_single_turns_fit_their_bucket_with_whole_texts(make, pool, target):
    buckets = [bucket(1, 30, name="short"), bucket(60, 90, name="long")]
    groups = make(SingleTurnConfig(buckets=buckets))
    assert [group.name for group in groups] == ["short (1-30)", "long (60-90)"]
    for group, wanted in zip(groups, buckets, strict=True):
        assert len(group.calls) == 4
        assert all(wanted.low <= len(each.prompt) <= wanted.high for each in group.requests)
        assert [each.domain for each in group.requests] == ["maths", "coffee"] * 2
    known = {p.messages[-1]["content"].replace(" ", "") for p in load_prompts(pool, 80)}
    for request in groups[1].requests:
        # The letter tokenizer has no line break: it writes "~" for each.
        text = decoded(target, request).replace(" ", "").removeprefix("u:")
        found = text.partition(chr(32 + 40))[0].split("~~")
        assert set(found) <= known
        assert len(found) == len(set(found)) > 1
    seeds = [request.seed for group in groups for request in group.requests]
    assert len(set(seeds)) == len(seeds)


def test_seed_decides_the_requests(make):
    once, again, other = (
        make(SingleTurnConfig(seed=seed, buckets=[bucket(20, 90)])) for seed in (1, 1, 2)
    )
    assert once == again
    assert once[0].requests[0].prompt != other[0].requests[0].prompt


@pytest.mark.parametrize(
    ("config", "num", "message"),
    [
        (
            SingleTurnConfig(buckets=[bucket(240, 250, name="vast")]),
            3,
            r"'vast-0': the 3 texts .* give \d+ tokens .* 240 to 250",
        ),
        (MultiTurnConfig(turns=5), 3, "turns is 5 but the 3 texts of the source give 3"),
        (
            MultiTurnConfig(turns=12, conversations=1, max_new_tokens=40),
            80,
            r"context holds 256.* lower turns or max_new_tokens",
        ),
        (LongContextConfig(max_new_tokens=32), 80, "bins is 8, which makes them 32 tokens wide"),
        (LongContextConfig(context_len=512), 80, "512 but the target's context holds 256"),
    ],
)
def test_impossible_workload_is_named(make, config, num, message):
    with pytest.raises(ValueError, match=message):
        make(config, chatty_target(), num)


def test_target_without_tokenizer_is_refused(make):
    with pytest.raises(ValueError, match="no tokenizer"):
        make(SingleTurnConfig(), tiny_target())


def test_turn_is_asked_after_the_target_s_answer(make):
    target = chatty_target()
    groups = make(MultiTurnConfig(turns=4, conversations=2, max_new_tokens=8), target)
    assert [group.value for group in groups] == [1, 2, 3, 4]
    for earlier, later in pairwise(groups):
        for one, next_one in zip(earlier.requests, later.requests, strict=True):
            answer = generate_baseline(target, [one.prompt], max_new_tokens=8)[0]
            history = decoded(target, one) + answer.text
            assert decoded(target, next_one).replace(" ", "").startswith(history.replace(" ", ""))
            assert len(next_one.prompt) > len(one.prompt) + len(answer.tokens)
    ids = [request.id for group in groups for request in group.requests]
    assert ids[:4] == ["talk-0", "talk-1", "talk-0-turn2", "talk-1-turn2"]
    assert {request.domain for request in groups[3].requests} == {"maths", "coffee"}


def test_long_contexts_leave_room_for_the_answer(make):
    target = chatty_target()
    groups = make(LongContextConfig(bins=4, num=2, max_new_tokens=8), target)
    assert [group.value for group in groups] == [64, 128, 192, 256]
    for group in groups:
        for request in group.requests:
            assert group.value - 64 <= len(request.prompt) <= group.value - 8
    # A question is never asked twice, and its answer follows it.
    longest = decoded(target, groups[-1].requests[0]).replace(" ", "")
    questions = [part.partition(chr(32 + 40))[0] for part in longest.split("u:")[1:]]
    assert len(questions) == len(set(questions)) > 2
    assert longest.count("a:") == len(questions)


@pytest.fixture
def users(make):
    lengths = {"prompt_len": LengthRange(low=10, high=60), "answer_len": LengthRange(low=2, high=9)}
    return lambda **keys: make(ConcurrentConfig(users=[1, 3], **lengths, **keys))


def test_users_ask_the_same_at_every_load(users):
    one, three = users(requests_per_user=4)
    assert [group.value for group in (one, three)] == [1, 3]
    (alone,), (together,) = one.calls, three.calls
    assert (len(alone), len(together)) == (4, 12)
    assert [request for request in together if request.user == 0] == alone
    assert [request.user for request in together[:3]] == [0, 1, 2]
    assert all(10 <= len(request.prompt) <= 60 for request in together)
    assert all(2 <= request.max_new_tokens <= 9 for request in together)
    assert len({len(request.prompt) for request in together}) > 4
    assert len({request.max_new_tokens for request in together}) > 3
    assert len({request.seed for request in together}) == 12
    assert {request.arrival_s for request in together} == {None}


def test_poisson_arrivals_come_at_their_rate(users):
    one, three = users(requests_per_user=200, arrivals="poisson", rate=4.0)
    (alone,), (together,) = one.calls, three.calls
    times = [request.arrival_s for request in together if request.user == 0]
    assert times == [request.arrival_s for request in alone] == sorted(times)
    assert times != [request.arrival_s for request in together if request.user == 1]
    # 200 requests at 4 a second: 50 s, with a standard deviation of 50 / sqrt(200).
    assert times[-1] == pytest.approx(50, abs=4 * 50 / 200**0.5)


def user(text):
    return {"role": "user", "content": text}


def test_follow_up_is_asked_after_the_target_s_answer():
    target = chatty_target()
    first = BenchPrompt("a", "coffee", (user("one latte"),), follow_ups=("yes", "thanks"))
    plain = BenchPrompt("b", "coffee", (user("a mocha"),))
    unfolded = unfold_turns([first, plain], target, max_new_tokens=12)
    assert [prompt.id for prompt in unfolded] == ["a", "a-turn2", "a-turn3", "b"]
    answers = [
        generate_baseline(target, [list(prompt.messages)], max_new_tokens=12)[0].text
        for prompt in unfolded[:2]
    ]
    replies = [{"role": "assistant", "content": answer} for answer in answers]
    asked = user("one latte"), replies[0], user("yes"), replies[1], user("thanks")
    assert unfolded[2].messages == asked
    assert not any(prompt.follow_ups for prompt in unfolded)


def test_prompt_near_the_context_s_end_bounds_its_call(target):
    lengths = (target.max_context_len - 5, 3, 4)
    prompts = [BenchPrompt(str(n), "sea", text="a" * n) for n in lengths]
    config = BenchConfig(batch_size=2, max_new_tokens=16, seed=3)
    group = bench_group(config, prompts, target, quiet)
    assert [[each.max_new_tokens for each in call] for call in group.calls] == [[5, 5], [16]]
    assert [each.seed for each in group.requests] == [3, 4, 5]
