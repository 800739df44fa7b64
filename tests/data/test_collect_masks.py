"""Masks for personal data and secrets, and texts that must stay: the examples of a file."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

from specdec.data.cleaning import Masker

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
