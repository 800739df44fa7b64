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
    verify,
)

RULES = ("token", "block", "traversal", "typical")


def _problem(device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.softmax(torch.randn(2, 5, 11, generator=generator), 2)
    problem = {
        "target": rows,
        "probs": torch.softmax(torch.randn(2, 4, 11, generator=generator), 2),
        "tokens": torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]]),
        "lengths": torch.tensor([4, 2]),
        "parents": torch.tensor([[-1, -1, 0, 0], [-1, 0, -1, -1]]),
        "uniforms": torch.rand(2, 4, generator=generator),
        "noise": torch.empty(2, 11).exponential_(generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in problem.items()}


def _run(rule: str, shape: str, sampled: bool, p: dict[str, torch.Tensor]) -> tuple:
    draft = Draft(
        p["tokens"],
        p["lengths"],
        p["parents"] if shape == "tree" else None,
        p["probs"] if sampled else None,
        4,
    )
    if rule == "match":
        verdict = match(p["target"].argmax(2), draft)
    else:
        verdict = verify(
            p["target"], draft, rule=rule, uniforms=p["uniforms"], noise=p["noise"], check=False
        )
    return verdict.tokens, verdict.num_accepted, verdict.path, verdict.tested


COMBINATIONS = [
    (rule, shape, sampled)
    for rule in (*RULES, "match")
    for shape in ("chain", "tree")
    for sampled in (False, True)
    if not (rule == "block" and shape == "tree")
]


@pytest.mark.parametrize(("rule", "shape", "sampled"), COMBINATIONS)
def test_every_rule_traces_as_one_graph(rule, shape, sampled):
    torch._dynamo.reset()
    problem = _problem()
    traced = torch.compile(_run, fullgraph=True, backend="eager")
    for found, expected in zip(
        traced(rule, shape, sampled, problem), _run(rule, shape, sampled, problem), strict=True
    ):
        assert torch.equal(found, expected)


def _layouts(p: dict[str, torch.Tensor]) -> tuple:
    chain = Draft(p["tokens"], p["lengths"], None, p["probs"], 4)
    flat, cumulative, probs, _ = to_flat(chain, total=6)
    again = from_flat(flat, cumulative, max_len=4, probs=probs)
    rows = target_from_flat(p["target"].flatten(0, 1)[:8], cumulative, 4)
    tree = Draft(p["tokens"], p["lengths"], p["parents"], None, 4)
    candidates, _, child, sibling = to_retrieve(tree, p["tokens"][:, 0])
    linked = from_retrieve(candidates, child, sibling, 4)
    kept = best_first(p["uniforms"], p["parents"], 3)
    return again.tokens, rows, linked.parents, kept.nodes, kept.parents


def test_layouts_and_growth_trace_as_one_graph():
    torch._dynamo.reset()
    traced = torch.compile(_layouts, fullgraph=True, backend="eager")
    for found, expected in zip(traced(_problem()), _layouts(_problem()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("rule", "shape", "sampled"), COMBINATIONS)
def test_rules_never_synchronize_and_agree_with_cpu(rule, shape, sampled):
    problem = _problem("cuda")
    _run(rule, shape, sampled, problem)  # the first call loads kernels, which may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = _run(rule, shape, sampled, problem)
        _layouts(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensor, expected in zip(found, _run(rule, shape, sampled, _problem()), strict=True):
        assert torch.equal(tensor.cpu(), expected)
