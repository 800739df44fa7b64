"""The requests of each suite: their lengths, their texts, and that they are the same every time."""

from itertools import pairwise

import pytest
from tiny_chat import chatty_target, letter_tokenizer
from tiny_models import tiny_llama, tiny_target
from tiny_suites import save_pool

from specdec import generate_baseline
from specdec.bench.config import (
    ConcurrentConfig,
    LengthBucket,
    LengthRange,
    LongContextConfig,
    MultiTurnConfig,
    SingleTurnConfig,
)
from specdec.bench.prompts import load_prompts
from specdec.bench.workloads import (
    TextPool,
    concurrent_groups,
    long_context_groups,
    multi_turn_groups,
    single_turn_groups,
)
from specdec.targets.hf import HFTarget


def quiet(done, total, text):
    pass


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return load_prompts(str(save_pool(tmp_path_factory.mktemp("pool"))), 80)


@pytest.fixture(scope="module")
def target():
    return HFTarget(tiny_llama(), letter_tokenizer())


def decoded(target, ask):
    return target.tokenizer.decode(ask.prompt)


def test_single_turns_have_the_lengths_of_their_bucket_and_whole_texts_of_both_domains(
    texts, target
):
    config = SingleTurnConfig(
        buckets=[LengthBucket("short", 1, 30, 4), LengthBucket("long", 60, 90, 4)]
    )
    groups = single_turn_groups(config, TextPool(texts, target))
    assert [group.name for group in groups] == ["short (1-30)", "long (60-90)"]
    for group, bucket in zip(groups, config.buckets, strict=True):
        assert len(group.calls) == 4
        assert all(bucket.low <= len(ask.prompt) <= bucket.high for ask in group.asks)
        assert [ask.domain for ask in group.asks] == ["maths", "coffee"] * 2
    known = [text.messages[-1]["content"] for text in texts]
    for ask in groups[1].asks:
        # The letter tokenizer has no line break: it writes "~" for each.
        turn = decoded(target, ask).replace(" ", "").removeprefix("u:").partition(chr(32 + 40))[0]
        found = turn.split("~~")
        assert set(found) <= {text.replace(" ", "") for text in known}
        assert len(found) == len(set(found)) > 1
    seeds = [ask.seed for group in groups for ask in group.asks]
    assert len(set(seeds)) == len(seeds)


def test_a_seed_makes_the_same_requests_again_and_another_seed_others(texts, target):
    def prompts(seed):
        groups = single_turn_groups(
            SingleTurnConfig(seed=seed, buckets=[LengthBucket("some", 20, 90, 4)]),
            TextPool(texts, target, seed),
        )
        return [ask.prompt for ask in groups[0].asks]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def test_a_pool_that_is_too_small_is_named_with_what_it_gives(texts, target):
    config = SingleTurnConfig(buckets=[LengthBucket("vast", 240, 250, 1)])
    with pytest.raises(ValueError, match=r"'vast-0': the 3 texts .* give \d+ tokens .* 240 to 250"):
        single_turn_groups(config, TextPool(texts[:3], target))


def test_a_target_without_a_tokenizer_is_refused(texts):
    with pytest.raises(ValueError, match="no tokenizer"):
        TextPool(texts, tiny_target())


def test_every_turn_is_asked_after_the_target_s_own_answer(texts):
    target = chatty_target()
    config = MultiTurnConfig(turns=4, conversations=2, max_new_tokens=8)
    groups = multi_turn_groups(config, TextPool(texts, target), target, quiet)
    assert [group.value for group in groups] == [1, 2, 3, 4]
    for earlier, later in pairwise(groups):
        for one, next_one in zip(earlier.asks, later.asks, strict=True):
            answer = generate_baseline(target, [one.prompt], max_new_tokens=8)[0]
            history = decoded(target, one) + answer.text
            assert decoded(target, next_one).replace(" ", "").startswith(history.replace(" ", ""))
            assert len(next_one.prompt) > len(one.prompt) + len(answer.tokens)
    ids = [ask.id for group in groups for ask in group.asks]
    assert ids[:4] == ["talk-0", "talk-1", "talk-0-turn2", "talk-1-turn2"]
    assert {ask.domain for ask in groups[3].asks} == {"maths", "coffee"}


