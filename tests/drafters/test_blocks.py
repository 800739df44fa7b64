"""Block heads: trees are the best of all paths, and a text is read as drafting reads it."""

from itertools import product

import pytest
import torch
from scripted import (
    PROMPTS,
    TAPS,
    VOCAB,
    ScriptedDecoding,
    decoded,
    lively_head,
    slow_guesses,
    small_target,
)
from slow_heads import BlockGuesses
from slow_trees import drafted_nodes
from tiny_heads import save_tiny_head

from specdec import SamplingConfig, load_drafter
from specdec.drafters import dflash
from specdec.drafters.dflash import DFlashDrafter
from specdec.drafters.training import TrainingBatch
from specdec.drafters.tree_growth import TreeShape

MARKOV = {"markov": "vanilla", "markov_rank": 4}
SPARK = {**MARKOV, "confidence": True, "confidence_with_markov": True, "sample_from_anchor": True}
KINDS = {"plain": {}, "markov": MARKOV, "gated": {"markov": "gated"}, "causal": {"causal": True}}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_tree_is_the_best_of_all_paths(options):
    """Marginal trees of plain heads and conditional ones of Markov heads, by enumeration."""
    target, nodes = small_target(), 14
    shape = TreeShape(depth=3, width=nodes, max_nodes=nodes)
    decoding = decoded(lively_head("dflash", target, **options), target, shape, 3)
    for step, row in product(decoding.steps, range(len(PROMPTS))):
        committed = step.committed[row]
        guesses = slow_guesses("dflash", decoding.drafter.head, target, committed)
        likely, level = {(): 1.0}, [()]
        for _ in range(3):
            below = []
            for path in level:
                chances = torch.tensor(list(guesses.logits(path).values())).softmax(-1).tolist()
                likely |= {(*path, token): likely[path] * p for token, p in enumerate(chances)}
                below += [(*path, token) for token in range(VOCAB)]
            level = below
        best = sorted(likely, key=likely.__getitem__, reverse=True)[1 : nodes + 1]
        assert {path for path, _ in drafted_nodes(step.draft, row)} == set(best)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("options", [*KINDS.values(), SPARK], ids=[*KINDS, "spark"])
def test_text_is_read_as_drafting_reads_it(options, window, monkeypatch):
    monkeypatch.setattr(dflash, "_PART", 4)
    target = small_target()
    head = lively_head("dflash", target, block_size=4, **options)
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]
    with torch.no_grad():
        states = target.model(input_ids=torch.tensor([text]), output_hidden_states=True)
        hidden = {tap: states.hidden_states[tap] for tap in TAPS}
        drafter = DFlashDrafter(head, VOCAB, TreeShape(depth=3, width=1), window)
        row = {tap: each[0] for tap, each in hidden.items()}
        forced = list(drafter.forced(torch.tensor(text), row, 9, 2))
        batch = TrainingBatch(torch.tensor([text]), torch.ones(1, 13).bool(), hidden, states.logits)
        ids, mask = head.candidates(batch, 2, 2), torch.ones(1, 13).bool()
        mask[0, -1] = False
        first = head.guesses(batch, mask)
    assert len(forced) == head.max_depth == ids.shape[2] == (4 if options is SPARK else 3)
    for place in range(len(text) - 2):
        start = 0 if window is None else max(0, place + 1 - window)
        seen = {tap: each[0, start : place + 1] for tap, each in hidden.items()}
        slow = BlockGuesses(head, target.model, seen, text[place + 1])
        for level in range(min(head.max_depth, len(text) - 2 - place)):
            said = slow.logits(tuple(text[place + 2 : place + 2 + level]))
            expected = torch.tensor(list(said.values())).double()
            if place >= 2:
                found = forced[level][place - 2].double()
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            if window is None:
                assert ids[0, place, level].tolist() == expected.topk(2).indices.tolist()
                if not level:
                    found = first[place].double()
                    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_chain_ends_before_a_token_of_low_confidence(tmp_path):
    target = small_target()
    head = lively_head("dflash", target, **SPARK)
    shape, lengths = TreeShape(depth=5, width=1), set()
    for threshold in (0.0, 0.4, 0.5, 0.6, 0.99):
        drafter = DFlashDrafter(head, VOCAB, shape, None, False, threshold)
        for temperature in (0.0, 0.9):
            draft = first_draft(target, drafter, SamplingConfig(temperature=temperature))
            whole = first_draft(
                target, DFlashDrafter(head, VOCAB, shape), SamplingConfig(temperature=temperature)
            )
            for row, length in enumerate(draft.lengths.tolist()):
                said = whole.confidence[row].tolist()
                each = [now / before for now, before in zip(said, [1.0, *said], strict=False)]
                kept = next((n for n, share in enumerate(each) if share < threshold), len(each))
                assert length == kept
                assert draft.tokens[row, :kept].tolist() == whole.tokens[row, :kept].tolist()
                lengths.add(length)
    assert {0, 5} < lengths


def first_draft(target, drafter, sampling):
    return ScriptedDecoding(target, drafter, PROMPTS, [sampling]).propose()


def test_confidence_never_sees_the_token_that_it_judges():
    """Else cutting by it would bias what is sampled."""
    target = small_target()
    head = lively_head("dflash", target, **SPARK)
    shape = TreeShape(depth=5, width=1, children="with_replacement")
    drafter = DFlashDrafter(head, VOCAB, shape, None, False, 1e-6)
    found: dict = {}
    for seed in range(40):
        draft = first_draft(target, drafter, SamplingConfig(temperature=2.0, seed=seed))
        tokens, said = draft.tokens[0].tolist(), draft.confidence[0].tolist()
        for level in range(int(draft.lengths[0])):
            found.setdefault(tuple(tokens[:level]), set()).add(round(said[level], 5))
    assert len(found) > 3
    assert {len(values) for values in found.values()} == {1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"choices": [[0] * n for n in range(1, 7)]}, "tree has 6 levels but the head drafts 5"),
        ({"confidence_threshold": 0.5}, "needs a confidence head, and the head has none"),
        ({"confidence_threshold": 1.5}, r"must be in \[0, 1\)"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, words):
    target = small_target()
    path = save_tiny_head(tmp_path, "dflash", target)
    with pytest.raises(ValueError, match=words):
        load_drafter({"type": "dflash", "path": path, **options}, target)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 1}, "block_size"),
        ({"mask_token_id": 17}, "mask_token_id is 17 but the vocabulary has only 17 tokens"),
        ({"backbone": {"qk_norm": False}}, "qk_norm is false"),
        ({"confidence_with_markov": True}, "needs markov and confidence"),
        ({"markov": "rnn"}, "vanilla"),
    ],
)
def test_heads_that_cannot_be_built_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        lively_head("dflash", small_target(), **options)
