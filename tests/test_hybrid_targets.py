"""Recurrent layers: a tree is what every path alone is, and every drafter keeps the output.

SPECDEC_HYBRID=1 in the environment runs the whole lossless suite on them.
"""

import os
from dataclasses import replace

import pytest
import torch
from model_matrix import DELTA, HEAD, PARALLEL, build
from test_lossless import ALL, CASES, case, with_heads

from specdec import load_drafter
from specdec.common.compile import CannotCompileError
from specdec.lossless.test_lossless import *  # noqa: F403 (the tests and their fixtures)
from specdec.targets import hf
from specdec.targets.hf import HFTarget
from specdec.targets.recurrent import HybridCache, Nodes, _State

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 97, "max_position_embeddings": 256}
MODELS = {
    "delta rule": ("Qwen3_5", HEAD | DELTA),
    "Mamba-2": ("Bamba", PARALLEL | {"attn_layer_indices": [1]}),
}
# A draft model would be a copy of the target, and is refused.
WHOLE = [each for each in CASES if "draft_model" not in str(each.values[0].options)]
SHAPE = {"depth": 3, "width": 24, "max_nodes": 60, "children": "with_replacement"}
# A random head hardly ever guesses what is sampled.
FEW = [pytest.param(replace(case("eagle3", SHAPE), promises=ALL - {"matched"}), id="eagle3")]
IS_WHOLE = os.environ.get("SPECDEC_HYBRID") == "1"


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", WHOLE if IS_WHOLE else FEW)


def hybrid(name, **changes):
    kind, options = MODELS[name]
    return HFTarget(build(kind, options | SIZES | changes))


@pytest.fixture(scope="module", params=MODELS)
def target(request):
    return hybrid(request.param)


@pytest.fixture(scope="module", params=MODELS if IS_WHOLE else ["delta rule"])
def small_target(request):
    return hybrid(request.param, vocab_size=5)


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory, target):
    return with_heads(tmp_path_factory.mktemp("drafts"), target)


@pytest.fixture(scope="module")
def small_vocab_folder(tmp_path_factory, small_target):
    return with_heads(tmp_path_factory.mktemp("small"), small_target)


def recurrence(state, keys, values, decay, beta, path, query):
    """Output of the last node of a path, token by token."""
    for node in path:
        state = state * decay[node].exp()
        new = values[node]
        if beta is not None:
            new = beta[node] * (new - keys[node] @ state)
        state = state + torch.outer(keys[node], new)
    return query @ state


def random_tree(size, generator):
    """Parents [size], the root's is -1, and the path to every node."""
    parents = [-1] + [int(torch.randint(node, (), generator=generator)) for node in range(1, size)]
    paths = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if node else []), node])
    return torch.tensor(parents), paths


@pytest.mark.parametrize("has_beta", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_tree_of_64_nodes_is_every_path_alone(dtype, error, has_beta):
    generator = torch.Generator().manual_seed(0)
    size, rows, heads, width, depth = 64, 2, 2, 8, 6
    trees = [random_tree(size, generator) for _ in range(rows)]

    def random(*shape):
        return torch.randn(rows, heads, size, *shape, generator=generator, dtype=torch.float64)

    queries, keys, values = random(width), random(width), random(depth)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    decay, beta = -random().abs(), random().sigmoid() if has_beta else None
    before = torch.randn(rows, heads, width, depth, generator=generator, dtype=torch.float64)
    cache = HybridCache(1, rows, 1, torch.device("cpu"))
    visible = torch.zeros(rows, size, size, dtype=torch.bool)
    for row, (_, paths) in enumerate(trees):
        for node, path in enumerate(paths):
            visible[row, node, path] = True
    cache.run_over(Nodes(visible, torch.stack([parents for parents, _ in trees])))
    state = _State(cache)
    state.tensors["state"] = before.to(dtype)
    given = (each if each is None else each.to(dtype) for each in (queries, keys, values, decay))
    found = state.attend(*given, beta if beta is None else beta.to(dtype))
    for row, (_, paths) in enumerate(trees):
        for head in range(heads):
            own = [keys[row, head], values[row, head], decay[row, head]]
            weight = None if beta is None else beta[row, head]
            for node, path in enumerate(paths):
                query = queries[row, head, node]
                alone = recurrence(before[row, head], *own, weight, path, query)
                assert (found[row, head, node] - alone).abs().max() < error


def test_chunks_joins_and_pauses_change_nothing(target, monkeypatch):
    texts = [[3, 4, 5] * 5, [7], [1, 2, 3, 4] * 9]
    whole = [target.prefill([text]).logits[0, 0] for text in texts]
    monkeypatch.setattr(hf, "PREFILL_CHUNK", 4)
    together = target.prefill(texts).logits[:, 0]
    joined = [target.prefill(texts[:1]).logits, target.prefill(texts[1:], join=True).logits]
    for found in (together, torch.cat(joined)[:, 0]):
        torch.testing.assert_close(found, torch.stack(whole), atol=1e-4, rtol=1e-4)
    target.reorder(torch.tensor([2, 0]))
    tokens = torch.tensor([[9, 8], [9, 8]])
    behind = target.feed(tokens, [2, 1])
    for row, (text, count) in enumerate(((texts[2], 2), (texts[0], 1))):
        alone = target.prefill([[*text, *tokens[row, :count].tolist()]]).logits[0, 0]
        torch.testing.assert_close(behind[row], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_kept(name):
    kind, options = MODELS[name]
    target = HFTarget(build(kind, options | SIZES).bfloat16())
    assert target.prefill([[3, 4, 5], [7]]).logits.isfinite().all()


def test_memory_is_as_predicted(target):
    target.reserve(3, 32, join=False)
    target.prefill([[1, 2, 3]] * 3)
    assert target.cache_bytes == target.bytes_for(3, 32)
    assert target.bytes_for(3, 0) > 0  # states


def test_model_decodes_by_itself_as_before(target):
    ids = torch.tensor([[3, 4, 5, 6]])
    once = target.model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)
    plain = target.model.generate(
        ids, do_sample=False, max_new_tokens=8, pad_token_id=0, use_cache=False
    )
    assert once.tolist() == plain.tolist()


def test_what_cannot_be_is_refused(target, tmp_path):
    with pytest.raises(CannotCompileError, match="recurrent layers; load it with compile=False"):
        HFTarget(target.model, compile=True)
    target.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot forget what was rejected"):
        load_drafter({"type": "draft_model", "path": str(tmp_path)}, target)
