"""Configurations of suites: what is packaged, and what is refused in words."""

import pytest
from tiny_suites import save_suite

from specdec.bench.config import SUITES, is_suite, load_suite

PACKAGED = [f"demo/{name.replace('_', '-')}" for name in SUITES]


@pytest.fixture
def suite(tmp_path):
    return lambda name, keys="": save_suite(tmp_path, tmp_path, name, keys)


@pytest.mark.parametrize("path", PACKAGED)
def test_every_packaged_suite_is_sound_and_compares_arms(path):
    config = load_suite(path)
    assert config.suite == path.removeprefix("demo/").replace("-", "_")
    assert len(config.arms) >= 3
    assert load_suite(path.replace("-", "_")) == config
    assert load_suite(path, ["repeats=7"]).repeats == 7


def test_suites_are_told_from_benches(suite, tmp_path):
    assert all(is_suite(path) for path in PACKAGED)
    assert is_suite(suite("concurrent"))
    assert not is_suite("demo")
    assert not is_suite(str(tmp_path / "missing.yaml"))
    (tmp_path / "bench.yaml").write_text("arms: []\n")
    assert not is_suite(str(tmp_path / "bench.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [\n")
    assert not is_suite(str(tmp_path / "broken.yaml"))


def test_a_suite_that_does_not_exist_is_named_with_those_that_do(suite):
    with pytest.raises(ValueError, match="suite is 'sprint' but must be one of single_turn, multi"):
        load_suite(suite("sprint"))
    with pytest.raises(
        ValueError, match=r"demo/sprint.* packaged suite; those are demo/single-turn"
    ):
        load_suite("demo/sprint")
    with pytest.raises(ValueError, match="override suite=multi_turn changes the suite"):
        load_suite(suite("concurrent"), ["suite=multi_turn"])


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("concurrent", "user=[1]", "key user does not exist; did you mean users"),
        ("multi_turn", "users=[1]", "key users does not exist"),
        ("concurrent", "users=[]", r"users is \[\] but must list numbers of at least 1"),
        ("concurrent", "users=[0,2]", r"users is \[0, 2\] but must list"),
        ("concurrent", "users=[2,2]", "users: 2 is there twice"),
        ("concurrent", "users=4", "'users' does not exist|must be a list of numbers of users"),
        ("concurrent", "requests_per_user=0", "requests_per_user is 0 but must be at least 1"),
        ("concurrent", "prompt_len.low=0", "prompt_len.low is 0 but must be at least 1"),
        ("concurrent", "answer_len.high=3", "answer_len.high is 3 but must be at least 16"),
        ("concurrent", "arrivals=bursts", "arrivals is 'bursts' but must be closed or poisson"),
        ("concurrent", "rate=0", "rate is 0.0 but must be above 0"),
        ("concurrent", "max_rows=0", "max_rows is 0 but must be at least 1"),
        ("multi_turn", "turns=0", "turns is 0 but must be at least 1"),
        ("long_context", "bins=0", "bins is 0 but must be at least 1"),
        ("single_turn", "buckets=[]", "buckets is empty but must hold at least one entry"),
        (
            "single_turn",
            "buckets=[{low: 9, high: 4}]",
            "buckets.0.high is 4 but must be at least 9",
        ),
        ("single_turn", "buckets=[{hi: 4}]", "key buckets.0.hi does not exist; did you mean"),
        ("single_turn", "buckets=[{name: a}, {name: a}]", "buckets: a is there twice"),
        ("single_turn", "repeats=0", "repeats is 0 but must be at least 1"),
        ("single_turn", "rule=best", "best"),
        ("single_turn", "sampling.top_p=0", "sampling.top_p is 0.0 but must be in"),
        ("single_turn", "prompts.num=0", "prompts.num is 0 but must be at least 1"),
        ("single_turn", "arms=[{type: ngram}, {type: ngram}]", "'ngram' is used twice"),
        ("single_turn", "arms=[{name: plain, type: ngram}]", "'plain' is used twice"),
        ("single_turn", "arms=[{type: hf_assisted}]", "only our own loop does; drop the arm"),
        ("single_turn", "arms=[{type: ngram, draft_length: {a: 1}}]", "draft_length of 'ngram'"),
    ],
)
def test_a_wrong_configuration_is_named(suite, name, override, message):
    with pytest.raises(ValueError, match=message):
        load_suite(suite(name), [override])


def test_a_grid_over_an_arm_s_options_makes_an_arm_of_each_combination(suite):
    path = suite("multi_turn")
    config = load_suite(
        path, ["arms=[{type: ngram, name: 'n{max_nodes}', grid: {max_nodes: [2, 4]}}]"]
    )
    assert [(arm.name, arm.options) for arm in config.arms] == [
        ("n2", {"max_nodes": 2}),
        ("n4", {"max_nodes": 4}),
    ]


def test_a_file_that_is_not_there_is_said_to_be_missing():
    with pytest.raises(FileNotFoundError, match=r"'none\.yaml' is not a file"):
        load_suite("none.yaml")
