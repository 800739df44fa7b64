"""The tap of keys and values, wherever it is read, and what a head of it refuses."""

from dataclasses import replace

import pytest
import torch
from model_matrix import build
from scripted import ScriptedDecoding, lively_head, small_target, true_features
from tiny_heads import save_tiny_head
from tiny_models import tiny_target
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from specdec import Engine, generate, generate_baseline, load_drafter
from specdec.data.answers import AnswerRow
from specdec.drafters.heads import build_head
from specdec.drafters.mixture_of_attentions import MixtureDrafter
from specdec.drafters.tree_growth import TreeShape
from specdec.engine.interfaces import KEYS_VALUES, Capabilities
from specdec.engine.kv_cache import SlotCache
from specdec.targets import hf
from specdec.targets.hf import HFTarget, TargetEnds
from specdec.targets.taps import read_text
from specdec.train.data import OnlineSource

KIND = "mixture_of_attentions"
TEXT = [(7 * place) % 17 for place in range(40)]
SMALL = {
    **{"vocab_size": 17, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}


def windowed_target():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8, eos_token_id=None))
    return HFTarget(model.eval())


def whole(target, tokens):
    return true_features(target, [*tokens, 0], [KEYS_VALUES])[KEYS_VALUES]


@pytest.mark.parametrize("make", [small_target, windowed_target], ids=["full", "window"])
def test_tap_is_the_cache_however_a_text_is_read(make, monkeypatch):
    target = make()
    monkeypatch.setattr(hf, "PREFILL_CHUNK", 7)
    near = {"atol": 1e-5, "rtol": 1e-4}
    rows = [TEXT[:20], TEXT[5:8], TEXT[3:30]]
    with torch.inference_mode():
        found = target.prefill(rows, [KEYS_VALUES]).hidden[KEYS_VALUES]
        for row, text in enumerate(rows):
            torch.testing.assert_close(found[row, : len(text)], whole(target, text), **near)
        joining = [TEXT[2:37], TEXT[:4]]
        while target.prefill_ahead(joining, [KEYS_VALUES], 10):
            pass
        found = target.prefill(joining, [KEYS_VALUES], join=True).hidden[KEYS_VALUES]
        for row, text in enumerate(joining):
            torch.testing.assert_close(found[row, : len(text)], whole(target, text), **near)
    found = read_text(target, TEXT, 9, [KEYS_VALUES]).hidden[KEYS_VALUES]
    torch.testing.assert_close(found, whole(target, TEXT), **near)
    answers = [AnswerRow(tuple(text), ((1, len(text)),)) for text in rows]
    batch = OnlineSource(target, [KEYS_VALUES, 3], torch.float32).batch(answers)
    for row, text in enumerate(rows):
        found = batch.hidden[KEYS_VALUES][row, : len(text)]
        torch.testing.assert_close(found, whole(target, text), **near)


def test_tap_of_a_scored_tree_is_of_its_nodes():
    target = small_target()
    drafter = MixtureDrafter(lively_head(KIND, target), 17, TreeShape(3, 3, 9))
    prompts = [TEXT[:5], TEXT[9:12]]
    decoding, heard = ScriptedDecoding(target, drafter, prompts), []
    observe = drafter.observe
    drafter.observe = lambda *given: heard.append(given) or observe(*given)
    for _ in range(4):
        before = [list(row) for row in decoding.rows]
        decoding.step()
        verdict, committed, hidden = heard[-1]
        for row, new in enumerate(committed):
            text = [*before[row], *new[:-1]]
            nodes = [0, *[node + 1 for node in verdict.path[row].tolist() if node >= 0]]
            expected = whole(target, text)[len(before[row]) - 1 :]
            torch.testing.assert_close(
                hidden[KEYS_VALUES][row, nodes], expected, atol=1e-5, rtol=1e-4
            )
    assert max(decoding.num_accepted) > 1


def test_engine_decodes_the_same_text_with_rows_that_come_and_go(tmp_path):
    target = tiny_target()
    path = save_tiny_head(tmp_path, KIND, target)
    drafter = load_drafter({"type": KIND, "path": path, "width": 24, "max_nodes": 60}, target)
    prompts = [TEXT[:12], [3], TEXT[20:29], [5, 6, 5]]
    plain = generate_baseline(target, prompts, max_new_tokens=20)
    ours = generate(target, drafter, prompts, max_new_tokens=20, batch_size=2)
    assert [r.tokens for r in ours] == [r.tokens for r in plain]
    held = drafter.bytes_for(1, 1) - drafter.bytes_for(1, 0)
    assert held == 4 * 2 * 2 * 8  # two layers' keys and values of a head of 8, in float32


