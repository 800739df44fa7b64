"""Random heads for a small target, and decoding whose verdicts follow a script, not the target."""

import math
import random
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from slow_heads import (
    BlockGuesses,
    Continuation,
    MedusaGuesses,
    SlowEagle,
    SlowEagle3,
    SlowMixture,
    SlowMtp,
    SlowMtpModules,
    SlowPeagle,
)
from slow_trees import drafted_nodes, expected_nodes, penalised
from tiny_heads import tiny_head
from tiny_models import tiny_target
from transformers import DynamicCache

from specdec.drafters.dflash import DFlashDrafter
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.mixture_of_attentions import MixtureDrafter
from specdec.drafters.mtp import MtpDrafter
from specdec.drafters.peagle import PeagleDrafter
from specdec.sampling.sampler import Sampler, SamplingConfig
from specdec.verify import Draft, Verdict

# So few tokens that a random head is right now and then.
VOCAB, TAPS = 17, [1, 2, 3]
DRAFTERS = {
    **{"eagle": EagleDrafter, "eagle3": Eagle3Drafter, "medusa": MedusaDrafter},
    **{"mixture_of_attentions": MixtureDrafter, "mtp": MtpDrafter},
    **{"dflash": DFlashDrafter, "peagle": PeagleDrafter},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [8], [7, 7, 7], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]]


def small_target(vocab_size=VOCAB):
    return tiny_target(vocab_size, num_layers=3)


def lively_head(kind, target, seed=0, draft_tokens=None, **options):
    """A random head in which no weight is a neutral one, so that leaving any out would show.

    `draft_tokens` are the target ids of a reduced draft vocabulary.
    """
    if kind in ("eagle3", "dflash", "peagle"):
        options = {"taps": TAPS, **options}
    if draft_tokens is not None:
        options["draft_vocab_size"] = len(draft_tokens)
    head = tiny_head(kind, target, seed, **options)
    if draft_tokens is not None:
        head.set_draft_vocab(torch.tensor(draft_tokens))
    with torch.no_grad():
        for name, weight in head.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) / 4)
            elif name.startswith("lm_head"):
                weight.normal_(std=8 * weight.shape[1] ** -0.5)
    return head


def true_features(target, committed, taps):
    """The target's hidden states [n, H] of all committed tokens but the root, by tap.

    Tap -1 are its keys and values [n, L * heads * 2 * head_dim], joined by hand.
    """
    cache = DynamicCache()
    given = {"output_hidden_states": True, "use_cache": True, target.cache_name: cache}
    with torch.no_grad():
        states = target.model(input_ids=torch.tensor([committed[:-1]]), **given).hidden_states
    parts = [
        part
        for layer in cache.layers
        for pair in zip(layer.keys[0], layer.values[0], strict=True)
        for part in pair
    ]
    joined = torch.cat(parts, -1)
    return {tap: joined if tap < 0 else states[tap][0] for tap in taps}


def slow_guesses(kind, head, target, committed, window=None, rope=None, **flags):
    """The plain re-implementation of a head, behind a committed text whose root comes last.

    `window` counts the last pairs that it is shown; `rope` are rotary settings, None for those of
    the target, whatever the head's are; `flags` are options of EAGLE-3.
    """
    top = target.config.num_hidden_layers
    hidden = true_features(target, committed, [-1, *TAPS, top])
    if kind == "medusa":
        return MedusaGuesses(head, target.model, hidden[top][-1])
    if kind == "dflash":
        shown = min(window or len(committed), len(committed) - 1)
        taps = {tap: states[-shown:] for tap, states in hidden.items()}
        return BlockGuesses(head, target.model, taps, committed[-1], rope)
    slow = slow_head(kind, head, target, rope, **flags)
    features = slow.fuse(hidden)
    return Continuation(slow, committed, features[-min(window or len(features), len(features)) :])


def slow_head(kind, head, target, rope=None, **flags):
    """The plain re-implementation of a head that reads features."""
    if kind in ("eagle", "mtp"):
        mtp = SlowMtpModules if head.max_depth else SlowMtp
        return {"eagle": SlowEagle, "mtp": mtp}[kind](head, target.model, rope)
    if kind == "mixture_of_attentions":
        return SlowMixture(head, target.model, rope, **flags)
    slow_class = SlowPeagle if kind == "peagle" else SlowEagle3
    return slow_class(head, target.model, TAPS, rope, **flags)


@dataclass
class Step:
    """One call of `propose`: what was known of each row, and what came back."""

    committed: list[list[int]]
    budget: list[int]
    draft: Draft


