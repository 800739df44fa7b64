"""The draft model: what it drafts, from which distribution, within which context and vocabulary."""

import pytest
import torch
from checkpoints import save_checkpoint, save_tokenizer
from lookup_steps import chains, paths
from tiny_models import tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM

from specdec import SamplingConfig, generate, generate_baseline, load_target
from specdec.drafters.draft_model import DraftModel
from specdec.sampling.sampler import Sampler
from specdec.targets.hf import HFTarget
from specdec.verify import Draft
from specdec.verify.conformance import check_drafter

VOCAB = 97
PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [3] * 12, [60]]
SHAPES = {"chain": {}, "tree": {"width": 3, "max_nodes": 9}}
CPU = torch.device("cpu")


def model_of(model):
    return HFTarget(model, None)


def make_sampler(num_rows, config=SamplingConfig(), vocab_size=VOCAB):  # noqa: B008 (frozen)
    configs = [
        SamplingConfig(temperature=config.temperature, top_p=config.top_p, seed=row)
        for row in range(num_rows)
    ]
    return Sampler(configs, vocab_size, CPU, [[0]] * num_rows, ())


@torch.inference_mode()
def draft_after(drafter, prompts, sampler, budget=(9, 9, 9)):
    drafter.begin(prompts, None, sampler)
    return drafter.propose(torch.tensor([row[-1] for row in prompts]), budget, sampler)


def same_tokens(target, drafter, prompts, **options):
    """Generate, and compare with plain decoding."""
    results = generate(target, drafter, prompts, **options)
    plain = generate_baseline(target, prompts, max_new_tokens=options["max_new_tokens"])
    assert [r.tokens for r in results] == [r.tokens for r in plain]
    return results


def resized(model, vocab_size, **changes):
    """The same model with fewer or more tokens, or another context; extra tokens are random."""
    config = LlamaConfig(**{**model.config.to_dict(), "vocab_size": vocab_size, **changes})
    torch.manual_seed(9)
    copy = LlamaForCausalLM(config).eval()
    weights = copy.state_dict()
    for name, weight in model.state_dict().items():
        if weight.shape == weights[name].shape:
            weights[name] = weight
        else:
            rows = min(len(weight), vocab_size)
            weights[name] = weights[name].normal_()
            weights[name][:rows] = weight[:rows]
    copy.load_state_dict(weights)
    return copy


def same_draft(ours, theirs):
    assert chains(ours) == chains(theirs) if ours.is_chain else paths(ours) == paths(theirs)
    if ours.probs is None:
        assert theirs.probs is None
        return
    real, size = ours.real_nodes(), min(ours.probs.shape[2], theirs.probs.shape[2])
    torch.testing.assert_close(ours.probs[real][:, :size], theirs.probs[real][:, :size])


@pytest.mark.parametrize("shape", SHAPES)
def test_draft_keeps_every_rows_budget(shape):
    drafter = DraftModel(model_of(tiny_llama()), VOCAB, 3, **SHAPES[shape])
    for budget in ([0, 1, 9], [2, 0, 1], [0, 0, 0]):
        draft = draft_after(drafter, PROMPTS, make_sampler(3), budget)
        assert all(len(p) <= b for p, b in zip(paths(draft), budget, strict=True))
        assert bool(draft.num_nodes) == any(budget)


def test_greedy_chain_is_what_model_generates():
    model = tiny_llama()
    draft = draft_after(DraftModel(model_of(model), VOCAB, 4), PROMPTS, make_sampler(3))
    for prompt, chain in zip(PROMPTS, chains(draft), strict=True):
        alone = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=4, pad_token_id=0
        )
        assert chain == alone[0, len(prompt) :].tolist()


SAMPLING = SamplingConfig(temperature=0.6, top_p=0.8)