def test_targets_without_the_tap_are_refused(tmp_path):
    target = tiny_target()
    drafter = load_drafter({"type": KIND, "path": save_tiny_head(tmp_path, KIND, target)}, target)
    target.capabilities = replace(target.capabilities, first_tap=0)
    assert target.capabilities == Capabilities()
    with pytest.raises(ValueError, match=r"\(-1, 2\) but .* no \[-1\]; .*not keys and values"):
        Engine(target, drafter)


def test_layers_of_several_shapes_are_refused():
    cache = SlotCache(2, 1, 4, torch.device("cpu"))
    cache.open(1)
    for layer, heads in enumerate((1, 2)):
        cache.update(torch.zeros(1, heads, 1, 4), torch.zeros(1, heads, 1, 4), layer)
    with pytest.raises(ValueError, match="do not all cache keys and values of one shape"):
        cache.newest(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": {"hidden_size": 16}}, r"backbone.hidden_size is 16 but must be 32"),
        ({"cross": {"hidden_size": 16}}, r"cross.hidden_size is 16 but must be 32"),
        ({"layers": {"hidden_size": 16}}, r"layers.hidden_size is 16 but must be 32"),
        ({"target_layers": 4}, "target_layers is 4 but the target has only 3"),
        ({"cross": {"rope_theta": 1.0}}, "cross.rope_theta does not exist"),
        ({"target_layers": -1}, "target_layers"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_head(KIND, options, small_target())


def test_layers_that_cannot_run_alone_are_refused():
    eager = LlamaForCausalLM._from_config(LlamaConfig(**SMALL), attn_implementation="eager")
    with torch.device("meta"):
        unread = LlamaForCausalLM(LlamaConfig(**SMALL))
    unread.set_input_embeddings(eager.get_input_embeddings())
    for target, fault in (
        (windowed_target(), "has sliding layers"),
        (HFTarget(eager.eval()), "runs on another attention than sdpa"),
        (HFTarget(build("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 48})), "not built as Llama"),
        (TargetEnds(unread), "is not loaded whole"),
    ):
        with pytest.raises(ValueError, match=f"target_layers is 1 but the target .*{fault}"):
            build_head(KIND, {"target_layers": 1}, target)


def test_head_of_another_shape_is_refused():
    head = lively_head(KIND, small_target())
    hidden = tiny_target(17, num_layers=2).prefill([TEXT[:3]], head.taps[:1]).hidden
    with pytest.raises(ValueError, match="caches 64 numbers a token but the head reads 3 layers"):
        head.fuse(hidden)


def test_drafter_is_not_compiled(tmp_path):
    target = tiny_target()
    path = save_tiny_head(tmp_path, KIND, target)
    with pytest.raises(ValueError, match="compile"):
        load_drafter({"type": KIND, "path": path, "compile": True}, target)


@pytest.mark.parametrize(("shared", "own"), [(1, 1), (2, 1), (4, 2)])
def test_new_head_has_the_proportions_of_the_paper(shared, own):
    config = LlamaConfig(**{**SMALL, "num_key_value_heads": shared})
    options = build_head(KIND, {}, HFTarget(LlamaForCausalLM(config).eval())).options
    for layer in (options.backbone, options.cross):
        assert (layer.num_key_value_heads, layer.intermediate_size) == (own, 48)
    width = 2 * shared * 8
    layer = options.layers
    assert (layer.hidden_size, layer.num_attention_heads) == (width, 4)
    assert (layer.num_key_value_heads, layer.intermediate_size) == (shared, 3 * width // 2)


def test_plain_parts_are_left_out():
    target = small_target()
    kinds = {"": {}, "mean": {"layer_self_attention": False}, "own": {"cross_attention": False}}
    names = {
        kind: {name.split(".")[0] for name in build_head(KIND, options, target).state_dict()}
        for kind, options in kinds.items()
    }
    whole = {"self_attention", "cross_attention", "Ekv2E", "layer_self_attention"}
    assert names == {
        "": whole,
        "mean": whole - {"layer_self_attention"},
        "own": {"self_attention"},
    }
