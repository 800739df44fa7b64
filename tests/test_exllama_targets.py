"""The loop on exllama targets equals Hugging Face's greedy decoding, through strict fakes.

That real engines have what the fakes imitate is shown by tests/engines/test_exllama_contract.py.
"""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_heads import save_tiny_head
from tiny_models import perturbed, tiny_llama

from specdec import Draft, Engine, Target, generate, load_target, match
from specdec.bench.config import BenchConfig
from specdec.targets.exllama import MAX_PADDING, PagedTarget

FAKES = Path(__file__).parent / "fake_engines"
ENGINES, PAGE, NUM_NEW = ("exllamav2", "exllamav3"), 8, 30
PROMPTS = [[5, 6, 7, 8], [9] * 30, [1], list(range(20, 60)), [3] * 12]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch):
    monkeypatch.syspath_prepend(FAKES)
    yield
    for name in ("paged_model", *ENGINES):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny_llama(num_layers=3).save_pretrained(path := tmp_path_factory.mktemp("models") / "target")
    perturbed(tiny_llama(num_layers=3), 0.05).save_pretrained(path.parent / "draft")
    save_tiny_head(path.parent / "head", "eagle3", load_target(str(path)), taps=[0, 1, 3])
    return path


@pytest.fixture(scope="module")
def expected(folder):
    """Results of Hugging Face, by the drafter's name."""
    return cache(lambda name: texts_of(load_target(str(folder)), options(folder)[name]))


def options(folder):
    return {
        "none": None,
        "ngram": {"type": "ngram", "min_ngram": 1},
        "draft_model": {"type": "draft_model", "path": str(folder.parent / "draft")},
        "eagle3": {"type": "eagle3", "path": str(folder.parent / "head"), "width": 1, "depth": 3},
    }


def texts_of(target, drafter, **given):
    results = generate(target, drafter, PROMPTS, max_new_tokens=NUM_NEW, batch_size=3, **given)
    assert all(len(result.tokens) == NUM_NEW for result in results)
    return results


def load(engine, folder, monkeypatch, dtype=torch.float32, **given):
    """A target in small pages, whose fake puts out this dtype."""
    import paged_model

    monkeypatch.setattr(paged_model, "DTYPE", dtype)
    monkeypatch.setattr(PagedTarget, "dtype", dtype)
    for module in ("exllama", "exllamav2"):
        monkeypatch.setattr(f"specdec.targets.{module}.PAGE", PAGE)
    monkeypatch.setattr("specdec.targets.exllama.PREFILL_CHUNK", 16)
    if engine == "exllamav3":
        monkeypatch.setattr("exllamav3.PAGE_SIZE", PAGE)
    return load_target(str(folder), engine=engine, **given)


CASES = [(name, torch.float32) for name in ("none", "ngram", "draft_model", "eagle3")]


@pytest.mark.parametrize(("drafter", "dtype"), [*CASES, ("eagle3", torch.float16)])
@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_output_equals_that_of_hugging_face(
    engine, drafter, dtype, folder, expected, monkeypatch
):
    target = load(engine, folder, monkeypatch, dtype)
    results = texts_of(target, options(folder)[drafter])
    assert [r.tokens for r in results] == [r.tokens for r in expected("none")]
    if dtype == torch.float32:  # rows join, leave and roll back as they do in an `HFTarget`
        assert [r.stats for r in results] == [r.stats for r in expected(drafter)]
    assert drafter in ("none", "eagle3") or sum(r.stats.num_accepted for r in results) > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_and_all_taps_equal_those_of_hugging_face(engine, folder, monkeypatch):
    ours, theirs = load(engine, folder, monkeypatch), load_target(str(folder))
    assert isinstance(ours, Target)
    outputs = []
    for target in (ours, theirs):
        taps = range(target.config.num_hidden_layers + 1)
        first = target.prefill(PROMPTS[:3], taps)
        joined = target.prefill(PROMPTS[3:], taps, join=True)
        target.reorder(torch.tensor([4, 0, 3]))
        root, draft = torch.tensor([11, 12, 13]), Draft.chain(torch.tensor([[1, 2, 3]] * 3))
        target.score(root, draft)
        accepted = torch.tensor([[1, 2, 7, 0], [9, 0, 0, 0], [1, 2, 3, 8]])
        target.commit(match(accepted, draft), [2, 0, 3])
        outputs.append([first, joined, target.score(root, draft, taps)])
    assert ours.lengths == theirs.lengths == [15, 5, 44]
    for place, (own, other) in enumerate(zip(*outputs, strict=True)):
        torch.testing.assert_close(own.logits, other.logits, rtol=1e-4, atol=1e-4)
        lengths = list(map(len, [PROMPTS[:3], PROMPTS[3:], [[1] * 4] * 3][place]))
        for tap, states in other.hidden.items():
            for row, length in enumerate(lengths):
                close = {"rtol": 1e-4, "atol": 1e-4}
                torch.testing.assert_close(
                    own.hidden[tap][row, :length], states[row, :length], **close
                )


