"""Losses of draft heads against sums written out place by place."""

import math

import numpy as np
import pytest
import torch
from scripted import TAPS, VOCAB, lively_head, slow_head, small_target
from slow_heads import Continuation, MedusaGuesses, SlowEagle, SlowEagle3, SlowPeagle

from specdec.drafters.training import OBJECTIVES, TrainingBatch, losses

LENGTH, TOP = 9, 3
DRAFT_TOKENS = [0, 1, 2, 4, 5, 7, 8, 11, 12, 16]
# The tokens to be predicted: an answer with a gap; a short one before padding; none at all.
MASKS = np.array(
    [
        [0, 0, 0, 1, 1, 0, 1, 1, 1],
        [0, 0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=bool,
)


def some_batch(seed=0, masks=MASKS):
    draw = torch.Generator().manual_seed(seed)
    rows = len(masks)
    return TrainingBatch(
        torch.randint(VOCAB, (rows, LENGTH), generator=draw),
        torch.from_numpy(masks),
        {
            tap: torch.randn(rows, LENGTH, 96 if tap < 0 else 32, generator=draw)
            for tap in (*TAPS, TOP, -1)
        },
        3 * torch.randn(rows, LENGTH, VOCAB, generator=draw),
    )


def softmax(logits):
    grown = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    return grown / grown.sum()


def counted(batch, offset):
    """Places (row, i) whose token i + offset is to be predicted."""
    masks = batch.loss_mask.numpy()
    rows, length = masks.shape
    return [
        (row, i) for row in range(rows) for i in range(length - offset) if masks[row, i + offset]
    ]


def written_out(objective, guess, goal, token):
    """One objective at one place, of two distributions and the token that the target wrote."""
    kl = (goal * np.log(goal / guess)).sum()
    rate = np.minimum(goal, guess).sum()
    share = math.exp(-3 * rate)
    return {
        "cross_entropy": -math.log(guess[token]),
        "soft_cross_entropy": -(goal * np.log(guess)).sum(),
        "forward_kl": kl,
        "reverse_kl": (guess * np.log(guess / goal)).sum(),
        "total_variation": 0.5 * np.abs(goal - guess).sum(),
        "negative_log_acceptance": -math.log(rate),
        "lk_hybrid": share * kl + (1 - share) * (1 - rate),
    }[objective]


def mean(values):
    return sum(values) / len(values) if values else 0.0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("decay", [0.8, 0.5])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "own_vocab_head": False}, {"draft_tokens": DRAFT_TOKENS}],
    ids=["plain", "shared", "reduced"],
)
def test_medusa_loss_is_decayed_sum(options, decay, objective):
    target = small_target()
    head, batch = lively_head("medusa", target, num_heads=4, **options), some_batch(10)
    ids = options.get("draft_tokens", range(VOCAB))
    output, total = head.loss(batch, decay=decay, objective=objective), 0.0
    for k in range(4):
        values = []
        for row, i in counted(batch, k + 2):
            said = MedusaGuesses(head, target.model, batch.hidden[TOP][row, i]).logits((0,) * k)
            goal = batch.target_logits[row, i + k + 1].numpy()
            token = int(batch.tokens[row, i + k + 2])
            if (token if objective == "cross_entropy" else goal.argmax()) not in ids:
                continue
            place = ids.index(token) if token in ids else 0
            guess = softmax([said[each] for each in ids])
            values.append(written_out(objective, guess, softmax(goal[[*ids]]), place))
        part = mean(values)
        assert float(output.parts[f"{objective}_{k + 1}"]) == pytest.approx(part, rel=1e-4)
        assert part > 0
        total += decay ** (k + 1) * part
    assert output.loss.item() == pytest.approx(total, rel=1e-4)


def eagle_parts(outputs, features, batch, projection):
    """Smooth L1 and soft cross-entropy of EAGLE-1, from predicted features [B][L][H]."""
    distances, crosses = [], []
    for row, i in counted(batch, 2):
        predicted = np.asarray(outputs[row][i], dtype=np.float64)
        gap = np.abs(predicted - np.asarray(features[row][i + 1], dtype=np.float64))
        distances.append(np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean())
        goal = softmax(batch.target_logits[row, i + 1].numpy())
        crosses.append(-(goal * np.log(softmax(projection @ predicted))).sum())
    return mean(distances), mean(crosses)


