"""Replays and passes against the loop itself, on tiny models: the same steps, one by one."""

from dataclasses import replace

import pytest
import torch
from test_lossless import NAMED, resolved, with_heads
from tiny_models import perturbed, tiny_target

from specdec import SamplingConfig, generate, load_drafter
from specdec.analysis.predict import Predictor, expect
from specdec.analysis.replay import replay
from specdec.analysis.teacher_forced import gather_evidence
from specdec.analysis.texts import Text, target_answers
from specdec.drafters.base import BaseDrafter
from specdec.drafters.draft_model import DraftModel
from specdec.lossless.test_lossless import PROMPTS as ALL_PROMPTS
from specdec.targets.hf import HFTarget
from specdec.verify import Draft

CASES = [pytest.param(name, options, id=each) for name, options, each in NAMED]
PROMPTS, NUM_NEW = ALL_PROMPTS[:3], 14
GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(temperature=0.9, top_p=0.95)


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, target):
    return with_heads(tmp_path_factory.mktemp("drafts"), target)


def decoded(target, options, sampling=GREEDY):
    """The loop's results and what it emitted, one prompt after the other."""
    drafter = load_drafter(options, target)
    results = generate(target, drafter, PROMPTS, sampling, max_new_tokens=NUM_NEW, batch_size=1)
    return results, [Text(r.prompt_tokens, r.tokens, NUM_NEW) for r in results]


def bare(record):
    """A record without its times, and without what was accepted behind the text's end."""
    times = dict.fromkeys(("draft_s", "target_s", "wall_s", "verify_s", "commit_s"), 0.0)
    return replace(record, **times, num_accepted_raw=None)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_greedy_predictions_take_the_loops_own_steps(name, options, target, folder):
    options = resolved(name, options, folder, target)
    results, texts = decoded(target, options)
    assert target_answers(target, PROMPTS, GREEDY, NUM_NEW) == texts
    replayed = replay(target, load_drafter(options, target), texts, GREEDY)
    assert replayed == [[bare(record) for record in result.records] for result in results]
    found = Predictor(target, texts, GREEDY).predict(options)
    stats = [result.stats for result in results]
    assert found.steps == pytest.approx([each.num_steps for each in stats])
    if found.drafted_is_exact:
        assert found.drafted == pytest.approx([each.num_drafted for each in stats])
    depths = len(found.accepted_at[0])
    for index, each in enumerate(stats):
        padding = (0,) * (depths - len(each.accepted_at))
        assert found.accepted_at[index] == pytest.approx((*each.accepted_at, *padding))
        assert found.tested_at[index] == pytest.approx((*each.tested_at, *padding))


CHOSEN = [
    case
    for case in CASES
    if case.values[1].get("children", "top") == "top"
    and (case.values[0] != "draft_model" or case.values[1].get("width", 1) > 1)
]


@pytest.mark.parametrize(("name", "options"), CHOSEN)
def test_chosen_drafts_are_certain_along_sampled_texts(name, options, target, folder):
    options = resolved(name, options, folder, target)
    results, texts = decoded(target, options, SAMPLED)
    found = Predictor(target, texts, SAMPLED).predict(options)
    assert found.steps == pytest.approx([result.stats.num_steps for result in results])
    assert found.drafted == pytest.approx([result.stats.num_drafted for result in results])


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if "hybrid" in case.id])
def test_drafters_with_a_memory_see_texts_in_turn(name, options, target, folder):
    options = resolved(name, options, folder, target)
    _, texts = decoded(target, options)
    found = replay(target, load_drafter(options, target), [*texts, *texts], GREEDY)
    results = generate(
        target, load_drafter(options, target), PROMPTS * 2, max_new_tokens=NUM_NEW, batch_size=1
    )
    assert found == [[bare(record) for record in result.records] for result in results]


def test_a_short_draft_context_ends_drafts_like_the_loop(target):
    model = HFTarget(perturbed(target.model, 0.1))
    model.max_context_len = 14
    drafter = DraftModel(model, target.vocab_size, num_draft_tokens=4)
    prompt = [5, 6, 7, 8, 5, 6, 7]
    (result,) = generate(target, drafter, [prompt], max_new_tokens=20)
    evidence = gather_evidence(target, drafter, [Text(prompt, result.tokens, 20)], GREEDY, 4)
    found = expect(evidence, drafter.fixed_shape, sampled=False)
    assert result.stats.num_accepted > 0
    assert found.steps == [result.stats.num_steps]


class SampledByItself(BaseDrafter):
    """A strategy of one's own that samples, and says nothing about whole texts."""

    def propose(self, root, budget, sampler):
        law = torch.full((1, 1, 97), 1 / 97)
        return Draft.chain(torch.tensor([[5]]), probs=law)


def test_a_replay_refuses_sampled_drafts(target):
    with pytest.raises(ValueError, match="samples its drafts and cannot be given a whole text"):
        replay(target, SampledByItself(), [Text([1], [2, 3, 4], 5)], SAMPLED)


def test_one_pass_serves_all_shapes_of_a_drafter(target, folder, monkeypatch):
    passes = []

    def gather(*given):
        passes.append(given)
        return gather_evidence(*given)

    monkeypatch.setattr("specdec.analysis.predict.gather_evidence", gather)
    predictor = Predictor(target, target_answers(target, PROMPTS, SAMPLED, NUM_NEW), SAMPLED)
    chain = resolved("eagle", {"width": 1}, folder, target)
    taus = [predictor.predict({**chain, "depth": depth}).tau for depth in range(1, 9)]
    assert taus == sorted(taus)
    predictor.predict({**chain, "depth": 3, "children": "with_replacement"})
    assert len(passes) == 1
    predictor.predict({**chain, "depth": 12})
    assert len(passes) == 2
