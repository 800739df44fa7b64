"""Offline acceptance is what a plain loop over positions finds, one chain at a time."""

import pytest
import torch
from tiny_heads import tiny_head
from tiny_models import tiny_llama, tiny_target
from tiny_training import answer_rows, tiny_config

from specdec.checkpoints import identify_target
from specdec.data.answers import AnswerRow, read_rows
from specdec.drafters.heads import load_head
from specdec.drafters.training import TrainingBatch
from specdec.registry import strategy
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target
from specdec.train.acceptance import (
    chain_acceptance,
    count_ranks,
    sum_of_overlaps,
)
from specdec.train.data import OnlineSource
from specdec.train.run import run_training
from specdec.train.trainees import HeadTrainee

DEPTH = 3


def medusa_chain(head, target, tokens, hidden, root):
    best = head(hidden[head.taps[0]][:, root - 1])[0].argmax(-1)
    return (best if head.token_map is None else head.token_map[best]).tolist()


def feature_chain(head, target, tokens, hidden, root):
    """Draft behind one root: true features up to it, the head's own outputs behind."""
    features = head.fuse(hidden)[:, :root]
    said = []
    for depth in range(DEPTH):
        if root + depth == len(tokens):
            break
        length = root + depth
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        fed = torch.tensor([tokens[1 : length + 1]])
        outputs = head(fed, features, torch.arange(length)[None], mask, None)
        best = head.logits(outputs[:, -1]).argmax().item()
        said.append(best if head.token_map is None else head.token_map[best].item())
        features = torch.cat([features, head.carry(outputs[:, -1:])], 1)
    return said


def plain_loop(head, target, rows, chain):
    tested, matched = [0] * DEPTH, [0] * DEPTH
    for row in rows:
        seen = OnlineSource(target, head.taps, torch.float32).batch([row])
        best = seen.target_logits[0].argmax(-1).tolist()
        for start, end in row.answers:
            for root in range(start, end - 1):
                said = chain(head, target, row.tokens, seen.hidden, root)
                for depth in range(min(DEPTH, end - 1 - root)):
                    tested[depth] += 1
                    if said[depth] != best[root + depth]:
                        break
                    matched[depth] += 1
    return [*map(list, zip(tested, matched, strict=True))]


@pytest.mark.parametrize(
    ("kind", "chain", "options"),
    [
        ("medusa", medusa_chain, {"num_heads": DEPTH}),
        ("medusa", medusa_chain, {"num_heads": DEPTH, "draft_vocab_size": 2}),
        ("eagle", feature_chain, {}),
        ("eagle3", feature_chain, {}),
        ("eagle3", feature_chain, {"draft_vocab_size": 2}),
    ],
)
@torch.no_grad()
def test_counts_are_those_of_a_plain_loop(kind, chain, options):
    # Of three tokens a random head is right often enough.
    target = tiny_target(vocab_size=3)
    head = tiny_head(kind, target, **options)
    if "draft_vocab_size" in options:
        head.set_draft_vocab(torch.tensor([0, 2]))
    texts = torch.randint(3, (12, 20), generator=torch.Generator().manual_seed(0)).tolist()
    spans = [((2, 9), (12, 20)), ((3, 4), (6, 17))]
    rows = [AnswerRow(tuple(text), spans[i % 2]) for i, text in enumerate(texts)]
    batch = OnlineSource(target, head.taps, torch.float32).batch(rows)
    trainee = HeadTrainee(kind, head, identify_target(target), {})
    counted = count_ranks(trainee.candidates(batch, DEPTH, 1), batch).tolist()
    assert counted == plain_loop(head, target, rows, chain)
    assert 0 < counted[-1][1] < counted[-1][0]


