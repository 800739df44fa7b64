"""Every family decodes what its own `generate` does, or is refused by name."""

import pytest
import torch
from model_matrix import CASES, DOCS, Scripted, build, render

from specdec import generate
from specdec.drafters.ngram import NgramDrafter
from specdec.integrations.transformers import speculative
from specdec.targets.hf import HFTarget

# Shorter than the window, at which all texts arrive, one of them past it.
PROMPTS = [[3, 4, 3], [5, 2], [7, 2, 5, 7, 2, 9, 7, 2]]
NUM_NEW = 14


def expected_texts(model):
    texts = {}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, do_sample=False, max_new_tokens=NUM_NEW, pad_token_id=0)
        texts[tuple(prompt)] = out[0, len(prompt) :].tolist()
    return texts


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant", "changes", "refusal"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_family_equals_generate_or_is_refused(name, variant, changes, refusal):
    model = build(name, changes)
    if refusal:
        with pytest.raises(ValueError, match=refusal) as caught:
            HFTarget(model)
        assert name.removesuffix("LMHeadModel") in str(caught.value)
        return
    texts = expected_texts(model)  # before the target switches the attention
    target = HFTarget(model)
    lookup = NgramDrafter(4, max_ngram=2, min_ngram=1)
    for drafter in (None, lookup, Scripted(texts)):
        for prompts in (PROMPTS[:1], PROMPTS):
            results = generate(target, drafter, prompts, max_new_tokens=NUM_NEW)
            for prompt, result in zip(prompts, results, strict=True):
                room = target.max_context_len - len(prompt)
                assert result.tokens == texts[tuple(prompt)][:room], (drafter, len(prompts))
        drafted = sum(result.stats.num_drafted for result in results)
        accepted = sum(result.stats.num_accepted for result in results)
        assert drafter is None or drafted > 0
    assert 0 < accepted < drafted
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    behind = model.generate(
        ids,
        attention_mask=(ids > 0).long(),  # no prompt holds a 0
        max_new_tokens=NUM_NEW,
        custom_generate=speculative(Scripted(texts)),
    )
    for prompt, row in zip(PROMPTS, behind[:, width:].tolist(), strict=True):
        room = target.max_context_len - len(prompt)
        assert row[:room] == texts[tuple(prompt)][:room]


def test_page_of_models_is_that_of_the_table():
    assert DOCS.read_text() == render()
