"""Taps are HF hidden_states indices; vLLM counts the same, SGLang one less."""

import json
from dataclasses import replace

import pytest
from random_heads import random_head
from test_public_layouts import EAGLE3, eagle3_tensors, publish

from specdec.checkpoints import check_target, read_head, write_head

IDS = "eagle_aux_hidden_state_layer_ids"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("keys", "taps"),
    [
        ({IDS: [2, 4, 6]}, [2, 4, 6]),
        ({"eagle_config": {IDS: [1, 3, 5]}}, [2, 4, 6]),
        ({IDS: [2, 4, 6], "eagle_config": {IDS: [1, 3, 5]}}, [2, 4, 6]),
        ({IDS: [0, 4, 6], "eagle_config": {IDS: [-1, 3, 5]}}, [0, 4, 6]),
    ],
)
def test_ids_of_either_engine_become_taps(tmp_path, keys, taps):
    found = read_head(publish(tmp_path, {**EAGLE3, **keys}, eagle3_tensors()))
    assert found.options["taps"] == taps


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({IDS: [2, 4, 6], "eagle_config": {IDS: [2, 4, 6]}}, r"must be \[1, 3, 5\] there"),
        ({IDS: "2,4,6"}, "must be a list of layers"),
        ({IDS: [2, 4, True]}, "must be a list of layers"),
        ({"eagle_config": {IDS: []}}, "must be a list of layers"),
        ({IDS: [2, 4]}, r"fc\.weight has shape \(32, 96\) but must have \(32, 64\)"),
    ],
)
def test_ids_that_cannot_be_meant_are_refused(tmp_path, keys, said):
    publish(tmp_path, {**EAGLE3, **keys}, eagle3_tensors())
    with pytest.raises(ValueError, match=said):
        read_head(tmp_path)


def test_taps_are_written_for_both_engines(tmp_path):
    config = config_of(write_head(random_head("eagle3"), tmp_path, "eagle3"))
    assert config[IDS] == [1, 4, 6]
    assert config["eagle_config"] == {IDS: [0, 3, 5], "use_aux_hidden_state": True}


def test_speculators_writes_the_ids_of_vllm(tmp_path):
    config = config_of(write_head(random_head("eagle3"), tmp_path, "speculators"))
    assert config[IDS] == [1, 4, 6]
    assert "eagle_config" not in config


def test_the_published_taps_are_left_for_the_engines_to_find(tmp_path):
    head = random_head("eagle3-whole")
    assert head.options["taps"] == [2, 4, 5]
    config = config_of(write_head(head, tmp_path / "known", "eagle3"))
    assert IDS not in config
    assert "eagle_config" not in config
    unknown = replace(head, target=replace(head.target, num_layers=None))
    assert config_of(write_head(unknown, tmp_path / "unknown", "eagle3"))[IDS] == [2, 4, 5]
    assert config_of(write_head(head, tmp_path / "nested", "speculators"))[IDS] == [2, 4, 5]


def test_a_head_of_another_engine_that_reads_the_last_layer_is_refused(tmp_path):
    found = read_head(publish(tmp_path, {**EAGLE3, IDS: [2, 4, 8]}, eagle3_tensors()))
    identity = random_head("eagle3").target
    with pytest.raises(ValueError, match=r"hidden_states\[8\].* before the final norm"):
        check_target(found, identity)
    check_target(replace(found, layout="specdec"), identity)
