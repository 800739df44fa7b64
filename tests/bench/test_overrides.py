"""`key=value` overrides: they reach everything in the YAML, and nothing beside it."""

import pytest

from specdec.bench.config import load_config


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
    ],
)
def test_an_override_that_fits_nothing_is_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "config file is .* must be a mapping"),
        (b"arms: {type: ngram}", "arms is .* must be a list"),
        (b"prompts: 3", "key prompts is 3 but must be a mapping"),
        (b"a: : b", "mapping values"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path, content, message):
    (tmp_path / "bench.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_config(str(tmp_path / "bench.yaml"))
