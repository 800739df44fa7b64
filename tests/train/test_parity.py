"""The gate: decoding measures what offline acceptance predicts, unless something is broken."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_heads import tiny_head
from tiny_models import perturbed, tiny_llama, tiny_target
from tiny_training import known_rows, logged, write_run
from typer.testing import CliRunner

from specdec.analysis.replay import MadeDrafts, replay
from specdec.analysis.texts import Text
from specdec.checkpoints import identify_target
from specdec.cli import app
from specdec.data.answers import AnswerRow, read_rows
from specdec.drafters.feature_head import FeatureDrafter
from specdec.drafters.tree_growth import StaticGrowth
from specdec.registry import load_drafter
from specdec.sampling.config import SamplingConfig
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target
from specdec.train.acceptance import ParityError, ParityGate, choose_prompts, require_parity
from specdec.train.checkpoint import whole_state
from specdec.train.config import ParityConfig, load_train_config
from specdec.train.data import OnlineSource
from specdec.train.run import run_training
from specdec.train.trainees import DraftModelTrainee, HeadTrainee
from specdec.verify.tree import from_choices

pytestmark = pytest.mark.slow

DEPTH = 4
TREE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0, 0]]
REDUCED = {"draft_vocab_size": 2}
HEADS = [
    *[("medusa", {}), ("eagle", {}), ("eagle3", {}), ("peagle", {"num_depths": 5})],
    *[("mixture_of_attentions", {}), ("dflash", {"block_size": 5, "markov": "vanilla"})],
    *[("eagle3", REDUCED), ("medusa", REDUCED)],
]
CHAIN, BRANCHES = from_choices([(0,) * n for n in range(1, DEPTH + 1)]), from_choices(TREE)


def rows_for(target):
    """Rows of which only the prompts are used, of unlike lengths."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for start in (4 + number % 5 for number in range(12)):
        text = torch.randint(target.vocab_size, (start + 6,), generator=generator)
        rows.append(AnswerRow(tuple(text.tolist()), ((start, start + 6),)))
    return rows


def few_tokens(eos=()):
    """Of five tokens a random drafter is right often enough."""
    target = tiny_target(vocab_size=5, num_layers=3, seed=4)
    target.eos_token_ids = eos
    return target


def head_trainee(kind, target, **options):
    head = tiny_head(kind, target, **options)
    if "draft_vocab_size" in options:
        head.set_draft_vocab(torch.tensor([0, 2]))
    return HeadTrainee(kind, head, identify_target(target), {})


def draft_model_trainee(folder, target, model=None, method="full", amount=0.3):
    perturbed(model or target.model, amount).save_pretrained(folder / "draft")
    return DraftModelTrainee({"path": str(folder / "draft"), "method": method}, target, {})


def both(trainee, target, folder, shape=CHAIN, break_it=lambda folder: None, **config):
    """The gate, and what it predicts and measures for the exported drafter."""
    settings = ParityConfig(**{"num_prompts": 12, "max_new_tokens": 16, "batch_size": 7} | config)
    source = OnlineSource(target, trainee.taps, torch.float32)
    gate = ParityGate(source, rows_for(target), settings, shape)
    predicted = gate.predict(trainee)
    trainee.export(folder / "drafter", {}, whole_state(trainee.module, is_kept=True))
    break_it(folder / "drafter")
    drafts = trainee.chain(shape.depth) if shape is CHAIN else {"choices": TREE}
    return gate, predicted, gate.measure({**trainee.drafter(folder / "drafter"), **drafts})


@pytest.mark.parametrize("eos", [(), (1,)], ids=["length", "eos"])
@pytest.mark.parametrize(
    ("kind", "options", "shape"),
    [*[(*each, CHAIN) for each in HEADS], *[(*each, BRANCHES) for each in HEADS[:6]]],
)
def test_head_accepts_exactly_what_is_predicted(tmp_path, kind, options, shape, eos):
    target = few_tokens(eos)
    gate, predicted, measured = both(head_trainee(kind, target, **options), target, tmp_path, shape)
    found = gate.compare(predicted, measured)
    assert found.passed, found
    assert found.mismatches == 0
    assert found.measured_tau == pytest.approx(found.predicted_tau, abs=1e-9)
    assert found.measured_acceptance == pytest.approx(found.predicted_acceptance)
    assert 1 < found.predicted_tau < 1 + DEPTH
    ours = [[(s.num_drafted, s.num_accepted) for s in steps] for steps in predicted]
    assert ours == [[(s.num_drafted, s.num_accepted) for s in r.records] for r in measured]
    assert {r.finish_reason for r in measured} == ({"eos", "length"} if eos else {"length"})


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_draft_model_accepts_what_is_predicted(tmp_path, method):
    target = HFTarget(tiny_llama(vocab_size=64), None)
    trainee = draft_model_trainee(tmp_path, target, method=method)
    gate, predicted, measured = both(trainee, target, tmp_path)
    found = gate.compare(predicted, measured)
    assert found.passed, found
    assert found.relative_difference < (0.01 if method == "qlora" else 1e-9)
    assert 1.3 < found.predicted_tau < 1 + DEPTH
    assert gate.predict(trainee) == predicted  # the drafter in memory is as it was


