"""Configurations: overrides reach everything, grids multiply, and what is wrong is named."""

import re
from pathlib import Path

import pytest

from specdec.bench.config import SUITES, BenchConfig, load_cells, load_config, short_names

DOCUMENT = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()
PACKAGED = [f"demo/{name.replace('_', '-')}" for name in SUITES]
# Each line holds the one before nine times.
BOMB = b"a0: &a0 [1]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (i, i, b",".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 12)
)
BENCH = "arms: [{type: ngram}, {type: suffix}]\nsampling: {top_p: 0.5}\n"
GRID = """
grid:
  sampling.temperature: [0, 0.7]
  batch_size: [1, 4]
max_new_tokens: 12
arms:
  - {type: ngram}
  - name: "eagle3 {depth}x{width} of {max_nodes}"
    type: eagle3
    options: {max_nodes: 9}
    grid: {depth: [2, 4], width: [1, 3]}
"""


@pytest.fixture
def load(tmp_path):
    """The cells of a text, with overrides."""

    def load(text, *overrides):
        path = tmp_path / "bench.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_cells(str(path), overrides)

    return load


def test_overrides_reach_into_mappings_and_lists(load):
    changes = ("sampling.temperature=0.5", "arms.1.name=mine", "arms.0.options.max_ngram=2")
    config = load(BENCH, *changes)[0].config
    assert (config.sampling.temperature, config.sampling.top_p) == (0.5, 0.5)
    assert [arm.name for arm in config.arms] == ["ngram", "mine"]
    assert config.arms[0].options == {"max_ngram": 2}


