"""Grids: every combination once, by a name of its own; what cannot be is named."""

import re
from pathlib import Path

import pytest

from specdec.bench.config import BenchConfig, load_config
from specdec.bench.grid import short_names
from specdec.bench.sweep import load_cells


@pytest.fixture
def path(tmp_path):
    (tmp_path / "bench.yaml").write_text(
        """
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
    )
    return str(tmp_path / "bench.yaml")


def test_grid_is_a_cross_product_last_key_fastest(path):
    cells = load_cells(path)
    assert [tuple(cell.settings.values()) for cell in cells] == [(0, 1), (0, 4), (0.7, 1), (0.7, 4)]
    for cell in cells:
        temperature, batch_size = cell.settings.values()
        assert cell.config.sampling.temperature == temperature
        assert cell.config.batch_size == batch_size
        assert cell.config.max_new_tokens == 12
    assert cells[3].name == "temperature=0.7,batch_size=4"


def test_arm_s_grid_makes_an_arm_a_combination(path):
    arms = load_cells(path)[0].config.arms
    assert [arm.name for arm in arms] == [
        "ngram",
        *(f"eagle3 {shape} of 9" for shape in ("2x1", "2x3", "4x1", "4x3")),
    ]
    assert arms[2].options == {"max_nodes": 9, "depth": 2, "width": 3}


def test_values_are_added_to_a_plain_name(path):
    override = "arms=[{type: ngram, grid: {min_ngram: [1, 2]}}, {name: a, type: suffix, grid: "
    arms = load_cells(path, [override + "{min_match: [3]}}]"])[0].config.arms
    assert [arm.name for arm in arms] == ["ngram min_ngram=1", "ngram min_ngram=2", "a min_match=3"]


def test_grid_over_keys_alone_makes_a_sweep(path, tmp_path):
    single = tmp_path / "one.yaml"
    single.write_text("arms: [{type: ngram, grid: {min_ngram: [1, 2]}}]\n")
    assert len(load_config(str(single)).arms) == 2
    (cell,) = load_cells(str(single))
    assert (cell.name, cell.settings, cell.config) == ("", {}, load_config(str(single)))
    with pytest.raises(ValueError, match="holds a grid, but one configuration is wanted"):
        load_config(path)


@pytest.mark.parametrize("override", ["batch_size=4", "sampling.temperature=0"])
def test_key_set_twice_is_refused(path, override):
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=rf"sets both {key} and grid\.{key}; drop one of them"):
        load_cells(path, [override])


def test_override_sets_an_axis(path):
    cells = load_cells(path, ["grid.sampling.temperature=[1]", "grid.prompts.num=[2,3]"])
    assert [cell.settings for cell in cells] == [
        {"sampling.temperature": 1, "batch_size": size, "prompts.num": num}
        for size in (1, 4)
        for num in (2, 3)
    ]


def test_cells_have_names_for_any_file_system(tmp_path, path):
    sources = [str(tmp_path / "a/b.txt"), str(tmp_path / "a_b.txt")]
    (tmp_path / "bench.yaml").write_text(f"grid: {{prompts.source: {sources}, seed: [0, 1]}}")
    cells = load_cells(path)
    names = [cell.name for cell in cells]
    assert len(set(names)) == 4
    assert not any("/" in name or len(name) > 200 for name in names)
    long = load_cells(path, [f"grid.prompts.source=[{'x' * 400}]"])[0]
    assert len(long.name) < 200


def test_keys_are_shown_by_their_ends():
    assert short_names(["sampling.top_k", "seed", "prompts.seed"]) == {
        "sampling.top_k": "top_k",
        "seed": "seed",
        "prompts.seed": "prompts.seed",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grid.temperature=[0]", "did you mean grid.sampling.temperature"),
        ("grid.bach_size=[1]", "did you mean grid.batch_size"),
        ("grid.zzz=[1]", r"no key of the configuration; known: target.path"),
        ("grid.batch_size=[]", "grid.batch_size is an empty list"),
        ("grid.batch_size=3", "grid.batch_size is 3 but must be a list"),
        ("grid.batch_size=[1,4,1]", "grid.batch_size holds 1 twice"),
        ("grid.arms=[1]", "put a grid into the arm"),
        ("grid.batch_size=[1,0]", "cell temperature=0,batch_size=0: .*batch_size is 0"),
        ("arms=[{type: hf_prompt_lookup}]", "batch_size=4: .*one prompt at a time"),
        ("sampling=3", "sampling is 3"),
        ("arms=[{type: ngram, grid: [1]}]", r"arms.0.grid is \[1\] but must map options"),
        ("arms=[{type: ngram, grid: {min_ngram: 2}}]", "arms.0.grid.min_ngram is 2 but must be a"),
        ("arms=[{type: ngram, grid: {min_ngram: []}}]", "arms.0.grid.min_ngram is an empty list"),
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
    ],
)
def test_wrong_grid_is_named(path, override, message):
    with pytest.raises(ValueError, match=message):
        load_cells(path, [override])


@pytest.mark.parametrize("grid", ["[1]", "{}", "3", ""])
def test_grid_that_maps_nothing_is_named(tmp_path, grid):
    (tmp_path / "bench.yaml").write_text(f"grid: {grid}\n")
    with pytest.raises(
        ValueError, match=r"config grid is .* but must map keys of the configuration"
    ):
        load_cells(str(tmp_path / "bench.yaml"))


DOCUMENT = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()


def test_documented_grid_runs_and_keys_are_documented(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.S)
    (tmp_path / "bench.yaml").write_text(block)
    cells = load_cells(str(tmp_path / "bench.yaml"))
    assert len(cells) == 8
    names = [arm.name for arm in cells[0].config.arms]
    assert names == ["suffix", "eagle3 3x1", "eagle3 3x3", "eagle3 6x1", "eagle3 6x3"]
    for name in BenchConfig.model_fields:
        assert f"`{name}" in DOCUMENT, name