def test_text_that_fills_the_context_is_walked(tmp_path):
    target, config = few_tokens(), {"num_prompts": 3, "max_new_tokens": 1000}
    target.max_context_len = 64
    gate, predicted, measured = both(head_trainee("eagle", target), target, tmp_path, **config)
    assert [len(r.prompt_tokens) + len(r.tokens) for r in measured] == [64] * 3
    found = gate.compare(predicted, measured)
    assert found.measured_tau == pytest.approx(found.predicted_tau, abs=1e-9)


def test_drafter_that_is_never_right_is_compared(tmp_path):
    target = tiny_target(vocab_size=97)
    trainee = draft_model_trainee(tmp_path, target, tiny_llama(seed=7), amount=1.0)
    gate, *sides = both(trainee, target, tmp_path, num_prompts=2, max_new_tokens=5)
    found = gate.compare(*sides)
    assert found.predicted_tau == found.measured_tau == 1.0
    assert found.predicted_acceptance == [0.0, None, None, None]
    assert found.passed


def test_a_budget_keeps_the_first_nodes_of_a_tree():
    tree = from_choices([[0], [1], [1, 0], [1, 0, 0]])
    # Behind the prompt 7 the target says 1, 2, 3, 4, 5; the first draft has its path down the tree.
    drafted = torch.full((6, 3, 2), 8)
    drafted[0] = torch.tensor([[9, 2], [3, 9], [4, 9]])
    target = tiny_target()

    def steps(max_tokens, num_tokens=5):
        text = Text([7], [1, 2, 3, 4, 5][:num_tokens], max_tokens)
        (records,) = replay(target, MadeDrafts([drafted], tree), [text], SamplingConfig())
        return [(s.num_drafted, s.num_accepted, s.depth_tested) for s in records]

    assert steps(100) == [(4, 3, 3)]
    assert steps(5) == [(3, 2, 2), (0, 0, 0)]  # three nodes: one level less
    # The text ends with its third token, found by the draft: it counts as the step's own.
    assert steps(100, num_tokens=3) == [(4, 1, 2)]
    assert steps(100, num_tokens=1) == []


def test_prompts_come_from_all_domains_in_turn():
    rows = [
        AnswerRow((1, 2, 3, 4, 5, 6), ((1, 2), (3, 6)), domain="b"),
        AnswerRow((7, 8, 9), ((0, 3),), domain="b"),
        AnswerRow((4, 5, 6), ((1, 3),), domain="b"),
        AnswerRow((2, 2, 2), ((2, 3),), domain="a"),
    ]
    assert choose_prompts(rows, 3) == [[2, 2], [1, 2, 3], [7]]
    assert len(choose_prompts(rows, 9)) == 4


def refused(found, message):
    assert not found.passed
    with pytest.raises(ParityError, match=message):
        require_parity(SimpleNamespace(parity=found, drafter={"path": "x"}))


def test_other_output_fails_in_float32_alone(tmp_path):
    target = few_tokens()
    gate, predicted, measured = both(head_trainee("medusa", target), target, tmp_path)
    measured[3].tokens[5] += 1
    found = gate.compare(predicted, measured)
    assert found.mismatches == 1
    refused(found, r"outputs for 1 of 12 .* not those of plain decoding")
    target.model.config.dtype = torch.bfloat16
    target.model.to(torch.bfloat16)
    found = gate.compare(predicted, measured)
    assert found.passed
    assert found.mismatches == 1
    for result in measured:
        result.tokens[0] += 1
    refused(gate.compare(predicted, measured), "leaves nothing to compare")


