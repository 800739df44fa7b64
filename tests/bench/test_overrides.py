"""`key=value` overrides: they reach everything in the YAML, and nothing beside it."""

import pytest

from specdec.bench.config import load_config

# Each line holds the one before nine times.
BOMB = b"a0: &a0 [1]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)
)


def load(tmp_path, *overrides):
    path = tmp_path / "bench.yaml"
    path.write_text("arms: [{type: ngram}, {type: suffix}]\nsampling: {top_p: 0.5}\n")
    return load_config(str(path), overrides)


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
        ("prompts.num=many", "prompts.num"),
        ("prompts=3", "config"),
        ("repeats=1.5", "repeats is 1.5 but must be a whole number"),
        ("repeats='3'", "repeats is '3' but must be a whole number"),
        ("repeats=true", "repeats is True but must be a whole number"),
        ("repeats=null", "repeats is None but must be a whole number"),
        (f"repeats={10**30}", "repeats is .* but must be a whole number"),
        ("sampling.top_p=.inf", "sampling.top_p is inf but must be a finite number"),
        ("sampling.top_p=1e999", "sampling.top_p is inf but must be a finite number"),
        ("sampling.top_p=true", "sampling.top_p is True but must be a finite number"),
        ("arms.0.options.a=[1, .nan]", r"arms.0.options.a.1 is nan but must be a finite number"),
        ("rule=3", "rule is 3 but must be text"),
        ("rule=${oc.env:HOME}", r"'\$\{oc.env:HOME\}' is not filled in; write the value"),
        ("threads=10000000", "threads is 10000000 but must be at most"),
    ],
)
def test_an_override_that_fits_nothing_is_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "config is .* must be a mapping"),
        (b"arms: {type: ngram}", "arms is .* must be a list"),
        (b"prompts: 3", "key prompts is 3 but must be a mapping"),
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
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, content, message):
    (tmp_path / "bench.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path / "bench.yaml"))


def test_aliases_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfarms: [{type: ngram, options: &o {max_ngram: 2}}, "
        b"{type: ngram, name: b, options: *o}]"
    )
    assert [arm.options for arm in load_config(str(path)).arms] == [{"max_ngram": 2}] * 2