@pytest.mark.parametrize("options", [{}, {"bias": False, "qkv_bias": True}])
def test_eagle_loss_is_smooth_l1_and_cross_entropy(options):
    target = small_target()
    head, batch = lively_head("eagle", target, **options), some_batch(2)
    slow = SlowEagle(head, target.model)
    features = batch.hidden[TOP]
    outputs = []
    for row in range(len(MASKS)):
        tokens = batch.tokens[row, 1:].tolist()
        pairs = features[row, :-1].double()
        outputs.append(slow.run(tokens, pairs, range(LENGTH - 1), lambda i, j: j <= i).numpy())
    projection = target.model.lm_head.weight.detach().double().numpy()
    distance, cross = eagle_parts(outputs, features, batch, projection)
    output = head.loss(batch, noise=0.0)
    assert float(output.parts["feature"]) == pytest.approx(distance, rel=1e-4)
    assert float(output.parts["soft_cross_entropy_1"]) == pytest.approx(cross, rel=1e-4)
    assert output.loss.item() == pytest.approx(distance + 0.1 * cross, rel=1e-4)
    louder = head.loss(batch, noise=0.0, cross_entropy_weight=0.7)
    assert louder.loss.item() == pytest.approx(distance + 0.7 * cross, rel=1e-4)


def test_eagle_noise_is_uniform_on_input_only():
    target = small_target()
    head = lively_head("eagle", target)
    masks = np.ones((64, LENGTH), dtype=bool)
    batch = some_batch(3, masks)
    heard = []

    def listen(tokens, features, positions, mask, cache, run=head.forward):
        outputs = run(tokens, features, positions, mask, cache)
        heard.append((features.detach(), outputs.detach()))
        return outputs

    head.forward = listen
    torch.manual_seed(0)
    output = head.loss(batch, noise=0.2)
    head.loss(batch, noise=0.2)
    clean = batch.hidden[TOP]
    width = 0.2 * 512 / LENGTH
    noise = heard[0][0] - clean
    assert noise.abs().max() <= width / 2 + 1e-4
    assert noise.abs().max() > 0.99 * width / 2
    size = math.sqrt(noise.numel())
    assert abs(noise.mean()) < 4 * width / math.sqrt(12) / size
    assert noise.var() == pytest.approx(width**2 / 12, rel=0.03)
    assert not torch.equal(heard[0][0], heard[1][0])
    projection = target.model.lm_head.weight.detach().double().numpy()
    distance, cross = eagle_parts(heard[0][1].numpy(), clean.numpy(), batch, projection)
    assert output.loss.item() == pytest.approx(distance + 0.1 * cross, rel=1e-4)


@pytest.mark.parametrize("num_steps", [1, 3, 4])
@pytest.mark.parametrize("draft_tokens", [None, DRAFT_TOKENS], ids=["whole", "reduced"])
@pytest.mark.parametrize("weighting", ["decay", "d_pace"])
@pytest.mark.parametrize("objective", ["soft_cross_entropy", "cross_entropy", "lk_hybrid"])
def test_eagle3_loss_is_that_of_drafted_chains(draft_tokens, num_steps, objective, weighting):
    target = small_target()
    head, batch = lively_head("eagle3", target, draft_tokens=draft_tokens), some_batch(10)
    slow = SlowEagle3(head, target.model, TAPS)
    ids = draft_tokens or list(range(VOCAB))
    parts, weights = ([[] for _ in range(num_steps)] for _ in range(2))
    num_left_out = 0
    for row in range(len(MASKS)):
        text = batch.tokens[row].tolist()
        features = slow.fuse({tap: batch.hidden[tap][row] for tap in TAPS})
        for i in range(LENGTH - 2):
            chain = Continuation(slow, text[: i + 2], features[: i + 1])
            chances = []  # that the chain gets through each step, 0 from where it cannot
            for step in range(num_steps):
                if (row, i) not in counted(batch, 2 + step):
                    chances.append(0.0)
                    continue
                goal, token = batch.target_logits[row, i + 1 + step].numpy(), text[i + 2 + step]
                if (token if objective == "cross_entropy" else goal.argmax()) not in ids:
                    num_left_out += 1
                    chances.append(0.0)
                    continue
                logits = chain.logits(tuple(text[i + 2 : i + 2 + step]))
                guess, wanted = softmax([logits[each] for each in ids]), softmax(goal[ids])
                place = ids.index(token) if token in ids else 0
                parts[step].append(written_out(objective, guess, wanted, place))
                chances.append(0.1 + 0.9 * np.minimum(guess, wanted).sum())
            reached = np.cumprod(chances)
            for step in range(num_steps):
                if chances[step]:
                    weights[step].append(reached[step:].sum())
    output = head.loss(
        batch, num_steps=num_steps, decay=0.7, objective=objective, weighting=weighting
    )
    for step, part in enumerate(parts):
        named = float(output.parts[f"{objective}_{step + 1}"])
        assert named == pytest.approx(mean(part), rel=1e-4)
    if weighting == "decay":
        weights = [[0.7**step] * len(part) for step, part in enumerate(parts)]
    pairs = [zip(*each, strict=True) for each in zip(weights, parts, strict=True)]
    total = sum(mean([weight * value for weight, value in each]) for each in pairs)
    assert output.loss.item() == pytest.approx(total, rel=1e-4)
    assert (num_left_out > 0) == (draft_tokens is not None)


