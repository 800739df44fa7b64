"""`specdec export` to a layout, and `specdec inspect`."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from random_heads import LAYOUTS_OF, random_head, same_tensors
from test_public_layouts import EAGLE3, eagle3_tensors, publish
from tiny_models import tiny_llama
from typer.main import get_command
from typer.testing import CliRunner

from specdec.checkpoints import LAYOUTS, read_head, write_head
from specdec.cli import app


def run(*arguments):
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert "Traceback" not in done.output
    return done


def refused(done, *words):
    assert done.exit_code == 2, done.output
    assert all(word in done.stderr for word in words), done.stderr
    return True


@pytest.mark.parametrize("name", LAYOUTS_OF)
def test_export_writes_every_layout_of_head(tmp_path, name):
    head = random_head(name, training={"loss": 1.5})
    source = write_head(head, tmp_path / "specdec")
    for layout in LAYOUTS_OF[name][1:]:
        done = run("export", source, "--to", layout, "--out", tmp_path / layout)
        assert done.exit_code == 0, done.stderr
        assert f"head: specdec -> {layout}, {tmp_path / layout}" in done.output
        back = tmp_path / f"{layout} back"
        assert run("export", tmp_path / layout, "--to", "specdec", "--out", back).exit_code == 0
        found = read_head(back)
        assert same_tensors(found.tensors, head.tensors)
        assert (found.options, found.target) == (head.options, head.target)
        assert found.training == {"loss": 1.5}


def test_export_completes_source_from_target(tmp_path):
    target = save_checkpoint(tmp_path / "tiny", tiny_llama(vocab_size=61, num_layers=8))
    source = publish(tmp_path / "source", EAGLE3, eagle3_tensors())
    refusal = run("export", source, "--to", "speculators", "--out", tmp_path / "one")
    assert refused(refusal, "names its target", "--target")
    done = run(
        "export", source, "--to", "speculators", "--out", tmp_path / "two", "--target", target
    )
    assert done.exit_code == 0, done.stderr
    found = read_head(tmp_path / "two")
    assert (found.target.name, found.target.num_layers) == (str(target), 8)
    assert found.options["taps"] == [2, 4, 5]
    other = save_checkpoint(tmp_path / "other", tiny_llama(vocab_size=97, num_layers=8))
    done = run("export", source, "--to", "specdec", "--out", tmp_path / "three", "--target", other)
    assert refused(done, "vocab_size 61", "vocab_size 97")


def test_export_completes_sparse_options_from_the_target(tmp_path):
    model = tiny_llama(vocab_size=61, num_layers=8)
    target = save_checkpoint(tmp_path / "tiny", model)
    head = replace(random_head("eagle3"), target=None)
    sparse = {"draft_vocab_size": 40, "taps": [1, 4, 6]}
    source = write_head(replace(head, options=sparse), tmp_path / "source")
    assert refused(run("export", source, "--to", "eagle3", "--out", tmp_path / "one"), "--target")
    done = run("export", source, "--to", "eagle3", "--out", tmp_path / "two", "--target", target)
    assert done.exit_code == 0, done.stderr
    assert read_head(tmp_path / "two").options == head.options


def test_export_refuses_bad_input_and_leaves_nothing_behind(tmp_path):
    source = write_head(random_head("eagle3-normed"), tmp_path / "head")
    new = tmp_path / "new"
    assert refused(
        run("export", source, "--to", "eagle3", "--out", new), "norm_before_residual=true"
    )
    assert refused(run("export", source, "--to", "hydra", "--out", new), "'hydra'", "speculators")
    assert refused(
        run("export", tmp_path / "none", "--to", "specdec", "--out", new), "is not a folder"
    )
    assert not new.exists()
    assert refused(run("export", source, "--to", "specdec", "--out", source), "is not empty")
    assert refused(run("export", source, "--to", "specdec", "--out", source / "specdec.json"))


TRAINING, TREE = {"loss": 1.25, "tokens": 1000}, [[0], [1], [0, 0]]
SAID = [
    ("medusa", None, ["Medusa heads", "3 heads", "of 2 residual blocks", "the last hidden state"]),
    ("medusa-shared", None, ["2 heads, so as many levels"]),
    ("eagle", None, ["EAGLE-1 head", "bias of queries, keys and values", "all 61 tokens"]),
    ("eagle3-whole", None, ["its own embedding", "the normed state is fed back"]),
    ("eagle3-normed", TREE, ["the normed feature is the residual", "3 nodes on 2 levels"]),
    (
        *("eagle3", None),
        [
            *("EAGLE-3 head in the layout 'eagle3'", "in float32", "none of its own"),
            *("hidden_states 1, 4, 6 of the target", "40 of 61 tokens"),
            *("hidden_size 32", "rope_theta 10000.0", "loss 1.25; tokens 1,000"),
            "org/tiny, hidden_size 32, vocab_size 61, num_layers 8",
        ],
    ),
]


@pytest.mark.parametrize(("name", "tree", "words"), SAID)
def test_inspect_says_what_a_head_is(tmp_path, name, tree, words):
    layout = "eagle3" if name == "eagle3" else "specdec"
    done = run(
        "inspect", write_head(random_head(name, tree=tree, training=TRAINING), tmp_path, layout)
    )
    assert done.exit_code == 0, done.stderr
    assert [each for each in words if each not in done.output] == []


def test_inspect_says_what_checkpoint_leaves_out(tmp_path):
    done = run("inspect", publish(tmp_path, EAGLE3, eagle3_tensors()))
    assert "2, L // 2 and L - 3" in done.output
    assert "no name, hidden_size 32, vocab_size 61\n" in done.output
    assert "training  not said" in done.output


def test_inspect_prints_one_json_object_for_machines(tmp_path):
    head = random_head("eagle3", training=TRAINING)
    folder = write_head(head, tmp_path, "speculators")
    (folder / "notes.txt").write_text("of another's")
    facts = json.loads(run("inspect", folder, "--json").stdout)
    files = ("model.safetensors", "config.json", "specdec.json")
    assert facts["bytes"] == sum((folder / name).stat().st_size for name in files)
    floats = [t for name, t in head.tensors.items() if name not in ("d2t", "t2d")]
    assert facts["parameters"] == sum(tensor.numel() for tensor in floats)
    assert (facts["schema"], facts["kind"], facts["layout"]) == (1, "eagle3", "speculators")
    assert (facts["options"], facts["training"]) == (head.options, TRAINING)
    assert facts["sizes"]["draft_vocab_size"] == 40
    assert facts["target"]["weights"] == head.target.weights
    other = write_head(random_head("medusa", torch.bfloat16), tmp_path / "other", "medusa")
    assert json.loads(run("inspect", other, "--json").stdout)["dtypes"] == ["bfloat16"]


def test_inspect_refuses_what_is_no_head(tmp_path):
    assert refused(run("inspect", tmp_path), "holds no draft head")
    assert refused(run("inspect", tmp_path / "none"), "is not a folder")


def test_inspect_rounds_training_and_leaves_tables_out(tmp_path):
    training = {
        "tokens": 6592637,
        "seconds": 2549.743053397,
        "offline_acceptance": [0.8219240391, 0.5],
        "acceptance_by_rank": [[0.5, 0.25], [0.5, 0.25]],
        "draft_vocabulary": None,
        "loss_options": {"num_steps": 4},
    }
    folder = write_head(random_head("eagle3", training=training), tmp_path)
    said = run("inspect", str(folder)).output
    assert "tokens 6,592,637; seconds 2550; offline acceptance 0.8219 0.5; loss options" in said
    assert "rank" not in said
    assert json.loads(run("inspect", str(folder), "--json").output)["training"] == training


TEXT = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def test_the_table_lists_every_layout():
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", TEXT.split("## What is checked")[0], re.M)
    assert set(rows) == set(LAYOUTS)


def test_the_commands_and_options_of_the_examples_exist():
    commands = get_command(app).commands
    examples = re.findall(r"specdec (inspect|export)([^#`\n]*)", TEXT)
    assert len(examples) >= 4
    for name, rest in examples:
        known = {option for each in commands[name].params for option in each.opts}
        assert set(re.findall(r"--[a-z]+", rest)) <= known
    assert all(f"--to {layout}" in TEXT for layout in ("speculators", "specdec"))
