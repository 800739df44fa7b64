"""Draft models: packed texts do not see each other, and what is trained is what is exported."""

import json
from itertools import product

import pytest
import torch
from tiny_models import tiny_llama, tiny_target
from tiny_training import logged, tiny_config
from transformers import AutoModelForCausalLM

from specdec.data.answers import AnswerRow, read_rows
from specdec.drafters.training import OBJECTIVES, objective, shifted
from specdec.registry import load_drafter
from specdec.targets.load import load_target
from specdec.train.data import OnlineSource, lay_out
from specdec.train.run import run_training
from specdec.train.trainees import DraftModelTrainee

pytestmark = pytest.mark.slow

RUN = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "eval_depth": 3,
    "eval_strategy": "no",
    "per_device_train_batch_size": 8,
}
ROWS = [
    AnswerRow(tuple(range(3, 3 + n)), ((start, n),))
    for n, start in ((9, 4), (4, 0), (12, 5), (3, 1), (7, 2))
]


def drafter(folder, num_layers=1, **options):
    tiny_llama(num_layers=num_layers, seed=5).save_pretrained(folder / "draft")
    return {"kind": "draft_model", "options": {"path": str(folder / "draft"), **options}}


def test_packing_keeps_texts_whole_in_few_lines():
    places, shape = lay_out([9, 4, 12, 3, 7], 13)
    assert shape == (3, 13)
    columns = [set() for _ in range(3)]
    for (line, first), length in zip(places, [9, 4, 12, 3, 7], strict=True):
        taken = set(range(first, first + length))
        assert not taken & columns[line]
        columns[line] |= taken
    with pytest.raises(ValueError, match="a text has 12 tokens but a packed line only 11"):
        lay_out([9, 12], 11)


def test_packed_texts_do_not_see_each_other():
    source = OnlineSource(tiny_target(), (1, 2), torch.float32)
    apart = source.batch(ROWS)
    places, _ = lay_out([len(row.tokens) for row in ROWS], 13)
    together = source.batch(ROWS, 13)
    for number, (line, first) in enumerate(places):
        length = len(ROWS[number].tokens)
        for ours, theirs in (
            (together.target_logits, apart.target_logits),
            (together.hidden[1], apart.hidden[1]),
        ):
            torch.testing.assert_close(
                ours[line, first : first + length], theirs[number, :length], rtol=0, atol=1e-5
            )
    # What a text begins with is predicted by nothing, least of all by the text before it.
    assert together.loss_mask.sum() == apart.loss_mask.sum() == 5 + 3 + 7 + 2 + 5


