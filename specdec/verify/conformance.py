"""Put a rule, an engine adapter or a drafter through the checks that losslessness rests on.

Each check returns a `Report` that says in words what is violated and by how much:

    check_rule("block").raise_if_failed()
    check_engine(my_adapter, rule="token").raise_if_failed()
    check_drafter(lambda seed: my_drafter(prompt, seed)).raise_if_failed()
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from specdec.verify.cases import (
    CHAIN_SHAPE,
    SIBLING_KINDS,
    TREE_SHAPES,
    Case,
    World,
    build_case,
    emitted_joint,
    total_variation,
)
from specdec.verify.draft import Draft
from specdec.verify.honesty import check_drafter
from specdec.verify.law import Engine, verdict_law
from specdec.verify.report import ConformanceError, Finding, Report
from specdec.verify.rule import Rule
from specdec.verify.rules import get_rule, verify

__all__ = ["ConformanceError", "Finding", "Report", "check_drafter", "check_engine", "check_rule"]

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
_VOCAB_SIZE = 3
_HORIZON = 4  # emitted positions whose joint distribution is compared
_PROCESSING = ((1.0, 1.0), (0.4, 0.8), (0.0, 1.0))  # temperature, top-p


def check_rule(rule: str | Rule, dtype: torch.dtype = torch.float64, seed: int = 0) -> Report:
    """Check a rule of this package, or one of your own."""
    chosen = get_rule(rule)
    engine = partial(verify, rule=chosen, check=False)
    return check_engine(engine, chosen, dtype, seed, subject=f"rule {chosen.name!r}")


def check_engine(
    engine: Engine,
    rule: str | Rule = "token",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    subject: str = "engine",
) -> Report:
    """Check anything that is called like `verify`.

    The output distribution is computed exactly, with `law.verdict_law`, for chains and trees,
    deterministic, independent and without-replacement siblings, and several temperatures, and
    compared with the target's joint distribution over four positions.

    Args:
        engine: (target_probs, draft, *, uniforms, noise) -> Verdict. Its randomness must be what it
            is given; uniforms and noise are float64. All tensors are on the CPU: an adapter of a
            GPU engine moves them, and its verdict back.
        rule: what the engine claims to implement: `lossless` and `supports_trees` are read.
        dtype: of the probabilities handed in; float32 is held to 1e-6, float64 to 1e-12.
        seed: of the random worlds.
        subject: what the report calls it.
    """
    chosen = get_rule(rule)
    generator = torch.Generator().manual_seed(seed)
    findings: list[Finding] = []
    worst = 0.0
    cases = _cases(generator, dtype, chosen.supports_trees)
    for name, case, target in cases:
        law = verdict_law(engine, case.target_probs, case.draft)
        bias = total_variation(emitted_joint(case, law, target), target.joint())
        worst = max(worst, bias)
        if chosen.lossless and not bias <= TOLERANCE[dtype]:
            message = f"{name}: total variation to the target is {bias:.2g} over 4 positions"
            findings.append(Finding("losslessness", f"{message}, at most {TOLERANCE[dtype]:g}"))
        if law.spread.numel() and law.spread.max() > TOLERANCE[dtype]:
            message = f"{name}: a node's acceptance depends on uniforms of nodes judged elsewhere"
            findings.append(Finding("one number a node", f"{message} by {law.spread.max():.2g}"))
        findings += _check_contract(engine, case, name, generator)
    notes = () if chosen.lossless else (f"lossy by declaration: total variation up to {worst:.2g}",)
    return Report(subject, len(cases), tuple(findings), notes)


def _cases(
    generator: torch.Generator, dtype: torch.dtype, supports_trees: bool
) -> list[tuple[str, Case, World]]:
    shapes = (CHAIN_SHAPE, *TREE_SHAPES) if supports_trees else (CHAIN_SHAPE,)
    cases: list[tuple[str, Case, World]] = []
    for index, shape in enumerate(shapes):
        for kind in SIBLING_KINDS:
            temperature, top_p = _PROCESSING[len(cases) % len(_PROCESSING)]
            target = World.random(_VOCAB_SIZE, _HORIZON, generator, temperature, top_p)
            target = target.rounded(dtype)
            drafter = World.random(_VOCAB_SIZE, _HORIZON, generator).rounded(dtype)
            case = build_case(target, drafter, shape, kind, dtype, as_chain=index == 0)
            name = f"parents {shape}, {kind} siblings, temperature {temperature}, top-p {top_p}"
            cases.append((name, case, target))
    return cases


def _check_contract(
    engine: Engine, case: Case, name: str, generator: torch.Generator
) -> list[Finding]:
    """Check what holds for every draw: padding, neighbours, and the outputs' bookkeeping."""
    draft, target_probs = case.draft, case.target_probs
    lengths = torch.randint(0, draft.num_nodes + 1, draft.lengths.shape, generator=generator)
    real = replace(draft, lengths=lengths).real_nodes()
    ragged = replace(draft, lengths=lengths, tokens=draft.tokens.masked_fill(~real, -1))
    randomness = {
        "uniforms": torch.rand(real.shape, generator=generator, dtype=torch.float64),
        "noise": -torch.rand(target_probs[:, 0].shape, generator=generator).double().log(),
    }
    clean = engine(target_probs, ragged, **randomness)
    findings = []

    poisoned = target_probs.clone()
    poisoned[:, 1:][~real] = torch.nan
    probs = draft.probs
    if probs is not None:
        probs = probs.masked_fill(~real.unsqueeze(2), torch.nan)
    dirty = engine(poisoned, replace(ragged, probs=probs), **randomness)
    if not torch.equal(clean.tokens, dirty.tokens):
        row = int((clean.tokens != dirty.tokens).any(1).nonzero()[0])
        findings.append(Finding("padding", f"{name}: NaN past the length of row {row} changed it"))

    some = torch.arange(draft.batch_size // 2 + 1).flip(0)
    moved = {key: value[some] for key, value in randomness.items()}
    apart = engine(target_probs[some], _take_rows(ragged, some), **moved)
    if not torch.equal(apart.tokens, clean.tokens[some]):
        row = int(some[(apart.tokens != clean.tokens[some]).any(1)][0])
        findings.append(Finding("neighbours", f"{name}: other rows in the batch change row {row}"))

    on_path = torch.zeros_like(torch.nn.functional.pad(real, (0, 1)))
    on_path = on_path.scatter(1, clean.path % (draft.num_nodes + 1), True)[:, :-1]
    if (on_path & ~clean.tested).any() or (clean.tested & ~real).any():
        findings.append(Finding("tested", f"{name}: path, tested and real nodes are not nested"))
    if not torch.equal((clean.tokens >= 0).sum(1), clean.num_accepted + 1):
        findings.append(Finding("tokens", f"{name}: a row emits other than num_accepted + 1"))
    return findings


def _take_rows(draft: Draft, rows: Tensor) -> Draft:
    return Draft(
        draft.tokens[rows],
        draft.lengths[rows],
        None if draft.parents is None else draft.parents[rows],
        None if draft.probs is None else draft.probs[rows],
        draft.depth,
    )
