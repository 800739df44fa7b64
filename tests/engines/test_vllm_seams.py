"""The parts for vLLM, against stand-ins for what vLLM passes."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest

from specdec import load_drafter
from specdec.integrations.vllm import Proposer
from specdec.registry import DRAFTERS

CONFIG = SimpleNamespace(
    speculative_config=SimpleNamespace(num_speculative_tokens=4),
    model_config=SimpleNamespace(max_model_len=80),
)
SUFFIX = {"type": "suffix", "min_match": 1, "num_remembered": 0}
HYBRID = {"type": "hybrid", "drafters": ["ngram", SUFFIX], "enough": None, "calibrate": False}


def proposer(monkeypatch, options):
    text = options if isinstance(options, str) else json.dumps(options)
    monkeypatch.setenv("SPECDEC_DRAFTER", text)
    return Proposer(CONFIG)


@pytest.mark.parametrize(
    "options",
    [
        {"type": "ngram", "min_ngram": 1, "num_draft_tokens": 3},
        SUFFIX,
        SUFFIX | {"width": 2},
        HYBRID,
    ],
    ids=str,
)
def test_rows_that_come_go_and_move_are_drafted_for_as_if_alone(monkeypatch, options):
    """Requests over four tokens that join late, pause, move and end, two of them twins."""
    draw = random.Random(0)
    texts = [[draw.randrange(4) for _ in range(80)] for _ in range(5)]
    texts.append(texts[0])
    together, alone = (
        proposer(monkeypatch, options),
        [proposer(monkeypatch, options) for _ in texts],
    )
    lengths, batch, num_drafted = [8] * len(texts), [], 0
    while min(lengths) < 76:
        batch = [r for r in range(len(texts)) if 8 <= lengths[r] < 76 and draw.random() < 0.8]
        draw.shuffle(batch)
        sampled = [[] if draw.random() < 0.1 else [0] * draw.choice([1, 1, 2]) for _ in batch]
        for slot, request in enumerate(batch):
            lengths[request] += len(sampled[slot])
            sampled[slot] = texts[request][lengths[request] - len(sampled[slot]) : lengths[request]]
        ids, ends = np.zeros((8, 80), np.int32), np.zeros(8, np.int32)
        for slot, request in enumerate(batch):
            ids[slot, : lengths[request]] = texts[request][: lengths[request]]
            ends[slot] = lengths[request]
        found = together.propose(sampled, ends, ids)
        for slot, request in enumerate(batch):
            own = slice(slot, slot + 1)
            # Where a request paused, only its stand-in goes on; the other begins again.
            assert [found[slot]] == alone[request].propose(sampled[own], ends[own], ids[own])
            assert len(found[slot]) <= min(4, 80 - lengths[request])
            num_drafted += len(found[slot])
    assert num_drafted > 100


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("", "drafter type is ''"),
        ("sufix", "did you mean 'suffix'"),
        ("eagle3", "target is None"),
        ({"type": "hybrid", "drafters": ["ngram", "eagle3"]}, "target is None"),
        ({"type": "ngram", "min_ngrams": 2}, "no option 'min_ngrams'"),
    ],
)
def test_a_drafter_that_cannot_serve_is_refused_by_its_reason(monkeypatch, options, reason):
    with pytest.raises(ValueError, match=f"SPECDEC_DRAFTER is .*{reason}"):
        proposer(monkeypatch, options)


def test_needing_a_target_is_declared(monkeypatch):
    monkeypatch.setitem(DRAFTERS, "toy", "specdec.drafters.base:BaseDrafter")
    assert not load_drafter("ngram", None).needs_target
    with pytest.raises(ValueError, match="'toy' needs one"):
        load_drafter("toy", None)
