"""Several loops on one target or drafter: one at a time, and nobody's cache is overwritten."""

from threading import Thread
from unittest.mock import patch

import pytest
import torch
from engine_cases import plain_tokens, run
from tiny_models import perturbed, tiny_llama, tiny_target

from specdec import Engine, generate, load_drafter, stream
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.engine.interfaces import Target
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target
from specdec.targets.taps import read_text

PROMPT, OTHER = [5, 6, 7, 8], [9] * 30


def draft_model(target, width=1):
    return DraftModel(HFTarget(perturbed(tiny_llama(), 0.15), None), target.vocab_size, 4, width)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


class Slotted:
    """A target of one's own: only the protocol's members, no hash and no weak references."""

    __hash__ = None
    __slots__ = (*Target.__annotations__, "prefill", "score", "commit", "reorder")

    def __init__(self, inner):
        for name in self.__slots__:
            setattr(self, name, getattr(inner, name))

    def __eq__(self, other):
        return True


def second_loops(target, drafter):
    """Everything that would take the caches of a loop that runs; each on its own."""
    other = tiny_target()
    inner = NgramDrafter()
    own = type(target).__name__
    yield own, lambda: generate(target, None, [OTHER], max_new_tokens=4)
    yield own, lambda: next(iter(stream(target, None, [OTHER], max_new_tokens=4)))
    yield own, lambda: read_text(target, OTHER, 3)
    if isinstance(target, HFTarget):  # others cannot be limited
        yield own, lambda: Engine(target, max_cache_bytes=10**9)
    yield "DraftModel", lambda: generate(other, drafter, [OTHER], max_new_tokens=4)
    merged = HybridDrafter([inner, drafter])
    yield "DraftModel", lambda: generate(other, merged, [OTHER], max_new_tokens=4)
    yield "HFTarget", lambda: read_text(drafter.model, OTHER, 3)


@pytest.mark.parametrize("own", [False, True])
def test_second_loop_is_refused_and_first_goes_on(own):
    target = tiny_target()
    drafter = draft_model(target, width=2)
    shown = Slotted(target) if own else target
    alone = plain_tokens(target, PROMPT, 12)
    first = stream(shown, drafter, [PROMPT], max_new_tokens=12)
    chunks = iter(first)
    next(chunks)
    for name, call in second_loops(shown, drafter):
        with pytest.raises(RuntimeError, match=f"{name} is in use by another loop"):
            call()
    assert len(list(chunks)) > 1
    assert first.results()[0].tokens == alone
    assert generate(shown, drafter, [OTHER], max_new_tokens=9)[0].tokens == plain_tokens(
        target, OTHER, 9
    )


def test_ended_or_dropped_loops_free_the_target(target):
    drafter = draft_model(target)

    def check():
        result = generate(target, drafter, [OTHER], max_new_tokens=5)[0]
        assert result.tokens == plain_tokens(target, OTHER, 5)

    kept = stream(target, drafter, [PROMPT, OTHER], max_new_tokens=12)
    for _ in kept:  # left early, and the stream is still there
        break
    check()
    ended = Engine(target, drafter)
    ended.submit(PROMPT, max_new_tokens=3)
    run(ended)
    check()
    cancelled = Engine(target, drafter)
    cancelled.submit(PROMPT)
    cancelled.step()
    cancelled.cancel(0)
    check()
    dropped = Engine(target, drafter)
    dropped.submit(PROMPT)
    dropped.step()
    del dropped
    check()
    for error in (KeyboardInterrupt, ArithmeticError):
        broken = Engine(target, drafter)
        broken.submit(PROMPT)
        broken.step()
        with patch.object(target, "score", side_effect=error), pytest.raises(error):
            broken.step()
        check()
    # What was left early goes on where it was.
    list(kept)
    assert [r.tokens for r in kept.results()] == [
        plain_tokens(target, prompt, 12) for prompt in (PROMPT, OTHER)
    ]


def test_refused_engine_loses_no_request(target):
    first, second = Engine(target), Engine(target)
    ids = [first.submit(PROMPT, max_new_tokens=6), second.submit(OTHER, max_new_tokens=6)]
    first.step()
    with pytest.raises(RuntimeError, match="in use"):
        second.step()
    run(first)
    run(second)
    assert first.result(ids[0]).tokens == plain_tokens(target, PROMPT, 6)
    assert second.result(ids[1]).tokens == plain_tokens(target, OTHER, 6)


def test_threads_on_one_target_agree_or_fail(target):
    expected, outcomes = plain_tokens(target, PROMPT, 30), []

    def work():
        try:
            outcomes.append(generate(target, None, [PROMPT], max_new_tokens=30)[0].tokens)
        except RuntimeError as error:
            outcomes.append(str(error))

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert expected in outcomes
    assert all(out == expected or "in use" in out for out in outcomes)


def test_one_cache_in_two_places_is_refused(target):
    twins = [draft_model(target, 2)] * 2
    for drafter in (DraftModel(target, target.vocab_size), HybridDrafter(twins)):
        with pytest.raises(ValueError, match="is there twice"):
            Engine(target, drafter)


def test_concurrent_loading_leaves_transformers_unpatched():
    before = (torch.nn.init.normal_, torch.nn.Linear.reset_parameters, torch.get_default_dtype())
    targets = []
    threads = [Thread(target=lambda: targets.append(load_target("demo"))) for _ in range(4)]
    threads += [Thread(target=lambda: load_drafter({"type": "draft_model", "path": "demo"}, own))]
    own = load_target("demo")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(targets) == 4
    after = (torch.nn.init.normal_, torch.nn.Linear.reset_parameters, torch.get_default_dtype())
    assert after == before
    assert len({tuple(plain_tokens(each, [1, 2, 3], 5)) for each in [own, *targets]}) == 1
