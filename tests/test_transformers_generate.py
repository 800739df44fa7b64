"""`model.generate(custom_generate=speculative(...))` does what `generate` does, or refuses."""

from collections import Counter
from itertools import product

import pytest
import torch
from test_lossless import HORIZON, SMALL_VOCAB, p_value
from tiny_models import perturbed, tiny_llama
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from specdec.integrations import transformers as ours
from specdec.integrations.transformers import speculative
from specdec.targets.hf import HFTarget

# Two rows of which the first is padded with a token that the second one's text holds.
IDS = torch.tensor([[7, 7, 7, 5, 6], [7, 3, 3, 7, 3]])
MASK = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 24, "pad_token_id": 7}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def drafter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft")
    perturbed(model, 0.05).save_pretrained(folder)
    return {"type": "draft_model", "path": str(folder), "width": 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3, "min_new_tokens": 9},
        {"bad_words_ids": [[3], [5, 6]], "suppress_tokens": [4], "min_length": 12},
        {"max_new_tokens": None, "max_length": 11, "num_return_sequences": 2, "do_sample": True}
        | {"top_k": 1},
    ],
)
def test_greedy_output_equals_that_of_generate(model, drafter, options):
    texts = model.generate(**INPUTS, do_sample=False)[:, IDS.shape[1] :]
    options = {"do_sample": False, **INPUTS, "eos_token_id": [int(texts[0, 6]), 90], **options}
    theirs = model.generate(**options)
    out = model.generate(
        **options, return_dict_in_generate=True, custom_generate=speculative(drafter)
    )
    assert torch.equal(out.sequences, theirs)
    ends = [result.finish_reason for result in out.results]
    assert len(ends) == len(theirs)
    assert "eos" in ends or "min_length" in options or "max_length" in options
    assert sum(result.stats.num_accepted for result in out.results) > 0


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05, "top_k": 4}]
)
def test_sampled_sequences_follow_the_distribution_of_transformers(options, tmp_path):
    model, prompt = tiny_llama(SMALL_VOCAB, 1), [0, 1, 2, 0, 1]
    perturbed(model, 0.3).save_pretrained(tmp_path)
    options |= {"do_sample": True, "repetition_penalty": 1.3}
    out = model.generate(
        torch.tensor([prompt]),
        **options,
        max_new_tokens=HORIZON + 8,
        num_return_sequences=3000,
        custom_generate=speculative({"type": "draft_model", "path": str(tmp_path)}),
    )
    counts = Counter(map(tuple, out[:, len(prompt) : len(prompt) + HORIZON].tolist()))
    exact = dict.fromkeys(product(range(SMALL_VOCAB), repeat=HORIZON), 1.0)
    texts = torch.tensor([[*prompt, *text] for text in exact])
    for place in range(len(prompt), texts.shape[1]):
        scores = model.generate(
            texts[:, :place],
            **options,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
        ).scores[0]
        probs = scores.softmax(-1).gather(1, texts[:, place, None])[:, 0].tolist()
        exact = {text: exact[text] * p for text, p in zip(exact, probs, strict=True)}
    assert p_value(counts, exact) > 1e-4


def test_seed_and_drafter_are_kept(model, drafter, monkeypatch):
    own = speculative(drafter)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**INPUTS, do_sample=True, custom_generate=own).tolist()

    first = sample(0)
    monkeypatch.delattr(ours, "load_drafter")
    assert sample(0) == first != sample(1)
    model.set_attn_implementation("eager")  # so the target is wrapped anew
    with pytest.raises(NameError):
        sample(0)
    model.set_attn_implementation("sdpa")


def processors(*given):
    return {"logits_processor": LogitsProcessorList(given)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam_search mode"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "PrefixConstrainedLogitsProcessor"),
        (processors(RepetitionPenaltyLogitsProcessor(1.2, 3)), "prompt_ignore_length"),
        ({"do_sample": True, "temperature": 2.0} | processors(MinPLogitsWarper(0.1)), "this order"),
        (processors(MinPLogitsWarper(0.1, min_tokens_to_keep=2)), "min_tokens_to_keep"),
        ({"stopping_criteria": [lambda ids, scores: True]}, "function"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"position_ids": torch.arange(5).expand(2, -1)}, "position_ids"),
        ({"attention_mask": MASK.flip(1)}, "padding on the right"),
        ({"past_key_values": DynamicCache()}, "cache"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_has_no_counterpart_is_refused(model, options, message):
    with pytest.raises(ValueError, match=f"custom_generate has no counterpart of .*{message}"):
        model.generate(**{**INPUTS, **options}, custom_generate=speculative("ngram"))


def test_inputs_beyond_the_context_end_with_it(model):
    target = HFTarget(model)
    ids = torch.full((1, target.max_context_len - 3), 5)
    out = model.generate(ids, max_new_tokens=10, custom_generate=speculative("ngram"))
    assert out.shape[1] == target.max_context_len