OVERRIDES = [
    ("repeats", "must be key=value"),
    ("=3", "must be key=value"),
    ("arms.7.name=x", "leads nowhere"),
    ("arms.first.name=x", "leads nowhere"),
    ("arms.0.nam=x", "did you mean arms.0.name"),
    ("repeats=[", r"override 'repeats=\[': expected"),
    ("max_new_token=3", "did you mean max_new_tokens"),
    ("prompts.nun=3", "did you mean prompts.num"),
    ("prompts.num=many", "prompts.num"),
    ("prompts=3", "config"),
    ("repeats=0", "repeats is 0 but must be at least 1"),
    *(
        (f"repeats={value}", "repeats is .* but must be a whole number")
        for value in ("1.5", "'3'", "true", "null", 10**30)
    ),
    ("sampling.top_p=.inf", "sampling.top_p is inf but must be a finite number"),
    ("sampling.top_p=1e999", "sampling.top_p is inf but must be a finite number"),
    ("sampling.top_p=true", "sampling.top_p is True but must be a finite number"),
    ("sampling.top_p=0", r"top_p is 0.0 but must be in \(0, 1\]; use 1"),
    ("sampling.min_new_tokens=65", "at most max_new_tokens, 64"),
    ("arms.0.options.a=[1, .nan]", r"arms.0.options.a.1 is nan but must be a finite number"),
    ("rule=3", "rule is 3 but must be text"),
    ("rule=tokens", "rule is 'tokens': did you mean"),
    ("rule=${oc.env:HOME}", r"'\$\{oc.env:HOME\}' is not filled in; write the value"),
    ("threads=10000000", "threads is 10000000 but must be at most"),
    ("prompts_per_call=-1", "prompts_per_call is -1 but must be 0 or at least batch_size, 1"),
    ("arms=[{type: ngram}, {type: ngram}]", "arms: 'ngram' is used twice; rename"),
    ("arms=[{name: plain, type: ngram}]", "arms: 'plain' is used twice"),
    ("arms={type: ngram}", "'arms' does not exist, or is of another kind"),
    ("arms=[3]", "arms.0 is 3 but must be a mapping"),
    ("arms=[{name: x}]", "arms.0.type is missing"),
    ("arms=[{type: ngram, options: [3]}]", "options is .* must be a mapping"),
    ("arms=[{type: ngram, draft_length: 4}]", "arms.0.draft_length is 4 but must be a mapping"),
    ("arms=[{type: ngram, draft_length: {}}]", "arms.0.draft_length is .* for batch size 1"),
    ("arms=[{type: ngram, draft_length: {a: 1}}]", "draft_length is .* as in {1: 6, 8: 0}"),
    (
        "arms=[{type: ngram, draft_length: {1: 2, 0: 4}}]",
        "batch size 0 is 4 but a batch size is at",
    ),
    ("arms=[{type: ngram, draft_length: {1: -1}}]", "nodes for batch size 1 is -1"),
    ("arms=[{type: ngram, draft_length: {plans: x}}]", "{plan: PATH}"),
    ("arms=[{type: hf_prompt_lookup, draft_length: {1: 2}}]", "no draft_length .here {1: 2}"),
]
FILES = [
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
    (b"arms: [{type: hf_assisted}]\nbatch_size: 2", "one prompt at a time .here 2.*batch_size"),
    (b"suite: sprint", "suite is 'sprint' but must be one of single_turn, multi"),
    *((f"grid: {grid}".encode(), "grid is .* map keys to lists") for grid in ("[1]", "{}", "")),
]
GRIDS = [
    ("grid.bach_size=[1]", "key bach_size does not exist; did you mean batch_size"),
    ("grid.sampling.zzz=[1]", r"key sampling.zzz does not exist; known: frequency_penalty"),
    ("grid.batch_size=[]", r"grid.batch_size is \[\] but must be a list"),
    ("grid.batch_size=3", "grid.batch_size is 3 but must be a list"),
    ("grid.batch_size=[1,4,1]", "grid.batch_size holds 1 twice"),
    ("grid.arms=[1]", "put a grid into the arm"),
    ("grid.batch_size=[1,0]", "cell temperature=0,batch_size=0: .*batch_size is 0"),
    ("batch_size=4", r"sets both batch_size and grid\.batch_size; drop one of them"),
    ("sampling.temperature=0", r"sets both sampling.temperature and grid\.sampling\.temper"),
    ("arms=[{type: hf_prompt_lookup}]", "batch_size=4: .*one prompt at a time"),
    ("sampling=3", "sampling is 3"),
    ("arms=[{type: ngram, grid: [1]}]", r"arms.0.grid is \[1\] but must map keys to lists"),
    ("arms=[{type: ngram, grid: {min_ngram: 2}}]", "arms.0.grid.min_ngram is 2 but must be a"),
    ("arms=[{type: ngram, grid: {min_ngram: []}}]", r"arms.0.grid.min_ngram is \[\] but must"),
    (
        "arms=[{type: ngram, options: {min_ngram: 1}, grid: {min_ngram: [2]}}]",
        "both set 'min_ngram'",
    ),
    (
        "arms=[{type: ngram, name: 'n {depth}', grid: {min_ngram: [2]}}]",
        "in braces must be an option of the arm: min_ngram",
    ),
    ("arms=[{type: ngram, name: '{', grid: {min_ngram: [2]}}]", "in braces must be an option"),
    (
        "arms=[{type: suffix, name: 'n {a}', options: {a: 1}, grid: {min_match: [2, 3]}}]",
        "arms: 'n 1' is used twice",
    ),
]
SUITE_KEYS = [
    ("concurrent", "grid.users=[[1]]", "key grid does not exist"),
    ("concurrent", "user=[1]", "key user does not exist; did you mean users"),
    ("multi_turn", "users=[1]", "key users does not exist"),
    ("concurrent", "users=[]", r"users is \[\] but must be a list of at least 1"),
    ("concurrent", "users=[0,2]", r"users.0 is 0 but must be at least 1"),
    ("concurrent", "users=[2,2]", "users: 2 is used twice"),
    ("concurrent", "users=4", "must be a list"),
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
    ("single_turn", "arms=[{type: hf_assisted}]", "no part in a suite; drop the arm"),
]