def test_reported_probabilities_are_processed_ones():
    model = tiny_llama()
    draft = draft_after(DraftModel(model_of(model), VOCAB, 4), PROMPTS, make_sampler(3, SAMPLING))
    for row, (prompt, chain) in enumerate(zip(PROMPTS, chains(draft), strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + chain])).logits[:, len(prompt) - 1 : -1]
        expected = make_sampler(1, SAMPLING).probs(logits)[0]
        torch.testing.assert_close(draft.probs[row], expected)


def row_drafts(drafter, config, num_rows, vocab_size):
    """Drafts of one context with as many seeds, in one batch."""
    prompts, sampler = [[0, 1, 2]] * num_rows, make_sampler(num_rows, config, vocab_size)
    draft = draft_after(drafter, prompts, sampler, [9] * num_rows)
    return [
        Draft.chain(draft.tokens[i, None], draft.lengths[i, None], draft.probs[i, None])
        for i in range(num_rows)
    ]


def warmed(probs):
    return probs.sqrt() / probs.sqrt().sum(-1, keepdim=True)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_tokens_are_drawn_from_reported_distribution(threshold):
    model = model_of(tiny_llama(7, 1))
    drafter = DraftModel(model, 7, 3, confidence_threshold=threshold)
    drafts = row_drafts(drafter, SAMPLING, 1500, 7)
    assert len({int(draft.lengths) for draft in drafts}) > (threshold > 0)
    check_drafter(drafts.__getitem__, 7, 1500).raise_if_failed()
    warmer = [Draft.chain(d.tokens, d.lengths, warmed(d.probs)) for d in drafts]
    assert not check_drafter(warmer.__getitem__, 7, 1500).passed, "a wrong temperature passed"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("threshold", [0.05, 0.4, 0.99])
def test_chain_ends_below_confidence_threshold(threshold, temperature):
    model, sampler = tiny_llama(), make_sampler(3, SamplingConfig(temperature=temperature))
    whole, drafted = (
        chains(draft_after(DraftModel(model_of(model), VOCAB, 5, 1, None, least), PROMPTS, sampler))
        for least in (0.0, threshold)
    )
    for prompt, full, chain in zip(PROMPTS, whole, drafted, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + full])).logits[0, len(prompt) - 1 : -1]
        survival = logits.softmax(-1).amax(-1).cumprod(0)
        assert chain == full[: int((survival >= threshold).sum())]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_vocabularies_are_cropped_and_padded(shape, temperature):
    config, base = SamplingConfig(temperature=temperature), tiny_llama()

    def draft(model, vocab_size):
        sampler = make_sampler(3, config, vocab_size)
        drafter = DraftModel(model_of(model), vocab_size, 4, **SHAPES[shape])
        return draft_after(drafter, PROMPTS, sampler)

    same_draft(draft(base, VOCAB), draft(resized(base, VOCAB + 15), VOCAB))
    small = resized(base, 80)
    padded = draft(small, VOCAB)
    same_draft(draft(small, 80), padded)
    if padded.probs is not None:
        assert torch.count_nonzero(padded.probs[:, :, 80:]) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_unknown_token_does_not_stop_decoding(shape):
    drafter = DraftModel(model_of(resized(tiny_llama(), 50)), VOCAB, 3, **SHAPES[shape])
    results = same_tokens(model_of(tiny_llama()), drafter, PROMPTS, max_new_tokens=30)
    assert any(token >= 50 for result in results for token in result.tokens)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_shorter_context_stops_drafting(shape, batch_size):
    base, context = tiny_llama(), 32
    short = model_of(resized(base, VOCAB, max_position_embeddings=context))
    prompts = [[5, 6, 7, 8], [9] * 30, [3] * 80, [1]]
    drafter = DraftModel(short, VOCAB, 4, **SHAPES[shape])
    lengths = {"max_new_tokens": 90, "batch_size": batch_size}
    results = same_tokens(model_of(base), drafter, prompts, **lengths)
    for prompt, result in zip(prompts, results, strict=True):
        length = len(prompt) + 1
        for step in result.records:
            assert bool(step.num_drafted) == (length < context and length < len(prompt) + 89)
            length += step.num_emitted


