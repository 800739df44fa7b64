"""A draft model with another tokenizer: what is drafted, kept in its cache, and never emitted."""

import random

import pytest
import torch
from checkpoints import save_tokenizer
from tiny_models import tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specdec import SamplingConfig, generate, generate_baseline, load_drafter
from specdec.drafters.base import Forced
from specdec.drafters.vocabulary import Bridge, Context, Vocabulary
from specdec.lossless.test_lossless import exact_distribution, p_value, sampled
from specdec.sampling.sampler import Sampler
from specdec.targets.hf import HFTarget

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Ein schöner Tag: für 3,50 € gibt es Käse.\n\tif x == 1:\n\t\treturn [x, x]",
    "日本語のテキスト 🙂🙃 naïve café",
]
CHAIN, TREE = {"num_draft_tokens": 4}, {"num_draft_tokens": 3, "width": 3, "max_nodes": 8}
FOREIGN = [("intersect", CHAIN), ("intersect", TREE), ("retokenize", CHAIN), ("auto", CHAIN)]


def byte_level(texts, size, specials):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    told = {"vocab_size": size, "special_tokens": specials, "initial_alphabet": alphabet}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**told, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=specials[0])


def sentencepiece(tokens, merges=(), fallback=False):
    """A SentencePiece tokenizer by hand, with a space before every text."""
    tokens = [*tokens, *(f"<0x{byte:02X}>" for byte in range(256) if fallback)]
    vocab = {token: index for index, token in enumerate(tokens)}
    bpe = Tokenizer(models.BPE(vocab, list(merges), byte_fallback=fallback))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    if "<s>" in vocab:
        bpe.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


LETTERS = ["<s>", "\u2581", "e", "n", "en", "\u2581d", "d", "o", "g", "\u2581dog", "\u2581do"]
MERGES = [("e", "n"), ("\u2581", "d"), ("\u2581d", "o"), ("\u2581do", "g")]
TOKENIZERS = {
    "target": byte_level(TEXTS, 330, ["<|end|>", "<s>"]),
    "draft": byte_level(TEXTS[::-1] * 2 + ["no dogs over there"], 300, ["<eos>", "<|end|>"]),
    "pieces": sentencepiece(LETTERS, MERGES, fallback=True),
}


def foreign_pair(folder, ours, other, seed=0):
    """A target, and a saved draft model that says the same with what both vocabularies hold."""
    target = HFTarget(tiny_llama(len(ours), seed=seed), ours)
    theirs = Vocabulary(ours, len(ours), "ours"), Vocabulary(other, len(other), "other")
    model = tiny_llama(len(other), seed=seed)
    weights, state = target.model.state_dict(), model.state_dict()
    with torch.no_grad():
        for name, weight in state.items():
            if weight.shape == weights[name].shape:
                weight.copy_(weights[name])
                continue
            for piece, index in theirs[1].ids.items():
                if piece in theirs[0].ids:
                    weight[index] = weights[name][theirs[0].ids[piece]]
    model.save_pretrained(folder)
    other.save_pretrained(folder)
    return target, str(folder)


