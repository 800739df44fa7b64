"""Near-duplicates, and the hashes that split and draw queries."""

import random

import pytest

from specdec.common.messages import Query
from specdec.data.cleaning import NearDuplicates, conversation_id, query_id, sample_rank, split_of

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did she sell altogether in the two months?"
)
LONG = " ".join(f"{word}{number}" for number in range(200) for word in QUESTION.split())


def query(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    turns = tuple([{"role": "system", "content": system}] * bool(system) + turns)
    return Query(query_id(turns, ""), turns)


def chat(text):
    return ({"role": "user", "content": text},)


def test_nearly_equal_query_is_a_duplicate():
    seen = NearDuplicates(0.8)
    first = query(QUESTION, system="It is 12:01")
    assert seen.seen(first) is None
    assert seen.seen(query(QUESTION.upper().replace(" ", "  ") + "?")) is first
    assert seen.seen(query(QUESTION.replace("Natalia", "Weng"))) is first
    assert seen.seen(query(QUESTION, system="a quarter past four in the afternoon")) is first
    other = QUESTION.replace("clips", "tickets for the zoo").replace("sold", "gave")
    assert seen.seen(query(other)) is None


def test_turns_and_contexts_are_compared_apart():
    seen = NearDuplicates(0.8)
    queries = [
        query(LONG),
        query(LONG, LONG, "And in June?"),
        query(LONG, LONG, "And in June?", "12", "Why?"),
        query(LONG, LONG, "Thanks, that is all."),
        query(QUESTION, "72", "Thanks, that is all."),
    ]
    assert [seen.seen(each) for each in queries] == [None] * len(queries)
    assert seen.seen(query(LONG + "!", LONG, "and in june?")) is queries[1]


@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_dropped_queries_are_as_alike_as_said(threshold):
    """Compare with the exact similarity of all pairs: none too unlike, and few that are missed."""
    rng = random.Random(0)
    words = [f"word{n}" for n in range(60)]
    base = rng.sample(words, 40)
    texts = [
        " ".join(rng.choice(words) if rng.random() < 0.06 else word for word in base)
        for _ in range(60)
    ]

    def runs(each):
        return {each.last_turn[i : i + 5] for i in range(len(each.last_turn) - 4)}

    seen, kept, missed, dropped = NearDuplicates(threshold), [], 0, 0
    for each in {each.id: each for each in map(query, texts)}.values():
        alike = [len(runs(each) & runs(o)) / len(runs(each) | runs(o)) for o in kept]
        found = seen.seen(each)
        if found is None:
            kept.append(each)
            missed += max(alike, default=0) >= threshold
        else:
            dropped += 1
            assert alike[kept.index(found)] >= threshold
    assert dropped > 5
    assert missed <= 0.1 * (dropped + missed)


def test_conversation_keeps_its_name():
    first = chat("Order 12, please: 3 lattes!")
    same = conversation_id(first, "")
    later = (*first, {"role": "assistant", "content": "Sure"}, *chat("And a tea"))
    for turns in (later, ({"role": "system", "content": "x"}, *first)):
        assert conversation_id(turns, "") == same
    assert conversation_id(chat("order 7  please, 1,000 LATTES"), "") == same
    assert conversation_id(chat("Order 12, please: 3 teas!"), "") != same
    assert conversation_id(chat("???"), "") != conversation_id(chat("!"), "")


def test_larger_share_holds_out_what_a_smaller_does():
    names = [conversation_id(chat(f"question {chr(97 + n % 26)}{'x' * n}"), "") for n in range(999)]
    held = [{name for name in names if split_of(name, share) == "held_out"} for share in (0.1, 0.2)]
    assert held[0] < held[1]
    assert 0.07 < len(held[0]) / len(names) < 0.13
    assert {split_of(name, 0.0) for name in names} == {"train"}
    assert {split_of(name, 1.0) for name in names} == {"held_out"}


def test_seed_decides_the_order_of_the_draw():
    names = [str(n) for n in range(50)]
    orders = [sorted(names, key=lambda name: sample_rank(name, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_ids_name_exactly_the_query():
    assert query_id(chat("a"), "") != query_id(chat("a "), "")
    assert query_id((), "a") != query_id(chat("a"), "")