@pytest.mark.parametrize(
    ("given", "overrides", "message"),
    [
        *((BENCH, [override], message) for override, message in OVERRIDES),
        *((content, [], message) for content, message in FILES),
        *((GRID, [override], message) for override, message in GRIDS),
        *((f"suite: {name}", [override], message) for name, override, message in SUITE_KEYS),
    ],
)
def test_wrong_configuration_is_named(load, given, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(given, *overrides)


def test_aliases_and_byte_order_mark_are_read(load):
    text = "arms: [{type: ngram, options: &o {max_ngram: 2}}, {type: ngram, name: b, options: *o}]"
    (cell,) = load(b"\xef\xbb\xbf" + text.encode())
    assert [arm.options for arm in cell.config.arms] == [{"max_ngram": 2}] * 2


def test_missing_configuration_is_said_to_be_missing():
    with pytest.raises(FileNotFoundError, match=r"'none\.yaml' is not a file"):
        load_cells("none.yaml")
    with pytest.raises(ValueError, match=r"demo/sprint.* those are demo, demo/single-turn"):
        load_cells("demo/sprint")


# --- Suites ---


@pytest.mark.parametrize("path", PACKAGED)
def test_packaged_suite_is_sound_and_compares_arms(path):
    (cell,) = load_cells(path)
    assert cell.config.suite == path.removeprefix("demo/").replace("-", "_")
    assert len(cell.config.arms) >= 3
    assert load_cells(path.replace("-", "_")) == [cell]
    assert load_cells(path, ["repeats=7"])[0].config.repeats == 7


# --- Grids ---


def test_grid_is_a_cross_product_last_key_fastest(load):
    cells = load(GRID)
    assert [tuple(cell.settings.values()) for cell in cells] == [(0, 1), (0, 4), (0.7, 1), (0.7, 4)]
    for cell in cells:
        temperature, batch_size = cell.settings.values()
        assert cell.config.sampling.temperature == temperature
        assert cell.config.batch_size == batch_size
        assert cell.config.max_new_tokens == 12
    assert cells[3].name == "temperature=0.7,batch_size=4"


def test_arm_s_grid_makes_an_arm_a_combination(load):
    arms = load(GRID)[0].config.arms
    shapes = ("2x1", "2x3", "4x1", "4x3")
    assert [arm.name for arm in arms] == ["ngram", *(f"eagle3 {each} of 9" for each in shapes)]
    assert arms[2].options == {"max_nodes": 9, "depth": 2, "width": 3}
    override = "arms=[{type: ngram, grid: {min_ngram: [1, 2]}}, {name: a, type: suffix, grid: "
    arms = load(GRID, override + "{min_match: [3]}}]")[0].config.arms
    assert [arm.name for arm in arms] == ["ngram min_ngram=1", "ngram min_ngram=2", "a min_match=3"]


def test_grid_over_keys_alone_makes_a_sweep(load, tmp_path):
    path = str(tmp_path / "bench.yaml")
    (cell,) = load("arms: [{type: ngram, grid: {min_ngram: [1, 2]}}]\n")
    assert len(cell.config.arms) == 2
    assert (cell.name, cell.settings, cell.config) == ("", {}, load_config(path))
    for text, noun in ((GRID, "grid"), ("suite: concurrent", "suite")):
        load(text)
        with pytest.raises(ValueError, match=f"holds a {noun}, but one bench is wanted here: give"):
            load_config(path)


def test_override_sets_an_axis(load):
    cells = load(GRID, "grid.sampling.temperature=[1]", "grid.prompts.num=[2,3]")
    assert [cell.settings for cell in cells] == [
        {"sampling.temperature": 1, "batch_size": size, "prompts.num": num}
        for size in (1, 4)
        for num in (2, 3)
    ]


def test_cells_have_names_for_any_file_system(load, tmp_path):
    sources = [str(tmp_path / "a/b.txt"), str(tmp_path / "a_b.txt"), "x" * 400]
    names = [cell.name for cell in load(f"grid: {{prompts.source: {sources}, seed: [0, 1]}}")]
    assert len(set(names)) == 6
    assert not any("/" in name or len(name) > 200 for name in names)


def test_keys_are_shown_by_their_ends():
    ends = {"sampling.top_k": "top_k", "seed": "seed", "prompts.seed": "prompts.seed"}
    assert short_names(list(ends)) == ends


def test_documented_grid_runs_and_keys_are_documented(load):
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.S)
    cells = load(block)
    assert len(cells) == 8
    names = [arm.name for arm in cells[0].config.arms]
    assert names == ["suffix", "eagle3 3x1", "eagle3 3x3", "eagle3 6x1", "eagle3 6x3"]
    for name in BenchConfig.model_fields:
        assert f"`{name}" in DOCUMENT, name
