"""A strategy's class answers for its method, and nobody else knows a strategy by name."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import Field
from tiny_training import answer_rows, write_rows
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from specdec import load_target
from specdec.cli import app
from specdec.common.config import Config
from specdec.drafters.base import BaseDrafter
from specdec.drafters.heads import Head, load_head
from specdec.drafters.training import LossOutput, shifted
from specdec.registry import DRAFTERS, strategy, trainable_kinds
from specdec.verify import Draft

PACKAGE = Path(__file__).parents[2] / "specdec"
NAMES = "|".join(DRAFTERS)
# A comparison with a kind, a table of kinds, or a question for a head's class.
KNOWS_A_KIND = re.compile(
    rf"\b(kind|type)\b[^=!]*(==|!=) [\"']({NAMES})[\"']"
    rf"|^\s*[\"']({NAMES})[\"']: |isinstance\([^)]*Heads?\b"
)


def test_no_module_knows_a_strategy_by_name():
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "drafters" and path.name != "registry.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if KNOWS_A_KIND.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_class_names_its_method(kind):
    found = strategy(kind)
    assert issubclass(found, BaseDrafter)
    assert found.kind == kind
    assert found.title
    assert (found.trained_as == "head") == (found.head_class is not None)
    if found.head_class:
        assert issubclass(found.head_class, Head)
        assert found.head_class.default_taps(12)[-1] <= 12


class ToyOptions(Config):
    bias: bool = Field(True, description="a bias of its own")


class ToyHead(Head):
    """One linear layer on the target's last state guesses one token."""

    Options = ToyOptions
    max_depth = 1

    def __init__(self, options, target_config, embedding=None, vocab_head=None):
        super().__init__(options, target_config, embedding, vocab_head)
        self.options = self.given(options)
        self.taps = (target_config.num_hidden_layers,)
        size = target_config.hidden_size
        self.linear = nn.Linear(size, size, bias=self.options.bias)

    def forward(self, feature):
        return self._target_parts[1](feature + self.linear(feature))

    def loss(self, batch, weight: float = 1.0):
        places = shifted(batch.loss_mask, 2)
        logits = self(batch.hidden[self.taps[0]][places])
        value = weight * cross_entropy(logits.float(), shifted(batch.tokens, 2)[places])
        return LossOutput(value, {"toy": value.detach()})

    def candidates(self, batch, depth, width):
        return self(batch.hidden[self.taps[0]]).topk(width, -1).indices.unsqueeze(2)

    def guesses(self, batch, mask):
        return self(batch.hidden[self.taps[0]][mask])


class ToyDrafter(BaseDrafter):
    """Drafts the head's likeliest token."""

    kind, title, head_class, trained_as = "toy", "Toy head", ToyHead, "head"
    max_nodes = 1

    @classmethod
    def load(cls, target, path: str, choices: Sequence[Sequence[int]] | None = None):
        return cls(load_head(cls.kind, target, path)[0])

    def __init__(self, head):
        self.head, self.taps = head, head.taps

    def begin(self, prompts, output, sampler, *, join=False):
        rows, lengths = range(len(prompts)), [len(prompt) - 2 for prompt in prompts]
        feature = output.hidden[self.taps[0]][list(rows), lengths]
        self.feature = torch.cat([self.feature, feature]) if join else feature

    def propose(self, root, budget, sampler):
        tokens = self.head(self.feature).argmax(-1, keepdim=True)
        lengths = torch.tensor(budget).clamp(max=1)
        return Draft.chain(tokens.masked_fill(lengths.unsqueeze(1) == 0, -1), lengths)

    def observe(self, verdict, committed, hidden):
        states = hidden[self.taps[0]]
        self.feature = states[torch.arange(len(states)), verdict.num_accepted]

    def reorder(self, rows):
        self.feature = self.feature[rows]


def run(*arguments):
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)  # it measures costs, which take long on a busy machine
def test_new_trained_head_is_one_file(tmp_path, monkeypatch):
    monkeypatch.setitem(DRAFTERS, "toy", f"{__name__}:ToyDrafter")
    assert "toy" in trainable_kinds()
    rows = write_rows(tmp_path / "rows.jsonl", answer_rows(load_target("demo"), 8))
    store, out, copy = (tmp_path / name for name in ("store", "run", "copy"))
    run("features", rows, "--target", "demo", "--taps", "toy", "--out", store)
    training = {
        "drafter": {"kind": "toy", "options": {"bias": False}},
        "data": {"path": str(store), "num_validation": 4},
        "loss": {"weight": 2.0},
        "parity": {"num_prompts": 2, "max_new_tokens": 4},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    }
    run("train", write_yaml(tmp_path / "train.yaml", training), "--out", out)
    assert "Toy head" in (out / "drafter" / "README.md").read_text()
    said = run("inspect", out / "drafter")
    assert "Toy head in the layout 'specdec'" in said
    assert "no optional parts" in said
    run("export", out / "drafter", "--to", "specdec", "--out", copy)
    arms = [{"name": "mine", "type": "toy", "options": {"path": str(copy)}}]
    bench = {"prompts": {"source": "demo", "num": 2}, "max_new_tokens": 4, "repeats": 1}
    config = write_yaml(tmp_path / "bench.yaml", {**bench, "arms": arms})
    run("bench", config, "--out", tmp_path / "bench")
    run("plan", config, "--quick", "--out", tmp_path / "plan")
    run("report", tmp_path / "bench", tmp_path / "plan", "--out", tmp_path / "report")
    assert "mine" in (tmp_path / "report" / "report.md").read_text()