def test_ranks_are_counted_behind_taken_candidates():
    # Two depths, two candidates each; the target's choices at t_2 .. t_5 are 7, 8, 9, 7.
    logits = torch.zeros(1, 6, 10)
    for place, token in enumerate([0, 7, 8, 9, 7, 0]):
        logits[0, place, token] = 1
    mask = torch.tensor([[False, True, True, True, True, True]])
    batch = TrainingBatch(torch.zeros(1, 6, dtype=torch.long), mask, {}, logits)
    drafted = torch.zeros(1, 6, 2, 2, dtype=torch.long)
    drafted[0, 0] = torch.tensor([[7, 1], [1, 8]])  # first rank, then second rank
    drafted[0, 1] = torch.tensor([[1, 8], [1, 2]])  # second rank, then none
    drafted[0, 2] = torch.tensor([[1, 2], [7, 1]])  # none: the depth below is not tested
    drafted[0, 3] = torch.tensor([[7, 1], [1, 1]])  # first rank, and the answer ends
    assert count_ranks(drafted, batch).tolist() == [[4, 2, 1], [2, 0, 1]]


def test_tau_and_acceptance_by_depth():
    assert chain_acceptance(torch.tensor([[10, 6], [5, 2], [0, 0]])) == (1.8, [0.6, 0.4, None])
    assert chain_acceptance(torch.tensor([[0, 0]])) == (1.0, [None])


def test_alpha_is_the_overlap_of_distributions():
    generator = torch.Generator().manual_seed(0)
    mine, its = torch.randn(2, 40, 11, generator=generator)
    greedy, sampled = sum_of_overlaps(mine, its).tolist()
    assert greedy == sum(a.argmax() == b.argmax() for a, b in zip(mine, its, strict=True))
    pairs = zip(mine.softmax(-1).flatten(), its.softmax(-1).flatten(), strict=True)
    assert sampled == pytest.approx(sum(map(min, pairs)).item(), rel=1e-5)
    assert sum_of_overlaps(its, its).tolist() == pytest.approx([40, 40])
    assert sum_of_overlaps(its, its).max() <= 40


SHORT = {"per_device_train_batch_size": 20, "eval_depth": 3, "learning_rate": 1e-2}
SHORT |= {"eval_strategy": "no", "save_strategy": "no"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "loss", "settings", "wanted"),
    [
        ("medusa", {"num_heads": 3}, {}, {"max_steps": 250}, (0.95, 0.95, 0.95)),
        (
            # Without a training-time test it drifts on its own features from the second depth on.
            *("eagle", {}, {"noise": 0.01, "cross_entropy_weight": 1.0}),
            *({"max_steps": 600, "learning_rate": 2e-2}, (0.95, 0.85, 0.8)),
        ),
        ("eagle3", {"taps": [1, 2, 3]}, {"num_steps": 3}, {"max_steps": 400}, (0.95, 0.95, 0.95)),
    ],
)
def test_head_learns_twenty_dialogues_by_heart(tmp_path, kind, options, loss, settings, wanted):
    rows = answer_rows(HFTarget(tiny_llama(num_layers=3)))
    given = {"drafter": {"kind": kind, "options": options}, "loss": loss, **SHORT, **settings}
    # Held out are rows that the head has seen.
    config = tiny_config(tmp_path, rows + rows, data={"num_validation": 20}, **given)
    results = run_training(config, tmp_path / "out")
    pairs = zip(results.offline_acceptance, wanted, strict=True)
    assert all(found > least for found, least in pairs), results.offline_acceptance

    target = load_target(config.target.path, device="cpu")
    head, checkpoint = load_head(strategy(kind), target, str(tmp_path / "out" / "drafter"))
    rows = [*read_rows(tmp_path / "answers.jsonl", target.vocab_size, 20)]
    seen = OnlineSource(target, head.taps, target.model.dtype).batch(rows)
    trainee = HeadTrainee(kind, head, identify_target(target), {})
    drafted = trainee.candidates(seen, 3, 10)
    tau, by_depth = chain_acceptance(count_ranks(drafted[..., :1], seen))
    counts = count_ranks(drafted, seen)
    shares = (counts[:, 1:] / counts[:, :1]).tolist()
    assert results.acceptance_by_rank == [pytest.approx(each, abs=1e-6) for each in shares]
    assert by_depth == results.offline_acceptance
    assert checkpoint.training["offline_tau"] == tau