@pytest.fixture(scope="module", params=["draft", "pieces"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return foreign_pair(folder, TOKENIZERS["target"], TOKENIZERS[request.param])


def load(path, target, mode, **options):
    chosen = {"type": "draft_model", "path": path, "vocabulary": mode, **options}
    return load_drafter(chosen, target)


@pytest.mark.parametrize(("mode", "shape"), FOREIGN)
def test_output_is_the_target_s(mode, shape, pair):
    target, path = pair
    drafter = load(path, target, mode, **shape)
    euro = target.tokenizer("€")["input_ids"]
    prompts = ["The dog", [0, 1, 0], euro[:1], TEXTS[2], [5] * 40, [1]]
    plain = generate_baseline(target, prompts, max_new_tokens=24)
    accepted = 0
    assert not isinstance(drafter, Forced)  # so it is analyzed along the texts
    for rows in (None, 1, 2):  # with two, the others join
        options = {"max_new_tokens": 24, "batch_size": rows}
        results = generate(target, drafter, prompts, **options)
        assert [r.tokens for r in results] == [r.tokens for r in plain]
        accepted += sum(r.stats.num_accepted for r in results)
    assert accepted


TINY = sentencepiece(["a", "b", "ab", "c", "\u2581"], [("a", "b")])
TINY_DRAFT = sentencepiece(["c", "b", "ba", "a", "\u2581", "cc"], [("b", "a"), ("c", "c")])


@pytest.mark.parametrize(("mode", "shape"), FOREIGN[:3])
def test_samples_follow_the_target_s_distribution(mode, shape, tmp_path):
    target, path = foreign_pair(tmp_path, TINY, TINY_DRAFT)
    drafter = load(path, target, mode, **shape)
    prompt, sampling = [0, 1, 2, 3], SamplingConfig(temperature=0.9)
    counts, depth = sampled(target, drafter, prompt, sampling)
    assert depth >= 2
    assert p_value(counts, exact_distribution(target, prompt, sampling)) > 1e-4


@torch.inference_mode()
def test_reported_distribution_is_the_one_drawn_from(tmp_path):
    target, path = foreign_pair(tmp_path, TINY, TINY_DRAFT)
    drafter = load(path, target, "intersect", num_draft_tokens=2)
    rows = 2000
    configs = [SamplingConfig(temperature=1.0, seed=row) for row in range(rows)]
    prompts = [[0, 1, 3]] * rows
    sampler = Sampler(configs, 5, None, prompts, ())
    drafter.begin(prompts, None, sampler)
    draft = drafter.propose(torch.full((rows,), 3), [2] * rows, sampler)
    assert torch.allclose(draft.probs.sum(-1), torch.ones(rows, 2))
    assert not draft.probs[..., 2].any()  # "ab"
    seen = torch.bincount(draft.tokens[:, 0], minlength=5) / rows
    assert (seen - draft.probs[0, 0]).abs().max() < 0.04


def random_bytes(chance):
    """A text with broken characters, special tokens and what looks like one."""
    odd = [b"\xff", b"\xff<s>\xff", b"<s>", b"\xe2\x82", b"\x80", b" ", b"\n", b"", b"\xed\xa0\x80"]
    parts = []
    for _ in range(chance.randrange(6)):
        text = chance.choice(TEXTS).encode()
        start = chance.randrange(len(text))
        piece = text[start : start + chance.randrange(12)]
        parts.append(chance.choice([piece, chance.choice(odd)]))
        parts.append(bytes(chance.choices(range(256), k=chance.randrange(3))))
    return b"".join(parts)


def spelled(vocabulary, tokens):
    return b"".join(vocabulary.pieces[token] for token in tokens)


def test_any_bytes_are_spelled_again_and_aligned():
    chance = random.Random(0)
    found = {n: Vocabulary(each, len(each), n) for n, each in TOKENIZERS.items()}
    for turn in range(10_000):
        vocabulary = found[chance.choice([*found])]
        text = random_bytes(chance)
        tokens, ends = vocabulary.encode(text)
        assert spelled(vocabulary, tokens) == text
        assert ends == [len(spelled(vocabulary, tokens[: i + 1])) for i in range(len(tokens))]
        if turn % 4:
            continue
        context = Context(vocabulary, text, 1)
        for _ in range(3):
            before, new = [*context.tokens], random_bytes(chance)
            fed = vocabulary.encode(chance.choice([new, new[:3], random_bytes(chance)]))[0]
            same = context.add(new, 1, fed)
            text += new
            added = context.ends[0] == 0  # a first token that nothing said
            assert spelled(vocabulary, context.tokens[added:]) == text
            assert same <= len(context.tokens)
            assert context.tokens[:same] == [*before, *fed][:same]


def test_context_keeps_the_draft_s_tokens_and_tokenizes_the_last_word_anew():
    vocabulary = Vocabulary(TOKENIZERS["draft"], 300, "draft")
    context = Context(vocabulary, b"The dog", 1)
    for piece in (b" o", b"v", b"er t"):
        context.add(piece, 1)
    known = TOKENIZERS["draft"]("The dog over t")["input_ids"]
    assert context.tokens == known
    fed = vocabulary.encode(b" lazy cat")[0]
    assert context.add(b" lazy dog", 1, fed) > len(known)
    assert context.num_committed == 5


def test_special_tokens_are_shared_by_content_alone():
    target, draft = (Vocabulary(TOKENIZERS[n], 330, n) for n in ("target", "draft"))
    bridge = Bridge(draft, target, "intersect")
    shared = dict(zip(bridge.target_ids.tolist(), bridge.draft_ids.tolist(), strict=True))
    assert (shared[0], shared.get(1)) == (1, None)  # "<|end|>" in both, "<s>" in the target alone
    assert bridge.text([1, 0]) == b"\xff<|end|>\xff"
    assert bridge.retokenized([1, 0, 1]) == [0]  # the draft model's own end is none of the target's


def test_what_cannot_be_bridged_is_refused(tmp_path, pair):
    target, path = pair
    with pytest.raises(ValueError, match=r"another tokenizer.*vocabulary='auto'"):
        load(path, target, "same")
    with pytest.raises(ValueError, match="'retokenize', which drafts chains, but width"):
        load(path, target, "retokenize", width=2)
    with pytest.raises(ValueError, match="vocabulary is 'union' but must be one of same, auto"):
        load(path, target, "union")
    with pytest.raises(ValueError, match=r"'auto' but the target or drafter .* has no tokenizer"):
        load(path, HFTarget(target.model), "auto")
    few = Vocabulary(sentencepiece(["\u2581", "a"]), 2, "few")
    with pytest.raises(ValueError, match=r"only 2 of the target's \d+ tokens are shared, and 5%"):
        Bridge(few, Vocabulary(target.tokenizer, 330, "target"), "intersect")
    tiny_llama(97).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokens of drafter .* cannot be mapped to bytes"):
        load(str(tmp_path), target, "auto")