def test_too_many_turns_for_the_pool_or_the_context_are_refused(texts):
    target = chatty_target()
    pool = TextPool(texts[:3], target)
    with pytest.raises(ValueError, match="turns is 5 but the 3 texts of the source give 3"):
        multi_turn_groups(MultiTurnConfig(turns=5), pool, target, quiet)
    long = MultiTurnConfig(turns=12, conversations=1, max_new_tokens=40)
    with pytest.raises(ValueError, match=r"context holds 256.* lower turns or max_new_tokens"):
        multi_turn_groups(long, TextPool(texts, target), target, quiet)


def test_long_contexts_leave_room_for_the_answer_in_their_bin_up_to_the_limit(texts):
    target = chatty_target()
    config = LongContextConfig(bins=4, num=2, max_new_tokens=8)
    groups = long_context_groups(config, TextPool(texts, target), target, quiet)
    assert [group.value for group in groups] == [64, 128, 192, 256]
    for group in groups:
        for ask in group.asks:
            assert group.value - 64 <= len(ask.prompt) <= group.value - 8
    # A question is never asked twice, and its answer follows it.
    longest = decoded(target, groups[-1].asks[0]).replace(" ", "")
    questions = [part.partition(chr(32 + 40))[0] for part in longest.split("u:")[1:]]
    assert len(questions) == len(set(questions)) > 2
    assert longest.count("a:") == len(questions)


def test_bins_that_cannot_hold_an_answer_and_contexts_beyond_the_target_s_are_refused(texts):
    target = chatty_target()
    pool = TextPool(texts, target)
    with pytest.raises(ValueError, match="bins is 8, which makes them 32 tokens wide"):
        long_context_groups(LongContextConfig(max_new_tokens=32), pool, target, quiet)
    with pytest.raises(ValueError, match="context_len is 512 but the target's context holds 256"):
        long_context_groups(LongContextConfig(context_len=512), pool, target, quiet)


def users(texts, target, **keys):
    config = ConcurrentConfig(
        users=[1, 3], prompt_len=LengthRange(10, 60), answer_len=LengthRange(2, 9), **keys
    )
    return concurrent_groups(config, TextPool(texts, target, config.seed))


def test_users_have_lengths_of_their_own_and_ask_the_same_at_every_load(texts, target):
    one, three = users(texts, target, requests_per_user=4)
    assert [group.value for group in (one, three)] == [1, 3]
    (alone,), (together,) = one.calls, three.calls
    assert len(alone) == 4
    assert len(together) == 12
    assert [ask for ask in together if ask.user == 0] == alone
    assert [ask.user for ask in together[:3]] == [0, 1, 2]
    assert all(10 <= len(ask.prompt) <= 60 for ask in together)
    assert all(2 <= ask.max_new_tokens <= 9 for ask in together)
    assert len({len(ask.prompt) for ask in together}) > 4
    assert len({ask.max_new_tokens for ask in together}) > 3
    assert len({ask.seed for ask in together}) == 12
    assert {ask.arrival_s for ask in together} == {None}


def test_poisson_arrivals_come_at_the_rate_and_do_not_depend_on_the_load(texts, target):
    one, three = users(texts, target, requests_per_user=200, arrivals="poisson", rate=4.0)
    (alone,), (together,) = one.calls, three.calls
    times = [ask.arrival_s for ask in together if ask.user == 0]
    assert times == [ask.arrival_s for ask in alone] == sorted(times)
    assert times != [ask.arrival_s for ask in together if ask.user == 1]
    # 200 requests at 4 a second: 50 s, with a standard deviation of 50 / sqrt(200).
    assert times[-1] == pytest.approx(50, abs=4 * 50 / 200**0.5)