@pytest.mark.parametrize("engine", ENGINES)
def test_full_cache_and_context_end_as_they_should(engine, folder, expected, monkeypatch):
    target = load(engine, folder, monkeypatch, cache_tokens=160, cache_mode="Q8")
    running = Engine(target, "ngram", max_rows=5)
    for prompt in PROMPTS:
        running.submit(prompt, max_new_tokens=NUM_NEW)
    refusals = 0
    while running.num_waiting or running.num_running:
        try:
            running.step()
        except MemoryError as error:
            assert "cache of 160 tokens" in str(error)  # noqa: PT017
            refusals += 1
    assert 0 < refusals < 9
    tokens = [running.result(index).tokens for index in range(len(PROMPTS))]
    assert tokens == [r.tokens for r in expected("none")]

    target = load(engine, folder, monkeypatch)
    prompts = [[3] * 185, [5, 6, 7, 8] * 4]
    results = generate(target, "ngram", prompts, max_new_tokens=40)
    assert [len(r.tokens) for r in results] == [256 - MAX_PADDING - 185, 40]
    theirs = generate(load_target(str(folder)), None, prompts, max_new_tokens=40)
    for own, other in zip(results, theirs, strict=True):
        assert own.tokens == other.tokens[: len(own.tokens)]


def test_threads_of_torch_survive_the_import(folder):
    torch.set_num_threads(2)
    load_target(str(folder), engine="exllamav2")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"engine": "exllama"}, ValueError, "must be exllamav2 or exllamav3"),
        ({"cache_mode": "Q8"}, ValueError, "engine is None"),
        ({"engine": "exllamav2", "cache_mode": "FP8"}, ValueError, "'FP8', not in"),
        ({"engine": "exllamav2", "cache_tokens": 0}, ValueError, "at least 1"),
        ({"engine": "exllamav2", "dtype": "float16"}, ValueError, "CUDA_VISIBLE_DEVICES"),
        ({"engine": "exllamav3", "path": "hub:owner/name"}, ValueError, "reads folders"),
    ],
)
def test_options_that_cannot_work_are_refused(folder, given, error, message):
    with pytest.raises(error, match=message):
        load_target(**{"path": str(folder), **given})


def test_models_and_machines_that_cannot_work_are_refused(folder, monkeypatch):
    target = load("exllamav2", folder, monkeypatch)
    with pytest.raises(ValueError, match="scores chains only"):
        generate(target, options(folder)["draft_model"] | {"width": 2}, [[1]])
    with pytest.raises(ValueError, match="at most 64 fit"):
        target.score(torch.tensor([1]), Draft.chain(torch.ones(1, 65, dtype=torch.long)))
    monkeypatch.setattr("exllamav2.attn.has_flash_attn_with_paged", False)
    with pytest.raises(RuntimeError, match="flash-attn"):
        load_target(str(folder), engine="exllamav2")
    monkeypatch.setattr("exllamav3.IS_RECURRENT", True)
    with pytest.raises(ValueError, match="cannot be rolled back"):
        load_target(str(folder), engine="exllamav3")
    with pytest.raises(ValueError, match="measure a suite"):
        BenchConfig(target={"engine": "exllamav2"})
    monkeypatch.setitem(sys.modules, "exllamav3", None)
    with pytest.raises(RuntimeError, match="engine exllamav3 cannot be imported"):
        load_target(str(folder), engine="exllamav3")
