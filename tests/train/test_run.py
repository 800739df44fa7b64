"""A training run: what it writes, what stops it, and that its steps do not depend on their cut."""

import json
import math

import pytest
import torch
from tiny_training import known_rows, logged, tiny_config, write_run
from typer.testing import CliRunner

from specdec.cli import app
from specdec.common.config import read_model
from specdec.common.provenance import machine
from specdec.targets.load import load_target
from specdec.train.config import load_train_config
from specdec.train.results import TrainResults
from specdec.train.run import run_training
from specdec.train.trainees import HeadTrainee

pytestmark = pytest.mark.slow

RUN = {"max_steps": 4, "eval_steps": 2, "save_steps": 2}
MEDUSA, EAGLE = {"kind": "medusa"}, {"kind": "eagle"}


def test_provenance_is_of_the_start_of_a_run(tmp_path, monkeypatch):
    events = []
    note = lambda target: events.append("provenance") or machine(target)  # noqa: E731
    monkeypatch.setattr("specdec.train.data.machine", note)
    config = tiny_config(tmp_path, max_steps=2, drafter=MEDUSA)
    run_training(config, tmp_path / "out", lambda done, total, text: events.append(done))
    assert events == ["provenance", 1, 2]


def test_command_leaves_head_results_and_curves(tmp_path):
    path = write_run(
        tmp_path, **RUN, drafter={"kind": "eagle3"}, draft_vocab_size=40, report_to="tensorboard"
    )
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["train", str(path), "loss.num_steps=2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["drafter"] == {"type": "eagle3", "path": str(out / "drafter")}
    assert summary["steps"] == 4
    assert "specdec generate --target" in done.stdout
    results = read_model(TrainResults, out / "results.json")
    assert results.provenance.config.loss == {"num_steps": 2}
    assert 0 < results.draft_vocabulary.validation_coverage < 1
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events*"))
    assert [record["step"] for record in logged(out, "evaluation")] == [0, 2, 4]
    assert f"tau {results.before.tau:.2f} → {results.offline_tau:.2f}" in done.stdout


def test_drafter_and_card_are_pushed_to_the_hub(tmp_path, monkeypatch):
    pushed = []

    def push(folder, name, *options):
        pushed.append((name, {each.name for each in folder.iterdir()}, options[1:]))
        return "https://hub/commit"

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self: None)
    monkeypatch.setattr("specdec.common.hub.push", push)
    hub = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_private_repo": True}
    path = write_run(tmp_path, max_steps=1, drafter=MEDUSA, **hub)
    done = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "https://hub/commit" in done.stdout
    ((name, files, options),) = pushed
    assert (name, options) == ("me/mine", (True, None))
    assert {"README.md", "model.safetensors", "specdec.json"} <= files


