"""A training run: what it writes, what stops it, and that its steps do not depend on their cut."""

import json
import math
from pathlib import Path

import pytest
import torch
from json_schema import violations
from tiny_training import answer_rows, logged, tiny_config, write_run
from typer.testing import CliRunner

from specdec.cli import app
from specdec.common.provenance import machine
from specdec.drafters.training import LossOutput
from specdec.targets.load import load_target
from specdec.train import heads as head_trainee
from specdec.train.config import load_train_config
from specdec.train.run import run_training

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "train.schema.json").read_text())
RUN = {"max_steps": 4, "eval_every": 2, "save_every": 2}


def test_provenance_is_of_the_start_of_a_run_not_of_its_end(tmp_path, monkeypatch):
    events = []

    def note(target):
        events.append("provenance")
        return machine(target)

    monkeypatch.setattr("specdec.train.data.machine", note)
    config = tiny_config(tmp_path, max_steps=2, drafter={"kind": "medusa"})
    run_training(config, tmp_path / "out", lambda done, total, text: events.append(done))
    assert events == ["provenance", 1, 2]


def test_the_command_leaves_head_results_and_curves(tmp_path):
    path = write_run(
        tmp_path, **RUN, drafter={"kind": "eagle3"}, draft_vocab_size=40, log_with="tensorboard"
    )
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["train", str(path), "loss.num_steps=2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["drafter"] == {"type": "eagle3", "path": str(out / "drafter")}
    assert summary["steps"] == 4
    assert "specdec generate --target" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert violations(results, SCHEMA) == []
    assert results["provenance"]["config"]["loss"] == {"num_steps": 2}
    assert 0 < results["draft_vocabulary"]["validation_coverage"] < 1
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events*"))


def test_a_run_without_validation_rows_has_no_validation(tmp_path):
    config = tiny_config(tmp_path, **RUN, drafter={"kind": "medusa"}, data={"num_validation": None})
    results = run_training(config, tmp_path / "out")
    assert violations(results, SCHEMA) == []
    assert results["offline_tau"] is None
    assert results["validation_loss"] is None
    assert results["draft_vocabulary"] is None


def test_epochs_count_every_row(tmp_path):
    config = tiny_config(tmp_path, drafter={"kind": "medusa"}, num_epochs=2)
    results = run_training(config, tmp_path / "out")
    rows = answer_rows(load_target(config.target.path, device="cpu"))[:15]
    assert results["steps"] == 6
    assert results["tokens"] == 2 * sum(len(row["tokens"]) for row in rows)
    spans = [end - start for row in rows for start, end in row["answers"]]
    assert results["answer_tokens"] == 2 * sum(spans)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    losses = []
    for name, cut in {"whole": (12, 1), "cut": (3, 4)}.items():
        folder = tmp_path / name
        folder.mkdir()
        config = tiny_config(folder, **RUN, drafter={"kind": "medusa", "options": {"num_heads": 1}})
        config.data.num_validation = 8
        config.batch_size, config.gradient_accumulation = cut
        run_training(config, folder / "out")
        losses.append([record["loss"] for record in logged(folder / "out")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != losses[0][-1]


def test_steps_follow_the_schedule(tmp_path):
    config = tiny_config(tmp_path, **RUN, drafter={"kind": "eagle"}, lr=0.01, warmup_steps=2)
    run_training(config, tmp_path / "out")
    rates = [record["lr"] for record in logged(tmp_path / "out")]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_the_target_is_left_as_it_was(tmp_path):
    config = tiny_config(tmp_path, **RUN, drafter={"kind": "eagle"}, lr=0.1, weight_decay=0.5)
    before = load_target(config.target.path, device="cpu").model.state_dict()
    seen = {}

    def remember(*args, **kw):
        seen["target"] = load_target(*args, **kw)
        return seen["target"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdec.train.data.load_target", remember)
        run_training(config, tmp_path / "out")
    after = seen["target"].model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path, monkeypatch, broken
):
    config = tiny_config(tmp_path, **RUN, drafter={"kind": "medusa"})
    calls, real = [], head_trainee.head_loss

    def poisoned(kind, head, batch, **options):
        result = real(kind, head, batch, **options)
        calls.extend([kind] * head.training)
        if len(calls) < 4:
            return result
        # The square root's slope at 0 is infinite, and times 0 it is NaN.
        weight = next(head.parameters()).sum() * 0
        wrong = result.loss * math.nan if broken == "loss" else result.loss + weight.sqrt()
        return LossOutput(wrong, result.parts)

    monkeypatch.setattr(head_trainee, "head_loss", poisoned)
    named = "the loss of rows 'line" if broken == "loss" else "this step it read rows 'line"
    message = rf"step 4: the loss is .* must be finite.*{named}"
    with pytest.raises(FloatingPointError, match=message):
        run_training(config, tmp_path / "out")
    monkeypatch.undo()
    assert [record["step"] for record in logged(tmp_path / "out")] == [1, 2, 3]
    results = run_training(config, tmp_path / "out")
    assert results["steps"] == 4


def test_the_row_whose_loss_is_not_finite_is_named(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, **RUN, drafter={"kind": "medusa"})
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    start = torch.tensor(rows[6]["tokens"][:8])
    real = head_trainee.head_loss

    def poisoned(kind, head, batch, **options):
        result = real(kind, head, batch, **options)
        is_there = (batch.tokens[:, :8] == start).all(1).any()
        return LossOutput(result.loss * math.nan if is_there else result.loss, result.parts)

    monkeypatch.setattr(head_trainee, "head_loss", poisoned)
    with pytest.raises(FloatingPointError, match="the loss of row 'line 7' alone is not finite"):
        run_training(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": {"num_step": 2}}, r"loss\.num_step is no option of the eagle3 loss; known: num_"),
        ({"drafter": {"kind": "eagle3", "options": {"depth": 2}}}, "cannot use its options"),
        (
            {"drafter": {"kind": "eagle3", "options": {"taps": [1, 2, 4]}}},
            r"reads hidden_states\[4\] but the target has only 0 to 3",
        ),
        (
            {"drafter": {"kind": "eagle3", "options": {"taps": "x"}}},
            r"reads hidden_states\[x\] but",
        ),
        (
            {"drafter": {"kind": "eagle3", "options": {"backbone": {"num_attention_heads": 7}}}},
            "cannot use its options",
        ),
        ({"loss": {"num_steps": 0}}, "num_steps is 0 but must be at least 1"),
        ({"data": {"max_len": 257}}, "max_len is 257 but the target's context is only 256"),
        (
            {"target": {"dtype": "bfloat16"}, "mixed_precision": "no"},
            "mixed_precision is 'no' but the target is in bfloat16",
        ),
        ({"data": {"path": "none.jsonl"}}, r"none\.jsonl' is not a file"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path, settings, message):
    config = tiny_config(tmp_path, **{**RUN, "drafter": {"kind": "eagle3"}} | settings)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_training(config, tmp_path / "out")
    assert not (tmp_path / "out" / "drafter").exists()


def test_a_draft_vocabulary_for_a_head_without_one_is_refused(tmp_path):
    config = tiny_config(tmp_path, **RUN, drafter={"kind": "medusa"}, draft_vocab_size=40)
    with pytest.raises(ValueError, match="medusa head cannot use its options"):
        run_training(config, tmp_path / "out")


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("specdec.train.run.find_spec", lambda name: None)
    config = tiny_config(tmp_path, **RUN, drafter={"kind": "medusa"}, log_with="tensorboard")
    with pytest.raises(ValueError, match="'tensorboard', which is not installed"):
        run_training(config, tmp_path / "out")


def test_a_run_folder_holds_the_resolved_config_from_the_start(tmp_path):
    config = tiny_config(tmp_path, **RUN, drafter={"kind": "medusa"}, lr=0.02)
    run_training(config, tmp_path / "out")
    assert load_train_config(str(tmp_path / "out" / "config.yaml")) == config


def test_a_device_that_is_not_there_is_refused_not_replaced(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    config = tiny_config(tmp_path, **RUN, drafter={"kind": "medusa"}, target={"device": "cuda"})
    with pytest.raises(ValueError, match="device is 'cuda' but torch finds 0 CUDA devices here"):
        run_training(config, tmp_path / "out")
