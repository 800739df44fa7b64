import random

import pytest

from specdec.data.cleaning import NearDuplicates, conversation_id, query_id, sample_rank, split_of
from specdec.data.conversation import Query

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did she sell altogether in the two months?"
)
LONG = " ".join(f"{word}{number}" for number in range(200) for word in QUESTION.split())


def query(*texts):
    roles = ["user", "assistant"] * len(texts)
    turns = tuple({"role": r, "content": t} for r, t in zip(roles, texts, strict=False))
    return Query(query_id(turns, ""), turns)


def chat(text):
    return ({"role": "user", "content": text},)


def test_a_query_that_differs_in_little_is_a_near_duplicate():
    seen = NearDuplicates(0.8)
    first = query(QUESTION)
    assert seen.seen(first) is None
    assert seen.seen(query(QUESTION.upper().replace(" ", "  ") + "?")) is first
    assert seen.seen(query(QUESTION.replace("Natalia", "Weng"))) is first
    assert (
        seen.seen(query(QUESTION.replace("clips", "tickets for the zoo").replace("sold", "gave")))
        is None
    )


def test_turns_of_one_conversation_and_questions_behind_one_instruction_are_no_duplicates():
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


def test_system_messages_do_not_tell_queries_apart():
    seen = NearDuplicates(0.8)
    for time in ("12:01", "a quarter past four in the afternoon"):
        turns = ({"role": "system", "content": f"It is {time}"}, *chat(QUESTION))
        last = seen.seen(Query(query_id(turns, ""), turns))
    assert last is not None


@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_what_is_dropped_is_as_alike_as_the_threshold_says(threshold):
    """Against the exact similarity of all pairs: none too unlike, and few that are missed."""
    rng = random.Random(0)
    words = [f"word{n}" for n in range(60)]
    base = rng.sample(words, 40)
    texts = []
    for _ in range(60):
        changed = [rng.choice(words) if rng.random() < 0.06 else word for word in base]
        texts.append(" ".join(changed))
    queries = list({each.id: each for each in map(query, texts)}.values())

    def runs(each):
        return {each.last_turn[i : i + 5] for i in range(len(each.last_turn) - 4)}

    seen, kept, missed, dropped = NearDuplicates(threshold), [], 0, 0
    for each in queries:
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


def test_a_conversation_keeps_its_name_and_so_its_split():
    first = chat("Order 12, please: 3 lattes!")
    later = (*first, {"role": "assistant", "content": "Sure"}, *chat("And a tea"))
    same = conversation_id(first, "")
    assert conversation_id(later, "") == same
    assert conversation_id(({"role": "system", "content": "x"}, *first), "") == same
    assert conversation_id(chat("order 7  please, 1,000 LATTES"), "") == same
    assert conversation_id(chat("Order 12, please: 3 teas!"), "") != same
    assert conversation_id(chat("???"), "") != conversation_id(chat("!"), "")


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    names = [conversation_id(chat(f"question {chr(97 + n % 26)}{'x' * n}"), "") for n in range(999)]
    held = [{name for name in names if split_of(name, share) == "held_out"} for share in (0.1, 0.2)]
    assert held[0] < held[1]
    assert 0.07 < len(held[0]) / len(names) < 0.13
    assert {split_of(name, 0.0) for name in names} == {"train"}
    assert {split_of(name, 1.0) for name in names} == {"held_out"}


def test_another_seed_draws_in_another_order():
    names = [str(n) for n in range(50)]
    orders = [sorted(names, key=lambda name: sample_rank(name, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_ids_are_of_exactly_the_query():
    assert query_id(chat("a"), "") != query_id(chat("a "), "")
    assert query_id((), "a") != query_id(chat("a"), "")