class ScriptedDecoding:
    """Drafts, scores and commits as the loop does, but accepts any path of a draft, by chance.

    Random heads are seldom right; here drafts are taken whole, in part and not at all. Settings are
    dealt to the rows in turn; each row has a seed of its own. `rows` are the committed tokens, the
    last of each its root; `num_accepted` counts the draft tokens taken, of every row and step.
    """

    def __init__(self, target, drafter, prompts, sampling=None, seed=0, num_tokens=None):
        self.target, self.drafter = target, drafter
        self.rows: list[list[int]] = []
        self.steps: list[Step] = []
        self.num_accepted: list[int] = []
        self._configs: list[SamplingConfig] = []
        self._sampling = sampling or [SamplingConfig()]
        self._draw = random.Random(seed)
        self._num_tokens = num_tokens or target.vocab_size
        self.join(prompts)

    @property
    def sampler(self):
        """Sampler of the rows as they are now."""
        return Sampler(self._configs, self.target.vocab_size, None, self.rows, ())

    @torch.inference_mode()
    def join(self, prompts):
        """Let rows join behind the others; their roots are drawn by chance."""
        is_running = bool(self.rows)
        output = self.target.prefill(prompts, self.drafter.taps, join=is_running)
        begun = [[*prompt, self._token()] for prompt in prompts]
        seeds = range(len(self._configs), len(self._configs) + len(begun))
        configs = [replace(self._sampling[seed % len(self._sampling)], seed=seed) for seed in seeds]
        sampler = Sampler(configs, self.target.vocab_size, None, begun, ())
        self.drafter.begin([list(row) for row in begun], output, sampler, join=is_running)
        self.rows += begun
        self._configs += configs

    @torch.inference_mode()
    def keep(self, rows):
        """Let all rows but these leave."""
        self.rows = [self.rows[row] for row in rows]
        self._configs = [self._configs[row] for row in rows]
        self.target.reorder(torch.tensor(rows))
        self.drafter.reorder(torch.tensor(rows))

    @torch.inference_mode()
    def propose(self, budget=None):
        """A draft for the rows as they are; nothing is noted."""
        budget = [self.drafter.max_nodes] * len(self.rows) if budget is None else budget
        root = torch.tensor([row[-1] for row in self.rows])
        return self.drafter.propose(root, budget, self.sampler)

    @torch.inference_mode()
    def commit(self, draft):
        """Score a draft, accept of it by chance, commit."""
        root = torch.tensor([row[-1] for row in self.rows])
        output = self.target.score(root, draft, self.drafter.taps)
        paths = [self._path(draft, row) for row in range(len(self.rows))]
        news = [
            [*draft.tokens[row, path].tolist(), self._token()] for row, path in enumerate(paths)
        ]
        counts = [len(path) for path in paths]
        verdict = Verdict(
            _filled(news, draft.depth + 1),
            torch.tensor(counts),
            _filled(paths, draft.depth),
            torch.zeros(draft.tokens.shape, dtype=torch.bool),
        )
        self.target.commit(verdict, counts)
        self.drafter.observe(verdict, news, output.hidden)
        self.num_accepted += counts
        self.rows = [row + new for row, new in zip(self.rows, news, strict=True)]

    def step(self, budget=None):
        """Draft, note the draft, and commit what is accepted of it."""
        budget = [self.drafter.max_nodes] * len(self.rows) if budget is None else budget
        committed = [list(row) for row in self.rows]
        draft = self.propose(budget)
        self.steps.append(Step(committed, list(budget), draft))
        self.commit(draft)

    def _token(self):
        return self._draw.randrange(self._num_tokens)

    def _path(self, draft, row):
        """Node indices from the root down to some node, or none."""
        node = self._draw.randrange(-1, int(draft.lengths[row]))
        parents, path = draft.explicit_parents()[row].tolist(), []
        while node >= 0:
            path.insert(0, node)
            node = parents[node]
        return path


def _filled(rows, width):
    rows = [[*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(rows, dtype=torch.long).view(len(rows), width)


def decoded(head, target, shape, num_steps=4, prompts=PROMPTS, budget=None, window=None, **options):
    """Some steps of decoding with a head; `budget` is called with the step's number."""
    drafter_class = next(each for each in DRAFTERS.values() if type(head) is each.head_class)
    more = (window,) if window else ()
    drafter = drafter_class(head, target.vocab_size, shape, *more)
    decoding = ScriptedDecoding(target, drafter, prompts, **options)
    for step in range(num_steps):
        decoding.step(budget and budget(step))
    return decoding


def check_published(decoding, penalty=None, **slow):
    """Every row of every draft is the published tree: nodes, order, parents and probabilities."""
    drafter, num_rows = decoding.drafter, len(decoding.rows)
    for step, row in product(decoding.steps, range(num_rows)):
        committed = step.committed[row]
        guesses = slow_guesses(drafter.kind, drafter.head, decoding.target, committed, **slow)

        def logits(path):
            plain = guesses.logits(path)  # noqa: B023
            return penalised(plain, {*committed, *path}, penalty) if penalty else plain  # noqa: B023

        expected = expected_nodes(drafter.shape, logits, step.budget[row])
        drafted = drafted_nodes(step.draft, row)
        assert [path for path, _ in drafted] == [path for path, _ in expected]
        chances = [math.exp(score) for _, score in expected]
        assert [confidence for _, confidence in drafted] == pytest.approx(chances, rel=1e-3)
