"""Families of transformers models: trees, ragged batches, rollback, taps, loading."""

from types import SimpleNamespace

import pytest
import torch
from model_matrix import HEAD, MOE, SLIDING, build
from tiny_models import perturbed, tiny_llama

from specdec import generate
from specdec.drafters.draft_model import DraftModel
from specdec.targets.hf import HFTarget, max_context_len
from specdec.verify import Draft, match

VOCAB, LAYERS = 61, 3
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "max_position_embeddings": 128}
TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    **{name: {} for name in ("Llama", "Qwen2", "Phi3", "Olmo2", "GPTNeoX", "GPT2LMHeadModel")},
    **{"Qwen3": HEAD, "Mistral": SLIDING, "Mixtral": MOE, "Gemma3": HEAD | SLIDING | TYPES},
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 4], [20, 21, 22, 23, 24]]
# Row by row: a branching tree, a chain with a sibling, a single node.
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, -1, -1], [9, -1, -1, -1, -1]])
PARENTS = torch.tensor([[-1, -1, 0, 2, 0], [-1, 0, 0, -1, -1], [-1, -1, -1, -1, -1]])
LENGTHS = torch.tensor([5, 3, 1])
ROOTS = torch.tensor([30, 31, 32])


def model_of(family):
    return build(family, SIZES | FAMILIES[family])


@pytest.fixture(scope="module", params=FAMILIES)
def target(request):
    return HFTarget(model_of(request.param))


@torch.no_grad()
def alone(target, tokens, taps=()):
    out = target.model(input_ids=torch.tensor([tokens]), output_hidden_states=bool(taps))
    return out.logits[0], {tap: out.hidden_states[tap][0] for tap in taps}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def path_to(row, node):
    path = []
    while node >= 0:
        path.insert(0, int(TOKENS[row, node]))
        node = int(PARENTS[row, node])
    return path


def check_prefill(target, taps=()):
    output = target.prefill(PROMPTS, taps)
    for row, prompt in enumerate(PROMPTS):
        logits, hidden = alone(target, prompt, taps)
        close(output.logits[row, 0], logits[-1])
        for tap in taps:
            close(output.hidden[tap][row, : len(prompt)], hidden[tap])
    assert target.cache.lengths == [len(prompt) for prompt in PROMPTS]


def test_prefill_and_taps_equal_single_forwards(target):
    check_prefill(target, (0, 1, LAYERS))
    asked = []
    handle = target.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["output_hidden_states"]), with_kwargs=True
    )
    check_prefill(target, (0, 1, LAYERS))
    handle.remove()
    assert asked[0] is False  # the first prefill proved the hooks
    assert len(asked) == 1 + len(PROMPTS)


@pytest.mark.parametrize("breakage", ["no decoder", "other tensors"])
def test_wrong_hooks_fall_back_to_the_model(breakage, monkeypatch):
    model = model_of("Llama")
    if breakage == "no decoder":
        monkeypatch.setattr(model, "get_decoder", lambda: None)
    target = HFTarget(model)
    if breakage == "other tensors":
        add_one = lambda module, args: (args[0] + 1, *args[1:])  # noqa: E731
        target._taps.layers[1].register_forward_pre_hook(
            lambda module, args, kwargs: (add_one(module, args), kwargs), with_kwargs=True
        )
    for _ in range(2):
        check_prefill(target, (1,))


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_prompt_longer_than_a_chunk_is_cached(family, monkeypatch):
    monkeypatch.setattr("specdec.targets.hf.PREFILL_CHUNK", 4)
    check_prefill(HFTarget(model_of(family)), (1,))


def test_tree_forward_equals_every_path_run_alone(target):
    target.prefill(PROMPTS)
    draft = Draft.tree(TOKENS, PARENTS, LENGTHS, depth=3)
    output = target.score(ROOTS, draft, (1,))
    for row, prompt in enumerate(PROMPTS):
        for node in range(-1, int(LENGTHS[row])):
            tokens = [*prompt, int(ROOTS[row]), *path_to(row, node)]
            logits, hidden = alone(target, tokens, (1,))
            close(output.logits[row, node + 1], logits[-1])
            close(output.hidden[1][row, node + 1], hidden[1][-1])


def test_single_tokens_across_a_window_equal_one_forward(target):
    text = [3, 4, 3]
    target.prefill([text])
    for token in (9, 2, 7, 7, 5):
        text.append(token)
        close(target.feed(torch.tensor([[token]]), [1])[0], alone(target, text)[0][-1])