@pytest.mark.parametrize("draft_tokens", [None, DRAFT_TOKENS], ids=["whole", "reduced"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_peagle_learns_deep_levels_at_some_places(draft_tokens, keep):
    target = small_target()
    head = lively_head("peagle", target, draft_tokens=draft_tokens, num_depths=4)
    batch, slow = some_batch(10), SlowPeagle(head, target.model, TAPS)
    ids, total = draft_tokens or list(range(VOCAB)), 0.0
    torch.manual_seed(3)
    order = torch.randperm(LENGTH).tolist()
    torch.manual_seed(3)
    output = head.loss(batch, decay=0.7, keep=keep)
    for depth in range(4):
        kept, part = order[: math.ceil(max(keep**depth, 0.2) * LENGTH)], []
        for row, i in counted(batch, 2 + depth):
            goal = batch.target_logits[row, i + 1 + depth].numpy()
            if i not in kept or goal.argmax() not in ids:
                continue
            text = batch.tokens[row].tolist()
            features = slow.fuse({tap: batch.hidden[tap][row] for tap in TAPS})
            logits = Continuation(slow, text[: i + 2], features[: i + 1]).logits((0,) * depth)
            guess = softmax([logits[each] for each in ids])
            part.append(written_out("soft_cross_entropy", guess, softmax(goal[ids]), 0))
        named = float(output.parts[f"soft_cross_entropy_{depth + 1}"])
        assert named == pytest.approx(mean(part), rel=1e-4)
        total += 0.7**depth * mean(part)
    assert output.loss.item() == pytest.approx(total, rel=1e-4)
    with pytest.raises(ValueError, match=r"loss\.keep is 2 but must be a share"):
        head.loss(batch, keep=2)


@pytest.mark.parametrize("size", [1, 3, 20])
@pytest.mark.parametrize("staircase", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"target_layers": 1}])
def test_mixture_loss_sees_what_drafts_of_its_segments_see(options, staircase, size):
    target = small_target()
    head, batch = lively_head("mixture_of_attentions", target, **options), some_batch(2)
    slow = slow_head("mixture_of_attentions", head, target, **options)
    distances, nears, crosses = [], [], []
    for row in range(len(MASKS)):
        tokens, features = batch.tokens[row].tolist(), slow.fuse({-1: batch.hidden[-1][row]})

        def begins(entry):  # place i is of entry i + 1, which stands beside state i
            return (entry - 1) // size * size + 1

        def sees(i, j):
            return j <= i and (not staircase or begins(i) == begins(j))

        outputs = slow.embedded(tokens, range(LENGTH), sees)
        drafted = slow.crossed(outputs, features[:-1], range(LENGTH), lambda i, j: j <= begins(i))
        outputs = slow.finished(drafted, range(LENGTH), sees)
        for _, i in ((r, i) for r, i in counted(batch, 2) if r == row):
            for found, place, states in ((distances, TOP, outputs), (nears, TOP - 1, drafted)):
                gap = (states[i + 1] - batch.hidden[place][row, i + 1]).abs()
                found.append(torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean().item())
            guess = softmax(slow.logits(outputs[i + 1]).numpy())
            goal = softmax(batch.target_logits[row, i + 1].numpy())
            crosses.append((goal * np.log(goal / guess)).sum())
    distance = (mean(distances) + mean(nears)) / 2 if options else mean(distances)
    lengths = {"min_segment": size, "max_segment": size}
    output = head.loss(batch, **lengths, staircase=staircase, cross_entropy_weight=0.7)
    assert float(output.parts["feature"]) == pytest.approx(distance, rel=1e-4)
    assert float(output.parts["forward_kl"]) == pytest.approx(mean(crosses), rel=1e-4)
    assert output.loss.item() == pytest.approx(distance + 0.7 * mean(crosses), rel=1e-4)


def test_mixture_segments_are_drawn_for_every_row():
    head, masks = lively_head("mixture_of_attentions", small_target()), []
    head.cross_attention.register_forward_hook(lambda _, given, __: masks.append(given[4]))
    batch = some_batch(3, np.ones((200, LENGTH), dtype=bool))
    torch.manual_seed(0)
    head.loss(batch, min_segment=2, max_segment=4)
    # Entry 1 of each segment sees one more state than the entry before it.
    shown = masks[0][:, 0, 1:, 1:].sum(-1)
    sizes = [next(k for k in range(1, LENGTH) if row[k] > row[0]) for row in shown.tolist()]
    assert {size: sizes.count(size) > 40 for size in sizes} == {2: True, 3: True, 4: True}


