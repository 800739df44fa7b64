"""Counts of drafts as serving engines make them, against loops written as theirs are."""

import random

import pytest
import torch
from tiny_models import tiny_target

from specdec import generate, generate_baseline
from specdec.drafters.base import BaseDrafter
from specdec.engine.metrics import AcceptanceStats, StepRecord
from specdec.verify import Draft

K, LIMIT, PROMPTS = 4, 24, [[5, 6, 7, 8], [9] * 6, [1], [3, 2, 1]]


class Scripted(BaseDrafter):
    """Drafts the texts that it was given, wrong at some positions; each prompt is a row."""

    max_nodes, makes_trees = K, False

    def __init__(self, drafts):
        self.drafts = drafts

    def begin(self, prompts, output, sampler, *, join=False):
        self.places = [(row, 1) for row in range(len(prompts))]

    def propose(self, root, budget, sampler):
        rows = [self.drafts[row][done : done + K] for row, done in self.places]
        tokens = torch.tensor([tokens + [0] * (K - len(tokens)) for tokens in rows])
        lengths = [min(len(tokens), limit) for tokens, limit in zip(rows, budget, strict=True)]
        return Draft.chain(tokens[:, : max(lengths)], torch.tensor(lengths))

    def observe(self, verdict, committed, hidden):
        moved = zip(self.places, committed, strict=True)
        self.places = [(row, done + len(tokens)) for (row, done), tokens in moved]

    def reorder(self, rows):
        self.places = [self.places[row] for row in rows.tolist()]


def counts_of(engine, text, draft, ends):
    """(drafted, accepted) of every draft by the engine's rules; a text goes on behind its end."""
    done, found = 1, []
    while done < LIMIT and not ends & set(text[:done]):
        num = K if engine == "vllm" else min(K, LIMIT - done - 1)
        emitted = []
        for i in range(num):
            emitted.append(text[done + i])
            is_end = engine == "llamacpp" and emitted[-1] in ends and i + 1 < num
            if draft[done + i] != emitted[-1] or is_end:
                break
        else:
            emitted.append(text[done + num])
        found += [(num, len(emitted) - 1)] if num else []
        done += len(emitted)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_counts_are_those_of_the_engines_own_loops(seed, monkeypatch):
    rng, target = random.Random(seed), tiny_target(seed=seed)
    texts = [one.tokens for one in generate_baseline(target, PROMPTS, max_new_tokens=LIMIT + 3 * K)]
    drafts = [[t if rng.random() < 0.8 else (t + 1) % 97 for t in text] for text in texts]
    ends = {rng.choice(text[4:LIMIT]) for text in texts[: seed % 4]}
    monkeypatch.setattr(target, "eos_token_ids", tuple(ends))
    long = generate(target, Scripted(drafts), PROMPTS, max_new_tokens=LIMIT + K)
    exact = generate(target, Scripted(drafts), PROMPTS, max_new_tokens=LIMIT)
    for engine in ("vllm", "llamacpp"):
        expected = [counts_of(engine, *pair, ends) for pair in zip(texts, drafts, strict=True)]
        steps = [step for prompt in expected for step in prompt]
        records = [record for result in long for record in result.records]
        found = AcceptanceStats.as_engine(engine, records, LIMIT)
        assert (found.num_steps, found.num_drafted) == (len(steps), sum(num for num, _ in steps))
        deepest = [sum(accepted >= d for _, accepted in steps) for d in range(1, K + 1)]
        assert found.accepted_at == tuple(deepest[: len(found.accepted_at)])
        assert found.num_accepted == sum(deepest)
    # llama.cpp's drafts are no longer than ours: a run of just as many tokens says the same.
    records = [record for result in exact for record in result.records]
    assert AcceptanceStats.as_engine("llamacpp", records, LIMIT) == found


def test_records_without_a_verdict_and_unknown_engines_are_refused():
    record = StepRecord(0, 0, 1, 4, 1, 2, 2, 0.1, 0.2, 0.4)
    with pytest.raises(ValueError, match=r"hold no verdicts \(num_accepted_raw\); decode anew"):
        AcceptanceStats.as_engine("vllm", [record], 8)
    with pytest.raises(ValueError, match=r"engine is 'sglang' but must be vllm or llamacpp"):
        AcceptanceStats.as_engine("sglang", [record], 8)