def test_committed_tree_equals_a_fresh_prefill(target):
    target.prefill(PROMPTS)
    draft = Draft.tree(TOKENS, PARENTS, LENGTHS, depth=3)
    target.score(ROOTS, draft)
    # The target's "samples": row 0 follows nodes 0, 2, 3; row 1 nodes 0, 2; row 2 rejects.
    sampled = torch.tensor([[1, 3, 0, 4, 40, 0], [6, 8, 0, 41, 0, 0], [42, 0, 0, 0, 0, 0]])
    verdict = match(sampled, draft)
    accepted = verdict.num_accepted.tolist()
    assert accepted == [3, 2, 0]
    target.commit(verdict, accepted)
    committed = [[*PROMPTS[0], 30, 1, 3, 4], [*PROMPTS[1], 31, 6, 8], [*PROMPTS[2], 32]]
    assert target.cache.lengths == [len(row) for row in committed]
    again = target.score(torch.tensor([40, 41, 42]), Draft.empty(3, torch.device("cpu")))
    for row, tokens in enumerate(committed):
        close(again.logits[row, 0], alone(target, [*tokens, 40 + row])[0][-1])


def test_leaving_rows_do_not_disturb_others(target):
    target.prefill(PROMPTS)
    target.reorder(torch.tensor([0, 2]))
    output = target.score(ROOTS[[0, 2]], Draft.chain(torch.tensor([[1, 2], [3, 4]])))
    for index, row in enumerate((0, 2)):
        tokens = [*PROMPTS[row], int(ROOTS[row]), *([1, 2] if index == 0 else [3, 4])]
        close(output.logits[index], alone(target, tokens)[0][-3:])


@pytest.mark.parametrize("width", [1, 2])
def test_speculative_greedy_output_equals_generate(target, width):
    draft = HFTarget(perturbed(target.model, 0.05, seed=3))
    drafter = DraftModel(draft, target.vocab_size, 4, width=width)
    results = generate(target, drafter, PROMPTS, max_new_tokens=24)
    for prompt, result in zip(PROMPTS, results, strict=True):
        theirs = target.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        assert result.tokens == theirs[0, len(prompt) :].tolist()
    assert sum(result.stats.num_accepted for result in results) > 0


def test_cache_doubles_when_full():
    target = HFTarget(tiny_llama())
    target.prefill([[1, 2, 3]])
    capacity = target.cache.capacity
    # 2 layers x keys and values x 2 heads x 8 numbers x 4 bytes a slot
    assert target.cache.num_bytes == 2 * 2 * 2 * 8 * 4 * capacity
    target.cache.open(capacity)
    assert target.cache.capacity == 2 * capacity
    assert target.cache.num_bytes == 2 * 2 * 2 * 8 * 4 * 2 * capacity
    close(target.feed(torch.tensor([[4]]), [1])[0], alone(target, [1, 2, 3, 4])[0][-1])


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("position_ids", "gives other logits in a tree"),
        ("attention_mask", "gives other logits in a tree"),
        ("logits_to_keep", "gives other logits after ragged prompts"),
        ("past_key_values", "does not run"),
    ],
)
def test_model_that_drops_an_argument_is_refused(lost, message):
    model = tiny_llama()
    forward = model.forward
    model.forward = lambda **kwargs: forward(**{k: v for k, v in kwargs.items() if k != lost})
    with pytest.raises(ValueError, match=f"LlamaForCausalLM with sdpa attention {message}"):
        HFTarget(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_attention_in_half_precision_gives_no_nan(dtype):
    model = model_of("Gemma3").to(dtype)
    model.set_attn_implementation("eager")
    target = HFTarget(model)
    output = target.prefill(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        own = alone(target, prompt)[0][-1]
        assert (output.logits[row, 0] - own).std() < 0.1 * own.std()


SHORT = {"rope_type": "longrope", "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("ropes", "original", "length"),
    [
        (PLAIN, None, 64),
        (SHORT, None, 16),
        ({"type": "su"}, 16, 16),
        ({"full_attention": SHORT, "sliding_attention": PLAIN}, None, 16),
    ],
)
def test_context_ends_where_longrope_changes(ropes, original, length, recwarn):
    config = SimpleNamespace(
        max_position_embeddings=64, rope_parameters=ropes, original_max_position_embeddings=original
    )
    assert max_context_len(config) == length
    said = [f"its context is {length} tokens" in str(each.message) for each in recwarn]
    assert said == [True] * (length < 64)


def test_recurrent_model_is_refused_by_name():
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        HFTarget(build("Mamba", {}))
