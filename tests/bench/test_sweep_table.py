"""The table of a sweep: what fits is shown, and nothing is cut."""

import pytest
from rich.console import Console

from specdec.report.tables import sweep_table


def figures(speed):
    interval = [0.9 * speed, 1.1 * speed]
    return {
        "tau": 1.5 * speed,
        "tau_ci": interval,
        "decode_tokens_per_s": 100.0 * speed,
        "speedup_vs_plain": speed,
        "speedup_vs_plain_ci": interval,
        "speedup_vs_hf": speed,
        "speedup_vs_hf_ci": interval,
    }


def arm(name, speed, domains):
    return {"name": name, **figures(speed), "domains": dict.fromkeys(domains, figures(speed / 2))}


@pytest.fixture
def sweep():
    def cell(temperature, source, *arms):
        settings = {"sampling.temperature": temperature, "prompts.source": source}
        return {"settings": settings, "arms": list(arms)}

    both = ("sea", "land")
    return {
        "cells": [
            cell(0.0, "/data/a.txt", arm("plain", 1.0, both), arm("ngram", 1.25, both)),
            cell(0.5, "/data/b.txt", arm("plain", 1.0, both[:1])),
            cell(1.0, "/data/b.txt"),
        ]
    }


def lines(sweep, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(sweep_table(sweep, width))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_each_cell_names_its_settings_once_and_a_failed_one_keeps_its_place(sweep):
    rows = [line.split()[:3] for line in lines(sweep, 140)]
    assert ["0", "a.txt", "plain"] in rows
    assert ["0.5", "b.txt", "plain"] in rows
    assert ["1", "b.txt", "failed"] in rows
    assert any(row[0] == "ngram" for row in rows if row)


@pytest.mark.parametrize(
    ("width", "num_intervals", "has_domains"),
    [(140, 3, True), (90, 1, True), (80, 2, False), (56, 0, False)],
)
def test_intervals_are_given_up_before_domains_and_all_before_anything_is_cut(
    sweep, width, num_intervals, has_domains
):
    text = lines(sweep, width)
    assert max(map(len, text)) <= width
    assert not any("…" in line for line in text)
    row = next(line for line in text if " ngram " in line or line.strip().startswith("ngram"))
    assert row.count("[") == num_intervals
    assert any("sea" in line for line in text) == has_domains
    assert ("0.94  0.62" in row) == has_domains
    # A domain that a cell does not have is a dash.
    second = next(line for line in text if line.startswith("0.5"))
    assert second.endswith(" -") == has_domains
