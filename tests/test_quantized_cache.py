"""Quantized keys and values: what is lost, and that speculation loses nothing more."""

from types import SimpleNamespace

import pytest
import torch
from test_lossless import exact_distribution, p_value, sampled
from tiny_heads import tiny_head
from tiny_models import perturbed, tiny_llama
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from specdec import Engine, SamplingConfig, generate, generate_baseline, load_drafter, load_target
from specdec.common.compile import CannotCompileError, compile_mode
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.mixture_of_attentions import MixtureDrafter
from specdec.drafters.tree_growth import TreeShape
from specdec.engine.kv_cache import SlotCache, key_values
from specdec.engine.quantize import GROUP, MODES, decode, encode
from specdec.engine.scheduler import CacheLimit
from specdec.targets import hf
from specdec.targets.hf import HFTarget

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [3] * 12, [11, 12, 13, 11, 12], [60], list(range(20, 50))]
BITS = {"fp8": 8, "int8": 8, "int6": 6, "int4": 4}
# Half a step; of e4m3 half the distance of numbers with three bits behind the point.
STEP = {"fp8": 1 / 16, "int8": 0.5 / 127, "int6": 0.5 / 31, "int4": 0.5 / 7}


def tokens_of(results):
    return [result.tokens for result in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 64, 80])
