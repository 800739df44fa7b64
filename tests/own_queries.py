"""Queries of our own making, in the form and place of a public data set."""

import csv

ASKED = (
    "How do I {} my {}?",
    "I tried to {} the {} twice and nothing happened.",
    "Is there a fee when I {} a {} abroad?",
    "Who can {} a lost {} for me at the weekend?",
)
VERBS = ("block", "renew", "order", "cancel", "activate", "return", "upgrade")
NOUNS = ("credit card", "savings book", "direct debit", "travel money", "standing order")


def write_queries(folder):
    """A data folder with a `banking77` of 140 queries; its path."""
    place = folder / "banking77"
    place.mkdir(parents=True)
    rows = [
        (ask.format(verb, noun), f"{verb}_{noun}")
        for ask in ASKED
        for verb in VERBS
        for noun in NOUNS
    ]
    with (place / "train.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "category"), *rows])
    return folder
