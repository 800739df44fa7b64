"""Cleaning: masks and texts that must stay, near-duplicates, hashes that split and draw."""

import random
import re
from collections import defaultdict
from pathlib import Path

import pytest
from tiny_chat import user

from specdec.common.messages import Query
from specdec.data.cleaning import (
    Masker,
    NearDuplicates,
    conversation_id,
    query_id,
    sample_rank,
    split_of,
)

RANDOM, HEX = "aB3dE7gH1jK5mN9pQ2rS6tV8wX4zC0yF", "0123456789abcdef"


def made(match):
    """Characters that look random; put together here, so that no scanner takes them for a leak."""
    length, letters = int(match[2]), HEX if match[1] else match[3] or RANDOM
    return (letters * (length // len(letters) + 1))[:length]


def read_examples():
    found, section = defaultdict(list), None
    path = Path(__file__).with_name("mask_examples.txt")
    for line in path.read_text("utf-8").split("\n"):
        if head := re.match(r"\[(\S+)\] #", line):
            section = head[1]
        elif line and section:
            line = re.sub(r"\{(hex)?(\d+)(?::(\w+))?\}", made, line)
            found[section].append(line.replace("␤", "\n"))
    return found


EXAMPLES = read_examples()
MASKED = [line.split(" → ") for line in EXAMPLES["masked"]]
SECRETS = [re.split("[⟦⟧]", line) for line in EXAMPLES["secret"]]


@pytest.mark.parametrize(("text", "masked"), MASKED)
def test_find_is_replaced_and_counted(text, masked):
    masker = Masker()
    assert masker.mask(text) == masked
    assert masker.counts.total() == 1
    assert masker.mask(masked) == masked


@pytest.mark.parametrize(("before", "secret", "after"), SECRETS)
def test_no_part_of_a_secret_is_left(before, secret, after):
    for left, right in [("", ""), ("use ", "."), ("我的密钥是", "，请帮我"), ("(", ")")]:
        if before and left == "我的密钥是" and before[0].isascii():
            continue
        masked = Masker().mask(left + before + secret + after + right)
        assert not [masked for i in range(len(secret) - 5) if secret[i : i + 6] in masked]


@pytest.mark.parametrize("mask", ["<EMAIL>", "<CARD>", "<PHONE>"])
def test_personal_data_is_found_in_every_writing(mask):
    masked = {text: Masker().mask(f"write {text} today") for text in EXAMPLES[mask]}
    assert len(masked) > 5
    assert {text: found for text, found in masked.items() if mask not in found} == {}


@pytest.mark.parametrize("text", EXAMPLES["harmless"])
def test_harmless_text_stays(text):
    assert Masker().mask(text) == text


def test_numbers_beside_each_other_are_masked():
    two = "4111111111111111 5555555555554444"
    assert Masker().mask(two) == "<CARD> <CARD>"
    text = "IBAN DE89 3704 0044 0532 0130 00 and GB82WEST12345698765432 or 078-05-1120"
    assert Masker().mask(text) == "IBAN <IBAN> and <IBAN> or <SSN>"


def test_region_decides_about_national_phone_numbers():
    text = "Ruf an: 030 901820"
    assert Masker().mask(text) == text
    assert Masker("DE").mask(text) == "Ruf an: <PHONE>"
    with pytest.raises(ValueError, match="'Germany' but must be"):
        Masker("Germany")


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
    first = user("Order 12, please: 3 lattes!")
    same = conversation_id(first, "")
    later = (*first, {"role": "assistant", "content": "Sure"}, *user("And a tea"))
    for turns in (later, ({"role": "system", "content": "x"}, *first)):
        assert conversation_id(turns, "") == same
    assert conversation_id(user("order 7  please, 1,000 LATTES"), "") == same
    assert conversation_id(user("Order 12, please: 3 teas!"), "") != same
    assert conversation_id(user("???"), "") != conversation_id(user("!"), "")


def test_larger_share_holds_out_what_a_smaller_does():
    names = [conversation_id(user(f"question {chr(97 + n % 26)}{'x' * n}"), "") for n in range(999)]
    held = [{name for name in names if split_of(name, share) == "held_out"} for share in (0.1, 0.2)]
    assert held[0] < held[1]
    assert 0.07 < len(held[0]) / len(names) < 0.13
    assert {split_of(name, 0.0) for name in names} == {"train"}
    assert {split_of(name, 1.0) for name in names} == {"held_out"}


def test_hashes_follow_the_query_and_the_seed():
    names = [str(n) for n in range(50)]
    orders = [sorted(names, key=lambda name: sample_rank(name, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert query_id(user("a"), "") != query_id(user("a "), "")
    assert query_id((), "a") != query_id(user("a"), "")
