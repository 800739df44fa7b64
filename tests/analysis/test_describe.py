"""What is said of a drafter where its own draft cannot be worked out, and how sure a mean is."""

import pytest
from tiny_heads import save_tiny_head
from tiny_models import tiny_target

from specdec import SamplingConfig
from specdec.analysis.describe import describe
from specdec.analysis.predict import Predictor
from specdec.analysis.teacher_forced import gather_facts
from specdec.analysis.texts import target_answers

WARM = SamplingConfig(temperature=1)
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def head(target, tmp_path_factory):
    return save_tiny_head(tmp_path_factory.mktemp("head"), "eagle", target)


@pytest.fixture(scope="module")
def texts(target):
    return target_answers(target, PROMPTS, WARM, 10)


def described(target, head, texts, rule="token", **options):
    predictor = Predictor(target, texts, WARM, rule=rule)
    options = {"type": "eagle", "path": head, **options}
    found, _ = describe(predictor, gather_facts(target, texts), "mine", options)
    return found


def first_token(found):
    """Over all places: the chance that a draft's first token is taken."""
    rows = [row for row in found["positions"] if row["count"]]
    if any(row["acceptance"] is None for row in rows):
        return None
    return sum(r["count"] * r["acceptance"] for r in rows) / sum(r["count"] for r in rows)


def test_a_rule_that_is_not_worked_out_leaves_the_other_figures(target, head, texts):
    found = described(target, head, texts, "match", width=1, children="with_replacement")
    assert "rule is 'match'" in found["not_configured_because"]
    assert found["alpha"] > 0
    assert found["coverage"]
    assert found["expected"]["chains"] == []
    assert found["expected"]["trees"]
    assert first_token(found) is None


def test_siblings_without_replacement_have_no_acceptance_that_was_worked_out_for_others(
    target, head, texts
):
    found = described(target, head, texts, width=3, children="without_replacement")
    assert first_token(found) is None
    assert found["expected"]["chains"]


def test_the_first_token_of_a_wide_draft_counts_all_its_siblings(target, head, texts):
    """More siblings than a pass looks at by itself."""
    narrow, wide = (
        described(
            target,
            head,
            texts,
            choices=[[rank] for rank in range(width)],
            children="with_replacement",
        )
        for width in (1, 7)
    )
    assert first_token(wide) > first_token(narrow) + 0.02


def test_answers_to_one_prompt_are_no_independent_texts(target, head, texts):
    """Had every prompt been answered alike four times, nothing more would be known."""
    options = {"width": 1, "depth": 2, "children": "with_replacement"}
    once = described(target, head, texts, **options)
    often = described(target, head, list(texts) * 4, **options)
    for found in (lambda d: d["configured"]["tau_ci"], lambda d: d["alpha_ci"]):
        assert found(often) == pytest.approx(found(once))