@pytest.mark.parametrize(
    "options", [{"min_segment": 0}, {"min_segment": 9, "max_segment": 8}, {"staircase": 1.5}]
)
def test_impossible_segments_are_refused(options):
    head = lively_head("mixture_of_attentions", small_target())
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name} {value}.* must be"):
        head.loss(some_batch(), **options)


EVEN = {"min_segment": 3, "max_segment": 3, "staircase": 0.0}
LOSSES = {
    **{"medusa": {}, "eagle": {"noise": 0.0}, "eagle3": {"num_steps": 3}},
    **{"mixture_of_attentions": EVEN, "mtp": {}, "dflash": {"num_blocks": 99}},
    "peagle": {"keep": 1.0},
}


def test_loss_reaches_every_mtp_module():
    head, batch = lively_head("mtp", small_target(), num_modules=4), some_batch(5, MASKS[:2])
    output = head.loss(batch, num_steps=1)
    output.loss.backward()
    assert [*output.parts] == [f"soft_cross_entropy_{level}" for level in (1, 2, 3, 4)]
    assert all(weight.grad.abs().max() > 0 for weight in head.mtp_layers.parameters())
    whole = head.rollout(batch.tokens, head.fuse(batch.hidden), 9)
    assert len(list(whole)) == head.max_depth == 4


@pytest.mark.parametrize("kind", LOSSES)
def test_padding_does_not_change_loss(kind):
    target = small_target()
    head, batch = lively_head(kind, target), some_batch(5, MASKS[:2])
    ends = [9, 4]  # one past the last token to be predicted
    other = some_batch(6, MASKS[:2])
    for row, end in enumerate(ends):
        other.tokens[row, :end] = batch.tokens[row, :end]
        other.target_logits[row, : end - 1] = batch.target_logits[row, : end - 1]
        for tap in batch.hidden:
            other.hidden[tap][row, : end - 1] = batch.hidden[tap][row, : end - 1]
    losses = [head.loss(each, **LOSSES[kind]).loss.item() for each in (batch, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != head.loss(some_batch(7), **LOSSES[kind]).loss.item()


@pytest.mark.parametrize("kind", LOSSES)
def test_batch_without_answers_teaches_nothing(kind):
    head = lively_head(kind, small_target())
    loss = head.loss(some_batch(8, MASKS[2:]), **LOSSES[kind]).loss
    assert loss.item() == 0
    loss.backward()
    grads = [weight.grad for weight in head.parameters() if weight.grad is not None]
    assert all(grad.isfinite().all() and not grad.any() for grad in grads)


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_trains_head_and_not_target(kind):
    target = small_target()
    head = lively_head(kind, target)
    head.loss(some_batch(9), **LOSSES[kind]).loss.backward()
    untrained = [name for name, weight in head.named_parameters() if weight.grad is None]
    assert untrained == []
    ours = {id(weight) for weight in head.parameters()}
    assert not ours & {id(weight) for weight in target.model.parameters()}


@pytest.mark.parametrize("kind", ["medusa", "eagle", "eagle3"])
def test_unknown_objective_or_weighting_is_refused(kind):
    head, batch = lively_head(kind, small_target()), some_batch()
    with pytest.raises(ValueError, match=r"objective is 'kl' .* did you mean 'forward_kl'"):
        head.loss(batch, objective="kl")
    if kind != "eagle":  # it learns one level
        with pytest.raises(ValueError, match="weighting is 'even' but must be one of"):
            head.loss(batch, weighting="even")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_falls_along_its_gradient_towards_the_target(name):
    torch.manual_seed(0)
    goal, tokens = torch.randn(64, VOCAB), torch.randint(VOCAB, (64,))
    mine = torch.randn(64, VOCAB, requires_grad=True)
    before = losses(name, mine, goal, tokens)
    assert before.shape == (64,)
    before.sum().backward()
    after = losses(name, mine.detach() - 0.02 * mine.grad, goal, tokens)
    assert after.sum() < before.sum()
    if name not in ("cross_entropy", "soft_cross_entropy"):
        assert losses(name, goal, goal, tokens).abs().max() < 1e-5


def test_small_acceptance_has_a_finite_loss():
    apart = torch.full((1, VOCAB), -200.0).index_fill(1, torch.tensor([0]), 200.0)
    logits = apart.flip(1).requires_grad_()
    found = losses("negative_log_acceptance", logits, apart, torch.tensor([0]))
    assert found.isfinite().all()
    found.sum().backward()
    assert logits.grad.isfinite().all()
