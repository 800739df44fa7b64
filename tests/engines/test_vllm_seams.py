"""The parts for vLLM, against stand-ins for what vLLM passes."""

import json
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from specdec import load_drafter
from specdec.integrations.vllm import Proposer, install
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


def seam(rejection_sample):
    """A module like vLLM's, at its place."""
    module = ModuleType("vllm.v1.sample.rejection_sampler")
    module.rejection_sample, module.generate_uniform_probs = rejection_sample, None
    sample = ModuleType("vllm.v1.sample")
    sample.rejection_sampler = module
    return {"vllm": ModuleType("vllm"), "vllm.v1": ModuleType("vllm.v1"), "vllm.v1.sample": sample}


def as_in_0_32(
    draft_token_ids,
    num_draft_tokens,
    max_spec_len,
    cu_num_draft_tokens,
    draft_probs,
    target_logits,
    bonus_token_ids,
    sampling_metadata,
    synthetic_mode=False,
    synthetic_conditional_rates=None,
    use_fp64_gumbel=False,
):
    raise AssertionError("vLLM's own")


@pytest.mark.parametrize("rule", [None, "", "token", "block", "traversal"])
def test_the_verifier_is_in_place_where_it_was_asked_for(monkeypatch, rule):
    modules = seam(as_in_0_32)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.delenv("SPECDEC_VERIFIER", raising=False)
    if rule is not None:
        monkeypatch.setenv("SPECDEC_VERIFIER", rule)
    install()
    install()  # vLLM may call it again
    found = modules["vllm.v1.sample"].rejection_sampler.rejection_sample
    assert (found is as_in_0_32) == (not rule)
    if rule:
        ids = torch.tensor([1, 2, 3])
        greedy = SimpleNamespace(all_greedy=True)
        logits = torch.eye(5)[[1, 2, 0]]  # the third token is another one
        counts = [1, 0, 2], 2, torch.tensor([1, 1, 3], dtype=torch.int32)
        tokens = found(ids, *counts, None, logits, torch.tensor([[4], [3], [2]]), greedy)
        assert tokens.tolist() == [[1, 4, -1], [3, -1, -1], [2, 0, -1]]
        assert tokens.dtype == torch.int32
        with pytest.raises(RuntimeError, match="synthetic"):
            found(ids, *counts, None, logits, None, greedy, synthetic_mode=True)


@pytest.mark.parametrize(
    ("rule", "runner", "sampler", "message"),
    [
        ("tokens", "0", as_in_0_32, "must be token, block, traversal"),
        ("typical", "0", as_in_0_32, "must be token, block, traversal"),
        ("match", "0", as_in_0_32, "must be token, block, traversal"),
        ("token", "1", as_in_0_32, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("token", "0", lambda logits: logits, r"vLLM 0[.]32 but found: logits;"),
        ("token", "0", None, r"vLLM 0[.]32 but found: "),
    ],
)
def test_a_seam_that_moved_is_one_clear_error(monkeypatch, rule, runner, sampler, message):
    for name, module in seam(sampler).items():
        monkeypatch.setitem(sys.modules, name, module)
    if sampler is None:
        del sys.modules["vllm.v1.sample"].rejection_sampler
    monkeypatch.setenv("SPECDEC_VERIFIER", rule)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    with pytest.raises((ValueError, RuntimeError), match=message) as error:
        install()
    assert "unset SPECDEC_VERIFIER" in str(error.value)