def test_epochs_count_every_row(tmp_path):
    config = tiny_config(tmp_path, drafter=MEDUSA, num_train_epochs=2)
    results = run_training(config, tmp_path / "out")
    rows = known_rows()[:15]
    assert results.steps == 6
    assert results.tokens == 2 * sum(len(row["tokens"]) for row in rows)
    spans = [end - start for row in rows for start, end in row["answers"]]
    assert results.answer_tokens == 2 * sum(spans)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    path = write_run(
        tmp_path,
        **RUN,
        drafter={"kind": "medusa", "options": {"num_heads": 1}},
        data={"num_validation": 8},
    )
    losses = []
    for size, count in ((12, 1), (3, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
        overrides = [f"training.{key}={value}" for key, value in sizes.items()]
        run_training(load_train_config(str(path), overrides), tmp_path / str(size))
        losses.append([record["loss"] for record in logged(tmp_path / str(size))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != losses[0][-1]


def test_run_follows_its_config_and_leaves_the_target(tmp_path, monkeypatch):
    given = {"learning_rate": 0.1, "weight_decay": 0.5}
    config = tiny_config(tmp_path, **RUN, drafter=EAGLE, **given)
    before = load_target(config.target.path, device="cpu").model.state_dict()
    seen = []
    monkeypatch.setattr(
        "specdec.train.data.load_target",
        lambda *args, **kw: seen.append(load_target(*args, **kw)) or seen[0],
    )
    run_training(config, tmp_path / "out")
    after = seen[0].model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Two steps of warming up, then the cosine.
    rates = [record["learning_rate"] for record in logged(tmp_path / "out")]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.05])
    assert load_train_config(str(tmp_path / "out" / "config.yaml")) == config


def poison(monkeypatch, is_wrong, wrong=lambda head, loss: loss * math.nan):
    """Make losses of batches wrong."""
    real = HeadTrainee.forward

    def poisoned(self, batch):
        loss, parts = real(self, batch)
        return (wrong(self.module, loss) if is_wrong(self, batch) else loss), parts

    monkeypatch.setattr(HeadTrainee, "forward", poisoned)


def infinite_slope(head, loss):
    # The square root's slope at 0 is infinite, and times 0 it is NaN.
    return loss + (next(head.parameters()).sum() * 0).sqrt()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda head, loss: loss * math.nan, "the loss of rows 'line"),
        (infinite_slope, "this step it read rows 'line"),
    ],
    ids=["loss", "gradient"],
)
def test_loss_that_is_not_finite_stops_training(tmp_path, monkeypatch, wrong, named):
    config = tiny_config(tmp_path, **RUN, drafter=MEDUSA)
    calls = []
    is_fourth = lambda trainee, _: calls.extend([1] * trainee.training) or len(calls) >= 4  # noqa: E731
    poison(monkeypatch, is_fourth, wrong)
    message = rf"step 4: the loss is .* must be finite.*{named}"
    with pytest.raises(FloatingPointError, match=message):
        run_training(config, tmp_path / "out")
    monkeypatch.undo()
    assert [record["step"] for record in logged(tmp_path / "out")] == [1, 2, 3]
    assert run_training(config, tmp_path / "out").steps == 4


def test_row_whose_loss_is_not_finite_is_named(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, **RUN, drafter=MEDUSA)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    start = torch.tensor(rows[6]["tokens"][:8])
    poison(monkeypatch, lambda _, batch: (batch.tokens[:, :8] == start).all(1).any())
    with pytest.raises(FloatingPointError, match="the loss of row 'line 7' alone is not finite"):
        run_training(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": {"num_step": 2}}, r"loss\.num_step is no option of the eagle3 loss; known: num_"),
        ({"drafter": {"options": {"depth": 2}}}, "head option key depth does not exist"),
        (
            {"drafter": {"options": {"taps": [1, 2, 4]}}},
            r"reads hidden_states\[4\] but the target has only 0 to 3",
        ),
        ({"drafter": {"options": {"taps": "x"}}}, "taps is 'x' but must be a list"),
        ({"drafter": {"options": {"backbone": {"num_attention_heads": 7}}}}, "attention heads"),
        ({"loss": {"num_steps": 0}}, "num_steps is 0 but must be at least 1"),
        ({"data": {"max_len": 257}}, "max_len is 257 but the target's context is only 256"),
        (
            {"target": {"dtype": "bfloat16"}, "bf16": False},
            "bf16 is false but the target is in torch.bfloat16",
        ),
        ({"data": {"path": "none.jsonl"}}, r"none\.jsonl' is neither a folder"),
        ({"drafter": {"kind": "eagle"}, "draft_vocab_size": 40}, "draft_vocab_size does not exist"),
        ({"report_to": "wanbd"}, "report_to is 'wanbd', which is no tracker or is not installed"),
        ({"optim": "adamm"}, "adamm"),
        pytest.param(
            *({"target": {"device": "cuda"}}, "device is 'cuda' but torch finds 0 CUDA devices"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_impossible_settings_are_named(tmp_path, settings, message):
    drafter = {"kind": "eagle3", **settings.pop("drafter", {})}
    config = tiny_config(tmp_path, **RUN, drafter=drafter, **settings)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_training(config, tmp_path / "out")
    assert not (tmp_path / "out" / "drafter").exists()
