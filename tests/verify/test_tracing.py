"""Nothing in a rule waits for the device: it traces as one graph, and CUDA confirms it."""

import pytest
import torch

from specdec.verify import (
    Draft,
    best_first,
    from_flat,
    from_retrieve,
    match,
    target_from_flat,
    to_flat,
    to_retrieve,
    uniforms_from_flat,
    verify,
)

RULES = ("token", "block", "traversal", "typical", "match")
COMBINATIONS = [
    (rule, shape, is_sampled)
    for rule in RULES
    for shape in ("chain", "tree")
    for is_sampled in (False, True)
    if not (rule == "block" and shape == "tree")
]


def problem(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "target": torch.softmax(torch.randn(2, 5, 11, generator=generator), 2),
        "probs": torch.softmax(torch.randn(2, 4, 11, generator=generator), 2),
        "tokens": torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]]),
        "cumulative": torch.tensor([1, 4], dtype=torch.int32),
        "lengths": torch.tensor([4, 2]),
        "parents": torch.tensor([[-1, -1, 0, 0], [-1, 0, -1, -1]]),
        "uniforms": torch.rand(2, 4, generator=generator),
        "noise": torch.empty(2, 11).exponential_(generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def judge(p, rule, shape, is_sampled):
    parents, probs = p["parents"] if shape == "tree" else None, p["probs"] if is_sampled else None
    draft = Draft(p["tokens"], p["lengths"], parents, probs, 4)
    if rule == "match":
        verdict = match(p["target"].argmax(2), draft)
    else:
        randomness = {"uniforms": p["uniforms"], "noise": p["noise"]}
        verdict = verify(p["target"], draft, rule=rule, **randomness, check=False)
    return verdict.tokens, verdict.num_accepted, verdict.path, verdict.tested


def engine_rows(p, rule):
    greedy, uniforms = p["lengths"] > 3, uniforms_from_flat(p["uniforms"][0], p["cumulative"], 4)
    rows = target_from_flat(p["target"][0, :4], p["cumulative"], 4, bonus=p["target"][:, 4])
    draft = from_flat(p["tokens"][0], p["cumulative"], max_len=4)
    given = {"uniforms": uniforms, "noise": p["noise"], "greedy": greedy}
    verdict = verify(rows, draft, rule=rule, **given, bonus_tokens=p["tokens"][:, 0], check=False)
    return verdict.tokens, verdict.num_accepted, verdict.path, verdict.tested


def layouts(p):
    chain = Draft(p["tokens"], p["lengths"], None, p["probs"], 4)
    flat, cumulative, probs, _ = to_flat(chain, total=6)
    again = from_flat(flat, cumulative, max_len=4, probs=probs)
    rows = target_from_flat(p["target"].flatten(0, 1)[:8], cumulative, 4)
    tree = Draft(p["tokens"], p["lengths"], p["parents"], None, 4)
    candidates, _, child, sibling = to_retrieve(tree, p["tokens"][:, 0])
    linked = from_retrieve(candidates, child, sibling, 4)
    kept = best_first(p["uniforms"], p["parents"], 3)
    return again.tokens, rows, linked.parents, kept.nodes, kept.parents


WORK = [pytest.param(judge, each, id="-".join(map(str, each))) for each in COMBINATIONS]
WORK += [pytest.param(engine_rows, (rule,), id=f"rows of engines-{rule}") for rule in RULES[:4]]
WORK.append(pytest.param(layouts, (), id="layouts and growth"))


@pytest.mark.parametrize(("work", "options"), WORK)
def test_every_rule_and_layout_traces_as_one_graph(work, options):
    torch._dynamo.reset()
    traced = torch.compile(work, fullgraph=True, backend="eager")
    found, expected = traced(problem(), *options), work(problem(), *options)
    assert all(map(torch.equal, found, expected))


@pytest.mark.gpu
@pytest.mark.parametrize(("work", "options"), WORK)
def test_gpu_never_waits_and_agrees_with_cpu(work, options):
    given = problem("cuda")
    work(given, *options)  # the first call loads kernels, which may synchronize
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = work(given, *options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensor, expected in zip(found, work(problem(), *options), strict=True):
        assert torch.equal(tensor.cpu(), expected)
