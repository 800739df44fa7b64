"""Configurations of benches and suites: overrides reach everything, and what is wrong is named."""

import pytest
from tiny_suites import save_suite

from specdec.bench.config import SUITES, load_config
from specdec.bench.sweep import load_cells

PACKAGED = [f"demo/{name.replace('_', '-')}" for name in SUITES]
# Each line holds the one before nine times.
BOMB = b"a0: &a0 [1]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)
)


def load(tmp_path, *overrides):
    path = tmp_path / "bench.yaml"
    path.write_text("arms: [{type: ngram}, {type: suffix}]\nsampling: {top_p: 0.5}\n")
    return load_config(str(path), overrides)


def load_suite(path, overrides=()):
    (cell,) = load_cells(path, overrides)
    return cell.config


def test_overrides_reach_into_mappings_and_lists(tmp_path):
    config = load(
        tmp_path, "sampling.temperature=0.5", "arms.1.name=mine", "arms.0.options.max_ngram=2"
    )
    assert (config.sampling.temperature, config.sampling.top_p) == (0.5, 0.5)
    assert [arm.name for arm in config.arms] == ["ngram", "mine"]
    assert config.arms[0].options == {"max_ngram": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("repeats", "must be key=value"),
        ("=3", "must be key=value"),
        ("arms.7.name=x", "leads nowhere"),
        ("arms.first.name=x", "leads nowhere"),
        ("arms.0.nam=x", "did you mean arms.0.name"),
        ("repeats=[", "config"),
        ("max_new_token=3", "did you mean max_new_tokens"),
        ("prompts.nun=3", "did you mean prompts.num"),
        ("prompts.num=many", "prompts.num"),
        ("prompts=3", "config"),
        ("repeats=0", "repeats is 0 but must be at least 1"),
        ("repeats=1.5", "repeats is 1.5 but must be a whole number"),
        ("repeats='3'", "repeats is '3' but must be a whole number"),
        ("repeats=true", "repeats is True but must be a whole number"),
        ("repeats=null", "repeats is None but must be a whole number"),
        (f"repeats={10**30}", "repeats is .* but must be a whole number"),
        ("sampling.top_p=.inf", "sampling.top_p is inf but must be a finite number"),
        ("sampling.top_p=1e999", "sampling.top_p is inf but must be a finite number"),
        ("sampling.top_p=true", "sampling.top_p is True but must be a finite number"),
        ("sampling.top_p=0", "sampling.top_p is 0.0 but must be in"),
        ("sampling.min_new_tokens=65", "at most max_new_tokens, 64"),
        ("arms.0.options.a=[1, .nan]", r"arms.0.options.a.1 is nan but must be a finite number"),
        ("rule=3", "rule is 3 but must be text"),
        ("rule=tokens", "rule is 'tokens': did you mean"),
        ("rule=${oc.env:HOME}", r"'\$\{oc.env:HOME\}' is not filled in; write the value"),
        ("threads=10000000", "threads is 10000000 but must be at most"),
        ("prompts_per_call=-1", "prompts_per_call is -1 but must be 0 or at least batch_size, 1"),
        ("suite=concurrent", "override suite=concurrent would change the suite"),
        ("arms=[{type: ngram}, {type: ngram}]", "used twice"),
        ("arms=[{name: plain, type: ngram}]", "'plain' is used twice"),
        ("arms={type: ngram}", "'arms' does not exist, or is of another kind"),
        ("arms=[ngram]", "arms.0 is 'ngram' but must be a mapping"),
        ("arms=[{name: x}]", "arms.0.type is missing"),
        ("arms=[{type: ngram, options: [3]}]", "options is .* must be a mapping"),
        ("arms=[{type: ngram, draft_length: 4}]", "draft_length"),
        ("arms=[{type: ngram, draft_length: {}}]", "'ngram': .*needs an entry for batch size 1"),
        ("arms=[{type: ngram, draft_length: {1: 2, 0: 4}}]", "'ngram': batch size 0 must be"),
        ("arms=[{type: ngram, draft_length: {1: -1}}]", "nodes for batch size 1 is -1"),
        ("arms=[{type: ngram, draft_length: {plans: x}}]", "{plan: PATH}"),
        ("arms=[{type: hf_prompt_lookup, draft_length: {1: 2}}]", "takes no draft_length"),
    ],
)
def test_wrong_override_is_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, override)


