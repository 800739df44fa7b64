"""Drafts that cannot be: refused by name, row and value at any step, never word salad."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_target

from specdec import Engine, SamplingConfig, generate, load_drafter, stream
from specdec.drafters.base import BaseDrafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.verify import Draft

PROMPTS = [[5, 6, 7, 8], [9] * 6]
V = 97
HOT = SamplingConfig(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


class Liar(BaseDrafter):
    """Drafts honestly, four nodes a row, until the step at which it lies."""

    max_nodes, makes_trees = 4, True

    def __init__(self, lie=lambda draft: draft, at=0, kind="tree"):
        self.lie, self.at, self.kind = lie, at, kind

    def begin(self, prompts, output, sampler, *, join=False):
        self.num_steps = 0

    def propose(self, root, budget, sampler):
        batch, n = len(budget), max(budget)
        tokens = torch.randint(V, (batch, 1)).expand(-1, n).clone()
        tokens += torch.arange(n)
        tokens %= V
        probs = torch.full((batch, n, V), 1 / V)
        lengths = torch.tensor(budget)
        draft = Draft.chain(tokens, lengths, probs if self.kind == "sampled" else None)
        if self.kind == "tree":
            parents = torch.tensor([-1, -1, 0, 2])[:n]
            draft = Draft.tree(tokens, parents, lengths, 3)
        self.num_steps += 1
        return self.lie(draft) if self.num_steps > self.at and n == 4 else draft


def changed(name, row, value):
    def lie(draft):
        tensor = getattr(draft, name).clone()
        tensor[row] = value
        return replace(draft, **{name: tensor})

    return lie


def q(value):
    return changed("probs", (1, 2), torch.as_tensor(value).expand(V))


UNIT = torch.eye(V)[0]
# kind of draft, lie, what the message says; all of row 1.
LIES = [
    ("tree", changed("tokens", (1, 2), V), "tokens: row 1, entry 2 has 97"),
    ("tree", changed("tokens", (1, 0), -1), "tokens: row 1, entry 0 has -1"),
    ("tree", changed("tokens", (1, 3), 2**40), "tokens: row 1, entry 3"),
    ("tree", changed("lengths", 1, 9), "lengths: row 1 has 9"),
    ("tree", changed("lengths", 1, -1), "lengths: row 1 has -1"),
    ("tree", changed("parents", (1, 1), 3), "parents: row 1, entry 1 has 3"),
    ("tree", changed("parents", (1, 2), 2), "parents: row 1, entry 2 has 2"),
    ("tree", changed("parents", (1, 0), -7), "parents: row 1, entry 0 has -7"),
    ("tree", changed("parents", (1, 3), 10**12), "parents: row 1, entry 3"),
    ("tree", lambda d: replace(d, depth=2), "depth is only 2"),
    ("tree", lambda d: replace(d, depth=-1), "depth is -1"),
    ("tree", lambda d: replace(d, depth=2.0), "depth is 2.0"),
    ("chain", lambda d: replace(d, depth=3), "depth is only 3"),
    ("sampled", q(UNIT * -1), "probs: row 1, entry 2 has -1"),
    ("sampled", q(float("nan")), "probs: row 1, entry 2 has nan"),
    ("sampled", q(0.0), "probs: row 1, entry 2 has 0"),
    ("sampled", q(2 / V), "probs: row 1, entry 2 has 2"),
    ("sampled", lambda d: q(torch.eye(V)[(d.tokens[1, 2] + 1) % V])(d), "positive probability"),
    ("sampled", lambda d: replace(d, probs=d.probs[:, :, 1:]), "probs has shape"),
    ("sampled", lambda d: replace(d, probs=d.probs.long()), "probs is torch.int64"),
    ("chain", lambda d: replace(d, tokens=d.tokens[:1]), "tokens has shape"),
    ("chain", lambda d: replace(d, tokens=d.tokens[0]), "tokens"),
    ("chain", lambda d: replace(d, tokens=d.tokens.int()), "tokens is torch.int32"),
    ("chain", lambda d: replace(d, tokens=d.tokens.to("meta")), "tokens is on meta"),
    ("chain", lambda d: replace(d, lengths=d.lengths.float()), "lengths is torch.float32"),
    ("chain", lambda d: replace(d, lengths=[4, 4]), "lengths is a list"),
    ("chain", lambda d: Draft.chain(d.tokens.repeat(1, 2)), "8 nodes"),
    ("chain", lambda d: d.tokens, "Tensor but must be a Draft"),
    ("chain", lambda d: None, "None"),
]


@pytest.mark.parametrize(("kind", "lie", "message"), LIES)
def test_impossible_draft_is_refused_at_any_step(target, kind, lie, message):
    for at, sampling in ((0, HOT), (3, SamplingConfig())):
        with pytest.raises((ValueError, TypeError), match="Liar") as caught:
            generate(target, Liar(lie, at, kind), PROMPTS, sampling, max_new_tokens=40)
        assert message in str(caught.value)


def test_padding_and_extra_depth_change_nothing(target):

    def pad(draft):
        lengths = draft.lengths.clamp(max=2)
        draft = replace(draft, lengths=lengths, depth=10**9)
        return changed("tokens", (1, 3), 2**40)(changed("parents", (1, 3), 77)(draft))

    plain = generate(target, None, PROMPTS, max_new_tokens=30)
    padded = generate(target, Liar(pad), PROMPTS, max_new_tokens=30)
    assert [r.tokens for r in padded] == [r.tokens for r in plain]


def test_registered_drafters_are_checked_on_request(target):

    def lying():
        drafter = load_drafter({"type": "ngram", "min_ngram": 1}, target)
        drafter.propose = lambda root, budget, sampler: Draft.chain(
            torch.full((len(root), 4), 200), torch.tensor(budget).clamp(max=4)
        )
        return drafter

    for call in (
        lambda **options: generate(target, lying(), PROMPTS, **options),
        lambda **options: list(stream(target, lying(), PROMPTS, **options)),
    ):
        with pytest.raises(ValueError, match="tokens: row 0, entry 0 has 200"):
            call(check=True)
    engine = Engine(target, lying(), check=True)
    index = engine.submit(PROMPTS[0])
    engine.step()
    with pytest.raises(ValueError, match="NgramDrafter"):
        engine.step()
    assert "NgramDrafter" in engine.result(index).error


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (lambda: setattr_on(Liar(), makes_trees=False), "makes_trees"),
        (lambda: HybridDrafter([NgramDrafter(), Liar(kind="sampled")]), "Liar.*probs"),
        (lambda: setattr_on(Liar(), vocab_size=50), "vocab_size"),
        (lambda: setattr_on(Liar(), taps=(99,)), "taps"),
    ],
)
def test_drafter_that_contradicts_itself_is_refused(target, drafter, message):
    with pytest.raises(ValueError, match=message):
        generate(target, drafter(), PROMPTS, max_new_tokens=30)


def setattr_on(drafter, **values):
    vars(drafter).update(values)
    return drafter
