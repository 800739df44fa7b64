"""Training from a store: the batches and losses of the target itself, up to what is rounded."""

import pytest
import torch
from tiny_features import make_store, random_rows
from tiny_heads import tiny_head
from tiny_models import tiny_target

from specdec.checkpoints import identify_target
from specdec.drafters.training import OBJECTIVES, objective, shifted
from specdec.train.acceptance import count_ranks
from specdec.train.data import OnlineSource, StoredSource, lay_out
from specdec.train.trainees import HeadTrainee

KINDS = ("medusa", "eagle", "eagle3")


def sources(folder, target, taps=(0, 1, 2), **options):
    names = ",".join(map(str, taps)) or "none"
    store = make_store(folder, target, **{"taps": names, **options})
    stored = StoredSource(store, target, taps, torch.float32)
    return stored, OnlineSource(target, taps, torch.float32), store.rows("train")


def losses(kind, head, batch, **options):
    """Loss, and the gradient of everything in one vector."""
    head.zero_grad()
    torch.manual_seed(3)
    loss = head.loss(batch, **options).loss
    loss.backward()
    gradients = [p.grad.flatten() for p in head.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_float32_store_gives_the_losses_of_the_target_itself(tmp_path, kind):
    target = tiny_target()
    stored, online, rows = sources(tmp_path, target, dtype="float32", top_k=97)
    head = tiny_head(kind, target).train()
    options = {"objective": "forward_kl"} if kind == "medusa" else {}
    for batch in (rows[:5], rows[5:], [row.cut(20) for row in rows]):
        loss, gradient = losses(kind, head, stored.batch(batch), **options)
        wanted, direction = losses(kind, head, online.batch(batch), **options)
        assert abs(loss - wanted) < 1e-6 * max(1, abs(wanted))
        assert (gradient - direction).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": "bf16", "top_k": 97}, 0.01),
        ({"dtype": "bf16", "top_k": 0}, 0.02),
        ({"dtype": "float32", "top_k": 0}, 1e-5),
        ({"dtype": "float32", "top_k": 32}, 0.05),
    ],
)
def test_what_is_rounded_moves_the_loss_by_little(tmp_path, kind, options, tolerance):
    target = tiny_target()
    stored, online, rows = sources(tmp_path, target, **options)
    head = tiny_head(kind, target).train()
    loss, _ = losses(kind, head, stored.batch(rows))
    wanted, _ = losses(kind, head, online.batch(rows))
    assert abs(loss / wanted - 1) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_offline_acceptance_is_that_of_the_target_itself(tmp_path, kind):
    target = tiny_target()
    stored, online, rows = sources(tmp_path, target, dtype="float32", top_k=8)
    head = tiny_head(kind, target)
    trainee = HeadTrainee(kind, head, identify_target(target), {})
    counts = []
    for source in (stored, online):
        batch = source.batch(rows)
        drafted = trainee.candidates(batch, 4, 5)
        counts.append((count_ranks(drafted[..., :1], batch), count_ranks(drafted, batch)))
    assert counts[0][0].equal(counts[1][0])
    assert counts[0][1].equal(counts[1][1])
    assert counts[0][1].sum() > 0


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("top_k", [97, 48])
def test_a_store_of_logits_alone_teaches_draft_models(tmp_path, name, top_k):
    # Reverse KL weighs the target's tail as the drafter does, so that losing its order tells most.
    tolerance = 1e-6 if top_k == 97 else 0.1 if name == "reverse_kl" else 0.02
    target = tiny_target()
    stored, online, rows = sources(tmp_path, target, taps=(), top_k=top_k)
    assert not stored.batch(rows[:1]).hidden
    draft = tiny_target(num_layers=1, seed=4).model
    found = []
    for source in (stored, online):
        batch = source.batch(rows)
        mask = shifted(batch.loss_mask, 1)
        mine, tokens = draft(input_ids=batch.tokens).logits[mask], shifted(batch.tokens, 1)[mask]
        found.append(objective(name, mine.detach(), batch.target_logits[mask], tokens))
    assert abs(found[0] / found[1] - 1) < tolerance


def test_batches_have_the_tokens_masks_and_shapes_of_the_target_itself(tmp_path):
    stored, online, rows = sources(tmp_path, tiny_target(), dtype="float32")
    mine, its = stored.batch(rows), online.batch(rows)
    assert mine.tokens.equal(its.tokens)
    assert mine.loss_mask.equal(its.loss_mask)
    assert mine.target_logits.shape == its.target_logits.shape
    is_learned = shifted(mine.loss_mask, 1)
    assert mine.target_logits[is_learned].argmax(-1).equal(its.target_logits[is_learned].argmax(-1))
    assert mine.target_logits[~is_learned].eq(0).all()


def test_packed_lines_hold_every_row_where_the_layout_puts_it(tmp_path):
    stored, _, rows = sources(tmp_path, tiny_target(), dtype="float32", top_k=97)
    alone = [stored.batch([row]) for row in rows]
    lines = stored.batch(rows, 90)
    places, _ = lay_out([len(row.tokens) for row in rows], 90)
    assert lines.positions is not None
    for row, single, (line, first) in zip(rows, alone, places, strict=True):
        span = slice(first, first + len(row.tokens))
        assert lines.hidden[1][line, span].equal(single.hidden[1][0])
        assert lines.target_logits[line, span].equal(single.target_logits[0])


def test_batches_come_in_the_drafters_dtype(tmp_path):
    stored, _, rows = sources(tmp_path, tiny_target(), dtype="float32", top_k=4)
    stored.dtype = torch.bfloat16
    batch = stored.batch(rows[:2])
    assert batch.hidden[0].dtype == batch.target_logits.dtype == torch.bfloat16


def test_missing_taps_and_rows_of_another_file_are_refused(tmp_path):
    target = tiny_target()
    stored, _, _ = sources(tmp_path, target, (2,))
    with pytest.raises(ValueError, match=r"holds the taps \[2\] but not 1.*--taps 1,2"):
        StoredSource(stored.store, target, [1, 2], torch.float32)
    other = make_store(tmp_path / "other", target, rows=random_rows(seed=2))
    with pytest.raises(ValueError, match="'row 0' has other tokens"):
        stored.batch(other.rows("train"))