def test_assisted_generation_takes_one_prompt(tmp_path):
    with pytest.raises(ValueError, match="one prompt at a time, but batch_size is 2"):
        load(tmp_path, "arms=[{type: hf_assisted}]", "batch_size=2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "config is .* must be a mapping"),
        (b"arms: {type: ngram}", "arms is .* must be a list"),
        (b"prompts: 3", "prompts is 3 but must be a mapping"),
        (b"a: : b", "mapping values"),
        (b"\xff\xfe", "utf-8"),
        (b"rule: !!bool x", "'x'"),
        (b"rule: tok\0en", "special characters are not allowed"),
        (b"rule: a\nrule: b", "found duplicate key rule"),
        (b"rule: ${oc.env:HOME}", "is not filled in"),
        (b"arms: [{type: ngram, options: {'${rule}': 1}}]", "is not filled in"),
        (b"[" * 100_000, "nested more than 50 deep"),
        (b"a: &a [*a]", "recursive aliases are not supported"),
        (BOMB, "50,000 values are no configuration"),
        (b"rule: " + b"a" * 2**20, "1,048,576 characters are no configuration"),
        (b"suite: concurrent", "is of a suite, but a bench is wanted"),
    ],
)
def test_file_of_another_form_is_named(tmp_path, content, message):
    (tmp_path / "bench.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path / "bench.yaml"))


def test_aliases_and_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfarms: [{type: ngram, options: &o {max_ngram: 2}}, "
        b"{type: ngram, name: b, options: *o}]"
    )
    assert [arm.options for arm in load_config(str(path)).arms] == [{"max_ngram": 2}] * 2


@pytest.mark.parametrize("path", PACKAGED)
def test_packaged_suite_is_sound_and_compares_arms(path):
    config = load_suite(path)
    assert config.suite == path.removeprefix("demo/").replace("-", "_")
    assert len(config.arms) >= 3
    assert load_suite(path.replace("-", "_")) == config
    assert load_suite(path, ["repeats=7"]).repeats == 7


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("sprint", "repeats=1", "suite is 'sprint' but must be one of single_turn, multi"),
        ("concurrent", "suite=multi_turn", "override suite=multi_turn would change the suite"),
        ("concurrent", "grid.users=[[1]]", "key grid does not exist"),
        ("concurrent", "user=[1]", "key user does not exist; did you mean users"),
        ("multi_turn", "users=[1]", "key users does not exist"),
        ("concurrent", "users=[]", r"users is \[\] but must be a list of at least 1"),
        ("concurrent", "users=[0,2]", r"users.0 is 0 but must be at least 1"),
        ("concurrent", "users=[2,2]", "users: 2 is used twice"),
        ("concurrent", "users=4", "'users' does not exist|must be a list"),
        ("concurrent", "requests_per_user=0", "requests_per_user is 0 but must be at least 1"),
        ("concurrent", "prompt_len.low=0", "prompt_len.low is 0 but must be at least 1"),
        ("concurrent", "answer_len={high: 3}", "high is 3 but must be at least low, 16"),
        ("concurrent", "arrivals=bursts", "arrivals is 'bursts' but must be one of 'closed'"),
        ("concurrent", "rate=0", "rate is 0.* but must be above 0"),
        ("concurrent", "max_rows=0", "max_rows is 0 but must be at least 1"),
        ("multi_turn", "turns=0", "turns is 0 but must be at least 1"),
        ("long_context", "bins=0", "bins is 0 but must be at least 1"),
        ("single_turn", "buckets=[]", r"buckets is \[\] but must be a list of at least 1"),
        ("single_turn", "buckets=[{low: 9, high: 4}]", "high is 4 but must be at least low, 9"),
        ("single_turn", "buckets=[{hi: 4}]", "key buckets.0.hi does not exist; did you mean"),
        ("single_turn", "buckets=[{name: a}, {name: a}]", "buckets: 'a' is used twice"),
        ("single_turn", "rule=best", "best"),
        ("single_turn", "prompts.num=0", "prompts.num is 0 but must be at least 1"),
        ("single_turn", "arms=[{type: hf_assisted}]", "only our own loop does; drop the arm"),
        ("single_turn", "arms=[{type: ngram, draft_length: {a: 1}}]", "draft_length of 'ngram'"),
    ],
)
def test_wrong_suite_is_named(tmp_path, name, override, message):
    with pytest.raises(ValueError, match=message):
        load_suite(save_suite(tmp_path, tmp_path, name, ""), [override])


def test_missing_configuration_is_said_to_be_missing():
    with pytest.raises(FileNotFoundError, match=r"'none\.yaml' is not a file"):
        load_cells("none.yaml")
    with pytest.raises(
        ValueError, match=r"demo/sprint.* packaged suite; those are demo/single-turn"
    ):
        load_cells("demo/sprint")