@pytest.mark.parametrize("shape", SHAPES)
def test_full_context_never_disturbs_joining_rows(shape):
    short = model_of(resized(tiny_llama(), VOCAB, max_position_embeddings=16))
    prompts = [[7] * 30, *([token, 9] for token in range(14))]
    # The first row outlives all the others, which join it one after the other and keep drafting.
    drafter = DraftModel(short, VOCAB, 4, **SHAPES[shape])
    same_tokens(model_of(tiny_llama()), drafter, prompts, max_new_tokens=13, batch_size=2)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base"), tiny_llama())


def test_another_tokenizer_is_refused_by_tokens(base_folder, tmp_path):
    save_checkpoint(tmp_path)
    save_tokenizer(tmp_path, first=40)
    target = load_target(str(base_folder))
    with pytest.raises(ValueError, match=r"97 of 97 tokens differ, .+ for one"):
        DraftModel.load(target, str(tmp_path))


def save_adapter(base, folder, scale):
    """A LoRA adapter that changes the model visibly; returns the adapted model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=4 * scale,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(3)
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(folder)
    return adapted


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10]])).logits


def test_merged_adapter_gives_adapted_logits(base_folder, tmp_path):
    pytest.importorskip("peft")
    adapted = save_adapter(load_target(str(base_folder)).model, tmp_path, scale=16)
    target = load_target(str(base_folder))
    drafter = DraftModel.load(target, str(base_folder), adapter=str(tmp_path))
    ours, theirs, plain = map(logits_of, (drafter.model.model, adapted, target.model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 0.1 * plain.std(), "the adapter changes nothing"
    same_tokens(target, drafter, PROMPTS, max_new_tokens=12)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A base model of which bitsandbytes can make blocks of 64 weights."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**tiny_llama().config.to_dict(), **wide})).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return save_checkpoint(tmp_path_factory.mktemp("wide"), model)


LINEAR = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}


def off_by(ours, theirs):
    """Relative difference of logits."""
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("quantization", LINEAR)
def test_quantized_model_is_target_and_drafter(wide_folder, quantization):
    pytest.importorskip("bitsandbytes", reason="quantization needs bitsandbytes")
    whole = load_target(str(wide_folder))
    target = load_target(str(wide_folder), quantization=quantization)
    drafter = DraftModel.load(whole, str(wide_folder), quantization=quantization)
    for model in (target.model, drafter.model.model):
        kinds = {type(module).__name__ for module in model.modules()}
        assert LINEAR[quantization] in kinds
        assert 0 < off_by(logits_of(model), logits_of(whole.model)) < 0.5
    for verifier, proposer in ((whole, drafter), (target, DraftModel(whole, VOCAB))):
        results = same_tokens(verifier, proposer, PROMPTS, max_new_tokens=16)
        assert sum(r.stats.num_accepted for r in results) > 0


@pytest.mark.parametrize("quantization", LINEAR)
def test_adapter_on_quantized_model_survives_rounding(wide_folder, tmp_path, quantization):
    pytest.importorskip("bitsandbytes", reason="quantization needs bitsandbytes")
    peft = pytest.importorskip("peft")
    save_adapter(load_target(str(wide_folder)).model, tmp_path, scale=0.1)
    target = load_target(str(wide_folder))
    # Each copy runs once: after its first forward bitsandbytes' 4-bit CPU kernel rounds otherwise.
    plain, base = (load_target(str(wide_folder), quantization=quantization) for _ in range(2))
    adapted = peft.PeftModel.from_pretrained(base.model, tmp_path).eval()
    drafter = DraftModel.load(
        target, str(wide_folder), adapter=str(tmp_path), quantization=quantization
    )
    ours = logits_of(drafter.model.model)
    assert off_by(ours, logits_of(adapted)) < 0.01
    assert off_by(ours, logits_of(plain.model)) > 0.1, "the adapter changes nothing"