def losses_of(tmp_path, name, data=None, **options):
    (tmp_path / name).mkdir()
    given = drafter(tmp_path / name, **options)
    config = tiny_config(tmp_path / name, **RUN, drafter=given, data=data or {})
    run_training(config, tmp_path / name / "out")
    return [record["loss"] for record in logged(tmp_path / name / "out")]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_packing_changes_no_loss(tmp_path, method):
    apart = losses_of(tmp_path, "apart", method=method)
    assert losses_of(tmp_path, "packed", {"pack_len": 40}, method=method) == pytest.approx(
        apart, rel=1e-4
    )
    assert apart[-1] < apart[0]


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    losses = [losses_of(tmp_path, str(n), gradient_checkpointing=n) for n in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


EXPORTS = [("full", "merged"), *product(("lora", "qlora"), ("merged", "adapter"))]


@pytest.mark.parametrize(("method", "export"), EXPORTS)
def test_export_says_what_was_trained(tmp_path, method, export):
    given = drafter(tmp_path, method=method, export=export)
    config = tiny_config(tmp_path, **{**RUN, "max_steps": 30}, drafter=given)
    results = run_training(config, tmp_path / "out")
    if export == "merged":  # a plain checkpoint
        folder = tmp_path / "out" / "drafter"
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        assert model.dtype == torch.float32
    before = tiny_llama(num_layers=1, seed=5)
    target = load_target(config.target.path, device="cpu")
    loaded = load_drafter(results.drafter, target)
    rows = [*read_rows(tmp_path / "answers.jsonl", target.vocab_size)][-5:]
    tokens = torch.tensor([rows[-1].tokens])
    matches = loaded.model.model(tokens).logits.argmax(-1) == target.model(tokens).logits.argmax(-1)
    guessed = before(tokens).logits.argmax(-1) == target.model(tokens).logits.argmax(-1)
    assert matches.sum() > guessed.sum()
    # The loss of the last evaluation, computed again from what is on the disk.
    seen = OnlineSource(target, (), torch.float32)
    total, count = 0.0, 0
    for row in rows:
        batch = seen.batch([row])
        mask = shifted(batch.loss_mask, 1)
        logits = loaded.model.model(batch.tokens).logits[mask]
        goal, said = batch.target_logits[mask], shifted(batch.tokens, 1)[mask]
        total += objective("forward_kl", logits, goal, said).item() * len(said)
        count += len(said)
    assert total / count == pytest.approx(results.validation_loss, rel=1e-3)


def test_adapter_for_another_base_is_refused(tmp_path):
    config = tiny_config(
        tmp_path, **RUN, drafter=drafter(tmp_path, 2, method="lora", export="adapter")
    )
    options = run_training(config, tmp_path / "out").drafter
    target = load_target(config.target.path, device="cpu")
    tiny_llama(num_layers=2, seed=6).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on another base"):
        load_drafter({**options, "path": str(tmp_path / "other")}, target)
    (tmp_path / "out" / "drafter" / "base.json").unlink()
    tiny_llama(num_layers=1, seed=5).save_pretrained(tmp_path / "shallower")
    with pytest.raises(ValueError, match="does not fit its base"):
        load_drafter({**options, "path": str(tmp_path / "shallower")}, target)


def test_objectives_are_least_for_the_target_itself():
    generator = torch.Generator().manual_seed(0)
    goal, other = torch.randn(2, 6, 9, generator=generator)
    tokens = goal.argmax(-1)
    for name in OBJECTIVES:
        mine = objective(name, goal, goal, tokens)
        assert mine < objective(name, other, goal, tokens)
        if "cross_entropy" not in name:
            assert mine == pytest.approx(0, abs=1e-6)


def test_total_variation_is_one_minus_the_acceptance_rate():
    goal, mine = torch.randn(2, 50, 9, generator=torch.Generator().manual_seed(0))
    accepted = torch.minimum(goal.softmax(-1), mine.softmax(-1)).sum(-1).mean()
    assert objective("total_variation", mine, goal, goal.argmax(-1)) == pytest.approx(
        1 - accepted.item()
    )


@pytest.mark.parametrize(
    ("options", "loss", "message"),
    [
        ({"ranks": 2}, {}, r"drafter.options key ranks does not exist; did you mean rank"),
        ({"method": "dora"}, {}, "method is 'dora' but must be one of 'full', 'lora' or 'qlora'"),
        ({"method": "full", "export": "adapter"}, {}, "method 'full' makes none"),
        ({"rank": 0}, {}, "rank is 0 but must be at least 1"),
        ({"method": "lora", "targets": ["nothing"]}, {}, r"targets \['nothing'\]"),
        ({}, {"decay": 1}, r"loss key decay does not exist; known: objective, temperature"),
        ({}, {"objective": "mse"}, "objective is 'mse' but must be one of cross_entropy"),
        ({}, {"temperature": 0}, "temperature is 0 but must be above 0"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, loss, message):
    def run():
        config = tiny_config(tmp_path, **RUN, drafter=drafter(tmp_path, **options), loss=loss)
        run_training(config, tmp_path / "out")

    with pytest.raises(ValueError, match=message):
        run()


def test_demo_is_the_embedded_draft_model():
    target = load_target("demo", device="cpu")
    trainee = DraftModelTrainee({"method": "full"}, target, {})
    assert trainee.module.config.num_hidden_layers < target.config.num_hidden_layers