@pytest.mark.parametrize("mode", MODES)
def test_error_is_at_most_half_a_step(mode, size, dtype):
    torch.manual_seed(0)
    states = (torch.randn(2, 3, 5, size) * torch.logspace(-3, 2, 5).unsqueeze(1)).to(dtype)
    states[0, 0, 0] = 0
    codes, scales = encode(states, mode)
    assert codes.dtype == torch.uint8
    assert codes.shape[-1] == size * BITS[mode] // 8
    assert scales.shape[-1] == -(-size // GROUP)
    found = decode(codes, scales, mode)
    assert found.dtype == dtype
    largest = torch.cat(
        [part.abs().amax(-1, keepdim=True).expand_as(part) for part in states.split(GROUP, -1)], -1
    ).float()
    errors = (found.float() - states.float()).abs()
    rounding = largest * (torch.finfo(dtype).eps + 2**-11 * (dtype == torch.float16))
    assert (errors <= largest * STEP[mode] + rounding).all()
    alone = [decode(*encode(states[:, :, i : i + 1], mode), mode) for i in range(5)]
    assert torch.equal(torch.cat(alone, 2), found)


@pytest.mark.parametrize("mode", ["int8", "int6", "int4"])
def test_every_level_survives_packing(mode):
    levels = torch.arange(-MODES[mode], MODES[mode] + 1.0)
    states = torch.stack([levels.roll(i) for i in range(len(levels))])[:, :8].contiguous()
    states[:, 0] = MODES[mode]
    assert torch.equal(decode(*encode(states / 4, mode), mode), states / 4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_state_that_is_not_finite_stays_so(mode, value):
    states = torch.ones(1, 64)
    states[0, 5] = value
    found = decode(*encode(states, mode), mode)
    assert not found[0, 5].isfinite()
    assert found[0, GROUP:].isfinite().all()


@pytest.mark.parametrize("lengths", [[3, 3], [5, 2]])
def test_tap_reads_what_is_attended(lengths):
    cache = SlotCache(2, 2, 8, torch.device("cpu"), ["a", "a"], "int4")
    for counts in (lengths, [4, 4]):
        cache.open(max(counts))
        states = torch.randn(2, 2, 2, 3, max(counts), 8)  # layers, keys or values, rows, heads
        seen = [cache.update(*states[layer], layer) for layer in range(2)]
        found, slots = cache.newest(max(counts)), cache.new_slots
        rows = torch.arange(2).unsqueeze(1)
        parts = (
            [pair[i].transpose(1, 2)[rows, slots].transpose(1, 2) for pair in seen]
            for i in range(2)
        )
        assert torch.equal(found, key_values(*map(torch.stack, parts)))
        assert not torch.equal(found, key_values(states[:, 0], states[:, 1]))
        cache.extend(counts)


@pytest.fixture(scope="module", params=["fp8", "int4"])
def target(request):
    return HFTarget(attentive(tiny_llama()), cache=request.param)


def drafters(target):
    """A chain, and trees of a draft model and of heads, one of which reads keys and values."""
    top, mode = target.config.num_hidden_layers, "int4"
    model = HFTarget(perturbed(target.model, 0.15), cache=mode)
    yield DraftModel(model, target.vocab_size)
    yield DraftModel(model, target.vocab_size, width=3, max_nodes=8)
    shape = TreeShape(3, 24, 60)
    for kind, drafter, options in (
        ("eagle3", Eagle3Drafter, {"taps": [0, top // 2, top]}),
        ("mixture_of_attentions", MixtureDrafter, {}),
    ):
        yield drafter(tiny_head(kind, target, **options), target.vocab_size, shape)


def test_greedy_tokens_are_those_of_plain_decoding(target):
    sampling = [
        SamplingConfig(repetition_penalty=1.3 if i % 2 else 1.0, frequency_penalty=0.2 * (i == 3))
        for i in range(len(PROMPTS))
    ]
    plain = generate_baseline(target, PROMPTS, sampling, max_new_tokens=32)
    alone = [
        generate_baseline(target, [p], s, max_new_tokens=32)[0]
        for p, s in zip(PROMPTS, sampling, strict=True)
    ]
    assert tokens_of(plain) == tokens_of(alone)
    for drafter in drafters(target):
        found = generate(target, drafter, PROMPTS, sampling, max_new_tokens=32, batch_size=3)
        assert tokens_of(found) == tokens_of(plain)
        assert any(result.stats.num_accepted for result in found)


def test_prompts_in_parts_change_no_token(target, monkeypatch):
    prompts = [list(range(40, 80)), [9] * 23, list(range(61))]
    whole = tokens_of(generate_baseline(target, prompts, max_new_tokens=16))
    monkeypatch.setattr(hf, "PREFILL_CHUNK", 7)
    assert tokens_of(generate_baseline(target, prompts, max_new_tokens=16)) == whole
    engine = Engine(target, next(drafters(target)), max_rows=3, join_chunk=8)
    numbers = []
    for prompt in prompts:
        numbers.append(engine.submit(prompt, max_new_tokens=16))
        engine.step()
    while engine.num_running or engine.num_waiting:
        engine.step()
    assert [engine.result(number).tokens for number in numbers] == whole


def attentive(model):
    """The model with attention that tells a coarse cache from a fine one."""
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "o_proj"):
                getattr(layer.self_attn, name).weight.mul_(20)
    return model


def test_samples_follow_the_distribution_of_this_cache():
    model = attentive(tiny_llama(5, 1))
    target = HFTarget(model, cache="int4")
    prompt, sampling = [0, 1, 2], SamplingConfig(temperature=0.9)

    def logits(input_ids):
        """Token by token, as plain decoding reads them."""
        found = [target.prefill(input_ids[:, : len(prompt)].tolist()).logits]
        for column in input_ids[:, len(prompt) :].split(1, 1):
            found.append(target.feed(column, [1] * len(column)).unsqueeze(1))
        before = found[0].new_zeros(len(input_ids), len(prompt) - 1, target.vocab_size)
        return SimpleNamespace(logits=torch.cat([before, *found], 1))

    exact = exact_distribution(SimpleNamespace(model=logits), prompt, sampling)
    drafter = DraftModel(HFTarget(perturbed(model, 0.3)), 5, num_draft_tokens=3)
    counts, depth = sampled(target, drafter, prompt, sampling)
    assert depth >= 3
    assert p_value(counts, exact) > 1e-4
    assert p_value(counts, exact_distribution(HFTarget(model), prompt, sampling)) < 1e-6


def wide_llama(head_dim=64):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            head_dim=head_dim,
            eos_token_id=None,
        )
    ).eval()


def test_memory_limit_takes_more_rows_of_fewer_bits():
    model = wide_llama().to(torch.float16)
    plain = HFTarget(model)
    limit, running = CacheLimit(plain, None, 1).bytes_for(4, 50), {}
    for mode in ("none", *MODES):
        target = HFTarget(model, cache=mode)
        bits = 16 if mode == "none" else BITS[mode] + 16 / GROUP
        assert target.bytes_for(3, 7) == bits / 16 * plain.bytes_for(3, 7)
        engine = Engine(target, max_rows=16, max_cache_bytes=limit)
        for i in range(16):
            engine.submit([i] * 10, max_new_tokens=40)
        for _ in range(3):
            engine.step()
        assert engine.cache_bytes <= limit
        running[mode] = engine.num_running
    assert running == {"none": 4, "fp8": 7, "int8": 7, "int6": 9, "int4": 14}


def delta_rules(*layer_types):
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=len(layer_types),
        layer_types=[*layer_types],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
        max_position_embeddings=256,
        eos_token_id=None,
    )
    return Qwen3NextForCausalLM(config).eval()


def test_attention_of_a_hybrid_target_is_quantized_alone():
    model = delta_rules("linear_attention", "full_attention")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    target, plain = HFTarget(model, cache="int8"), HFTarget(model)
    assert plain.bytes_for(1, 8) - target.bytes_for(1, 8) == 8 * 2 * (16 * 3 - 4)
    drafter = load_drafter({"type": "ngram", "min_ngram": 1, "num_continuations": 3}, target)
    found = generate(target, drafter, PROMPTS, max_new_tokens=32, batch_size=3)
    assert tokens_of(found) == tokens_of(generate_baseline(target, PROMPTS, max_new_tokens=32))
    assert any(result.stats.num_accepted for result in found)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: load_target("demo", cache="int5"),
            ValueError,
            "one of none, fp8, int8, int6, int4",
        ),
        (lambda: encode(torch.ones(9), "int4"), ValueError, "packs 2 values .* has 9"),
        (
            lambda: HFTarget(delta_rules("linear_attention"), cache="int8"),
            ValueError,
            "no keys and values",
        ),
        (lambda: HFTarget(wide_llama(6), cache="int6"), ValueError, "packs 4 values .* has 6"),
        (
            lambda: load_target("demo", compile=True, cache="fp8"),
            CannotCompileError,
            "no fp8 cache",
        ),
        (
            lambda: load_target("demo", engine="exllamav3", cache="int8"),
            ValueError,
            "cache_mode its cache",
        ),
    ],
)
def test_cache_that_cannot_be_is_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_compiled_target_leaves_a_quantized_draft_eager():
    device = torch.device("cuda")
    assert compile_mode("auto", device) == "graphs"
    assert compile_mode("auto", device, "int8") == "eager"
    compiled = SimpleNamespace(compile_mode="inductor", device="cpu", vocab_size=0, tokenizer=None)
    drafter = load_drafter({"type": "draft_model", "path": "demo", "cache": "int8"}, compiled)
    assert drafter.model.compile_mode == "eager"