TRAINED = {
    "drafter": {"kind": "eagle3", "options": {"taps": [1, 2, 3]}},
    "draft_vocab_size": 60,
    "loss": {"num_steps": 3},
    "max_steps": 250,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 20,
    "eval_strategy": "no",
    "save_strategy": "no",
    "eval_depth": 3,
    "parity": {"num_prompts": 20, "max_new_tokens": 10},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with config, and in `out` the run of a head that knows its held-out rows."""
    folder = tmp_path_factory.mktemp("trained")
    rows = known_rows()
    path = write_run(folder, rows + rows, **TRAINED, data={"num_validation": 20})
    results = run_training(load_train_config(str(path)), folder / "out")
    assert results.parity.passed
    assert results.parity.predicted_tau > 2.5
    return folder


def edit_options(folder, **options):
    """Change options as somebody who covers his tracks."""
    path = folder / "specdec.json"
    if path.exists():
        content = json.loads(path.read_text())
        content["options"] |= options
        del content["sha256"]
        path.write_text(json.dumps(content))


def wrong_tap(folder):
    edit_options(folder, taps=[1, 2, 2])  # not the last one


def changed(edit):
    """Make a function that edits the tensors of a drafter by name."""

    def change(folder):
        edit_options(folder)
        tensors = load_file(folder / "model.safetensors")
        changed = {name: edit(name, tensor) for name, tensor in tensors.items()}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})

    return change


@changed
def shifted_map(name, tensor):
    places = torch.arange(len(tensor))
    return (tensor + places).roll(1) - places if name == "d2t" else tensor


@changed
def perturbed_weights(name, tensor):
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    return tensor + tensor.std() * noise if name == "fc.weight" else tensor


@changed
def four_bits(name, tensor):
    if tensor.ndim != 2:
        return tensor
    scale = tensor.abs().amax(1, keepdim=True) / 7
    return (tensor / scale).round() * scale


def verdict(folder, drafter):
    """What the gate says of a drafter in `drafter`, against the head in `folder`."""
    config = load_train_config(str(folder / "train.yaml"))
    target = load_target(config.target.path, device="cpu")
    whole = load_drafter({"type": "eagle3", "path": str(folder / "out" / "drafter")}, target)
    trainee = HeadTrainee("eagle3", whole.head, identify_target(target), {})
    source = OnlineSource(target, trainee.taps, torch.float32)
    rows = [*read_rows(folder / "answers.jsonl", target.vocab_size, 20)]
    gate = ParityGate(source, rows, config.parity, from_choices([(0,), (0, 0), (0, 0, 0)]))
    options = {**trainee.drafter(drafter), **trainee.chain(3)}
    return gate.compare(gate.predict(trainee), gate.measure(options))


@pytest.mark.parametrize("break_it", [wrong_tap, shifted_map, perturbed_weights])
def test_changed_head_does_not_pass(trained, tmp_path, break_it):
    shutil.copytree(trained / "out" / "drafter", tmp_path / "drafter")
    assert verdict(trained, tmp_path / "drafter").passed
    break_it(tmp_path / "drafter")
    message = "They part at depth 1 .*: look at what it reads"
    refused(verdict(trained, tmp_path / "drafter"), message)


def state_not_fed_back(monkeypatch):
    feed = FeatureDrafter._feed_beam
    silent = lambda self, outputs, *rest: feed(self, outputs * 0, *rest)  # noqa: E731
    monkeypatch.setattr(FeatureDrafter, "_feed_beam", silent)


def positions_too_far(monkeypatch):
    newest = StaticGrowth.newest.fget

    def moved(self):
        tokens, visible, levels = newest(self)
        return tokens, visible, levels + 7

    monkeypatch.setattr(StaticGrowth, "newest", property(moved))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (state_not_fed_back, "They part at depth 2 .* the depths above are right, so look at pos"),
        (positions_too_far, "They part at depth"),
    ],
)
def test_changed_drafter_does_not_pass(trained, monkeypatch, break_it, message):
    break_it(monkeypatch)
    refused(verdict(trained, trained / "out" / "drafter"), message)


def test_draft_model_in_four_bits_does_not_pass(tmp_path):
    target = HFTarget(tiny_llama(vocab_size=64), None)
    trainee = draft_model_trainee(tmp_path, target, amount=0.1)
    gate, predicted, measured = both(trainee, target, tmp_path, break_it=four_bits)
    found = gate.compare(predicted, measured)
    assert not found.passed
    assert found.measured_tau < found.predicted_tau


def test_failed_gate_writes_everything_and_runs_again(tmp_path, monkeypatch):
    parity = {**TRAINED["parity"], "max_difference": 0.01}
    path = write_run(tmp_path, **TRAINED | {"max_steps": 60, "parity": parity})
    out = tmp_path / "out"
    command = ["train", str(path), "--out", str(out)]
    write = HeadTrainee.export
    worse = lambda self, folder, *rest: write(self, folder, *rest) or perturbed_weights(folder)  # noqa: E731
    monkeypatch.setattr(HeadTrainee, "export", worse)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    parity = json.loads((out / "results.json").read_text())["parity"]
    assert not parity["passed"]
    taus = (f"{parity[name]:.3f}" for name in ("measured_tau", "predicted_tau"))
    for said in (*taus, "chain of 3", "the run failed: parity gate"):
        assert said in done.stderr
    assert (out / "curves.png").exists()
    steps = logged(out)
    monkeypatch.undo()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert logged(out) == steps
    parity = json.loads((out / "results.json").read_text())["parity"]
    assert parity["passed"]
    assert f"tau {parity['measured_tau']:.3f}" in done.stdout


@pytest.mark.parametrize(
    "settings", [{"data": {"num_validation": None}}, {"parity": {"num_prompts": 0}}]
)
def test_command_says_that_no_gate_was_run(tmp_path, settings):
    path = write_run(tmp_path, drafter={"kind": "medusa"}, max_steps=1, **settings)
    done = CliRunner().invoke(app, ["train", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "Parity gate: not run" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["parity"] is None
    is_measured = bool(results["validation_rows"])
    for key in ("validation_loss", "offline_tau"):
        assert (results[key] is not None) == is_measured
