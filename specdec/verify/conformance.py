"""Put a rule, an engine adapter or a drafter through the checks that losslessness rests on.

Each check returns a `Report` that says in words what is violated and by how much:

    check_rule("block").raise_if_failed()
    check_engine(my_adapter, rule="token").raise_if_failed()
    check_drafter(lambda seed: my_drafter(prompt, seed)).raise_if_failed()
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from specdec.verify.checks import check_values
from specdec.verify.draft import Draft, Verdict
from specdec.verify.rules import Rule, get_rule, verify

__all__ = ["ConformanceError", "Finding", "Report", "check_drafter", "check_engine", "check_rule"]

# Called like `specdec.verify.verify`: (target_probs, draft, *, uniforms, noise) -> Verdict.
Engine = Callable[..., Verdict]

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
CHAIN_SHAPE = (-1, 0, 1)
TREE_SHAPES = ((-1, -1, 0, 0), (-1, 0, 0, 1), (-1, 0, -1, 2))
SIBLING_KINDS = ("deterministic", "independent", "without replacement")
_VOCAB_SIZE = 3
_HORIZON = 4  # emitted positions whose joint distribution is compared
_PROCESSING = ((1.0, 1.0), (0.4, 0.8), (0.0, 1.0))  # temperature, top-p
_BITS = 53  # of a float64 in [0, 1)
_LARGEST = 1.0 - 2.0**-_BITS
_REJECTED_NOISE = 1e30


@dataclass(frozen=True, eq=False)
class VerdictDistribution:
    """The behavior of a rule on each draft row, over all its randomness.

    Attributes:
        thresholds: [B, N] float64, node i is accepted iff its uniform is below; NaN for a node that
            never decides anything.
        spread: [B, N] float64, how far the thresholds of one node lie apart between contexts; 0 for
            a rule that judges each node by one number.
        paths: [B, K, D] accepted nodes of each of the K outcomes, -1 padded; outcomes may repeat.
        probs: [B, K] float64 probability of the outcome.
        last_probs: [B, K, V] float64 distribution of the last token given the outcome.
    """

    thresholds: Tensor
    spread: Tensor
    paths: Tensor
    probs: Tensor
    last_probs: Tensor


def verdict_distribution(engine: Engine, target_probs: Tensor, draft: Draft) -> VerdictDistribution:
    """Integrate out the uniforms and the noise of `engine` for every row of a small draft."""
    thresholds, spread = _find_thresholds(engine, target_probs, draft)
    accept = _patterns(draft.num_nodes)  # [K, N]
    cut = thresholds.nan_to_num(0.5).unsqueeze(1)  # [B, 1, N]
    uniforms = torch.where(accept, cut / 2, (cut + 1) / 2).clamp(max=_LARGEST)
    probs = torch.where(accept, cut, 1 - cut).prod(2)
    last_probs, paths = _find_last_probs(engine, target_probs, draft, uniforms)
    return VerdictDistribution(thresholds, spread, paths, probs, last_probs)


def _patterns(num_nodes: int) -> Tensor:
    """List all accept / reject decisions, bool [2 ** N, N]."""
    return torch.tensor(list(product((True, False), repeat=num_nodes))).view(-1, num_nodes)


def _find_thresholds(engine: Engine, target_probs: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
    """Bisect each node's uniform in every context of the others' extremes: two [B, N]."""
    batch_size, num_nodes = draft.tokens.shape
    if num_nodes == 0:
        return torch.empty(batch_size, 0).double(), torch.empty(batch_size, 0).double()
    contexts = _patterns(num_nodes).double() * _LARGEST  # [K, N], float64 throughout
    num_contexts = contexts.shape[0]
    rows = num_nodes * num_contexts
    repeated = draft.map_rows(lambda t: t.repeat_interleave(rows, 0))
    target = target_probs.repeat_interleave(rows, 0)
    base = contexts.repeat(batch_size * num_nodes, 1)  # [B * N * K, N]
    column = torch.arange(num_nodes).repeat_interleave(num_contexts).repeat(batch_size).unsqueeze(1)
    noise = torch.ones(batch_size * rows, target_probs.shape[2], dtype=torch.float64)

    def path_at(value: Tensor) -> Tensor:
        uniforms = base.scatter(1, column, value.unsqueeze(1))
        return engine(target, repeated, uniforms=uniforms, noise=noise).path

    low = torch.zeros(batch_size * rows, dtype=torch.float64)
    high = torch.full_like(low, _LARGEST)
    accepted, rejected = path_at(low), path_at(high)
    decides = (accepted != rejected).any(1)
    for _ in range(_BITS):
        middle = (low + high) / 2
        below = (path_at(middle) == accepted).all(1)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    # A node that accepts even the largest uniform in every context is certain: see below.
    found = torch.where(decides, high, torch.nan).view(batch_size, num_nodes, num_contexts)
    thresholds = found.nanmean(2)
    top = found.nan_to_num(-1.0).amax(2)
    spread = (top - found.nan_to_num(2.0).amin(2)).where(~thresholds.isnan(), 0.0)
    return torch.where(thresholds.isnan(), thresholds, top), spread


def _find_last_probs(
    engine: Engine, target_probs: Tensor, draft: Draft, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Bisect the noise of each token against the likeliest one: [B, K, V], and paths [B, K, D]."""
    batch_size, num_patterns, _ = uniforms.shape
    vocab_size = target_probs.shape[2]

    def run(copies: int, noise: Tensor) -> Verdict:
        return engine(
            target_probs.repeat_interleave(num_patterns * copies, 0),
            draft.map_rows(lambda t: t.repeat_interleave(num_patterns * copies, 0)),
            uniforms=uniforms.flatten(0, 1).repeat_interleave(copies, 0),
            noise=noise,
        )

    def last_token(verdict: Verdict) -> Tensor:
        return verdict.tokens.gather(1, verdict.num_accepted.unsqueeze(1)).squeeze(1)

    flat = batch_size * num_patterns
    plain = run(1, torch.ones(flat, vocab_size, dtype=torch.float64))
    likeliest = last_token(plain).repeat_interleave(vocab_size).unsqueeze(1)  # [B * K * V, 1]
    tokens = torch.arange(vocab_size).repeat(flat)
    noise = torch.full((flat * vocab_size, vocab_size), _REJECTED_NOISE, dtype=torch.float64)
    noise.scatter_(1, likeliest, 1.0)
    low = torch.zeros(flat * vocab_size, dtype=torch.float64)
    high = torch.ones_like(low)
    for _ in range(_BITS):
        middle = (low + high) / 2
        wins = last_token(run(vocab_size, noise.scatter(1, tokens[:, None], middle[:, None])))
        below = wins == tokens
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    ratio = torch.where(likeliest.squeeze(1) == tokens, 1.0, low).view(flat, vocab_size)
    last_probs = (ratio / ratio.sum(1, keepdim=True)).view(batch_size, num_patterns, vocab_size)
    return last_probs, plain.path.view(batch_size, num_patterns, -1)


@dataclass(frozen=True)
class World:
    """A table of conditional distributions: prefix -> float64 [V]."""

    table: dict[tuple[int, ...], Tensor]
    vocab_size: int
    horizon: int

    @classmethod
    def random(
        cls,
        vocab_size: int,
        horizon: int,
        generator: torch.Generator,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> "World":
        """Draw random logits for every prefix; temperature 0 gives one-hot rows."""
        table = {}
        for length in range(horizon):
            for prefix in product(range(vocab_size), repeat=length):
                logits = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
                table[prefix] = _process(logits, temperature, top_p)
        return cls(table, vocab_size, horizon)

    def rounded(self, dtype: torch.dtype) -> "World":
        """Return the world as `dtype` sees it, normalized again."""
        rows = {prefix: row.to(dtype).double() for prefix, row in self.table.items()}
        return World(
            {prefix: row / row.sum() for prefix, row in rows.items()}, self.vocab_size, self.horizon
        )

    def joint(self) -> Tensor:
        """Compute the distribution of the first `horizon` tokens: [V, ..., V]."""
        return self.continuation(())

    def continuation(self, prefix: tuple[int, ...]) -> Tensor:
        """Compute the distribution of the tokens after `prefix`, up to the horizon."""
        if len(prefix) == self.horizon:
            return torch.ones((), dtype=torch.float64)
        after = [self.continuation((*prefix, token)) for token in range(self.vocab_size)]
        row = self.table[prefix]
        return torch.stack([row[token] * after[token] for token in range(self.vocab_size)])


@dataclass(frozen=True, eq=False)
class Case:
    """Every draft a drafter can produce, as the rows of one batch, and how likely each is.

    Attributes:
        draft: B = number of realizations.
        target_probs: [B, N + 1, V].
        weights: [B] float64, summing to one.
    """

    draft: Draft
    target_probs: Tensor
    weights: Tensor


def build_case(
    target: World,
    drafter: World,
    shape: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    as_chain: bool = False,
) -> Case:
    """Enumerate the drafts of one tree shape; `kind` is one of `SIBLING_KINDS`."""
    realizations = _realizations(drafter, shape, kind)
    tokens = torch.tensor([tokens for tokens, _, _ in realizations])
    target_rows = []
    for path_tokens, _, _ in realizations:
        paths = [_prefix(shape, path_tokens, node) for node in range(len(shape))]
        target_rows.append(torch.stack([target.table[path] for path in [(), *paths]]))
    probs = None
    if kind != "deterministic":
        probs = torch.stack([torch.stack(rows) for _, rows, _ in realizations]).to(dtype)
    depth = max(len(_prefix(shape, (0,) * len(shape), node)) for node in range(len(shape)))
    draft = Draft.tree(tokens, torch.tensor(shape), depth=depth, probs=probs)
    if as_chain:
        draft = Draft.chain(tokens, probs=probs)
    weights = torch.tensor([weight for _, _, weight in realizations], dtype=torch.float64)
    return Case(draft, torch.stack(target_rows).to(dtype), weights)


def emitted_joint(case: Case, verdicts: VerdictDistribution, target: World) -> Tensor:
    """Compute the distribution of the first `horizon` tokens when a rule emits them.

    What the rule does not emit is sampled from the target afterwards.
    """
    joint = torch.zeros_like(target.joint())
    outcome_probs = verdicts.probs * case.weights.unsqueeze(1)
    tokens = case.draft.tokens.tolist()
    for row, outcome in (outcome_probs > 0).nonzero().tolist():
        path = [node for node in verdicts.paths[row, outcome].tolist() if node >= 0]
        prefix = tuple(tokens[row][node] for node in path)
        for token, prob in enumerate(verdicts.last_probs[row, outcome].tolist()):
            if prob > 0:
                emitted = (*prefix, token)
                share = outcome_probs[row, outcome] * prob
                joint[emitted] += share * target.continuation(emitted)
    return joint


def total_variation(first: Tensor, second: Tensor) -> float:
    """Compute half the absolute difference of two distributions."""
    return 0.5 * (first - second).abs().sum().item()


def _process(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), logits.numel()).double()
    probs = torch.softmax(logits / temperature, 0)
    ranked, order = probs.sort(descending=True)
    dropped = order[ranked.cumsum(0) - ranked >= top_p]
    probs[dropped] = 0
    return probs / probs.sum()


def _prefix(shape: tuple[int, ...], tokens: tuple[int, ...], node: int) -> tuple[int, ...]:
    """Spell the tokens from the root's child down to `node`."""
    parent = shape[node]
    above = () if parent < 0 else _prefix(shape, tokens, parent)
    return (*above, tokens[node])


def _realizations(
    drafter: World, shape: tuple[int, ...], kind: str
) -> list[tuple[tuple[int, ...], list[Tensor], float]]:
    """List tokens, distribution of each node, and probability of every draft of the drafter."""
    partial: list[tuple[tuple[int, ...], list[Tensor], float]] = [((), [], 1.0)]
    for node, parent in enumerate(shape):
        grown = []
        for tokens, rows, weight in partial:
            above = () if parent < 0 else _prefix(shape, tokens, parent)
            earlier = [tokens[i] for i in range(node) if shape[i] == parent]
            row = _node_probs(drafter.table[above], earlier, kind)
            for token in row.nonzero().flatten().tolist():
                grown.append(((*tokens, token), [*rows, row], weight * row[token].item()))
        partial = grown
    return partial


def _node_probs(row: Tensor, earlier: list[int], kind: str) -> Tensor:
    if kind == "deterministic":  # the drafter's best tokens in order
        best = row.argsort(descending=True)[len(earlier)]
        return torch.nn.functional.one_hot(best, row.numel()).double()
    if kind == "independent" or not earlier:
        return row
    left = row.clone()
    left[earlier] = 0
    if left.sum() == 0:  # the drafter has run out of tokens: any true distribution will do
        left = torch.ones_like(row)
        left[earlier] = 0
    return left / left.sum()


@dataclass(frozen=True)
class Finding:
    """One violated promise: the check that found it, and what it saw."""

    check: str
    message: str

    def __str__(self) -> str:
        """Return `check: message`."""
        return f"{self.check}: {self.message}"


class ConformanceError(AssertionError):
    """A subject did not keep what it promises."""


@dataclass(frozen=True)
class Report:
    """The outcome of a check.

    Attributes:
        subject: the rule, engine or drafter.
        num_cases: cases that ran.
        findings: violated promises; empty when all were kept.
        notes: facts that are no violation, as the bias of a rule that calls itself lossy.
    """

    subject: str
    num_cases: int
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Nothing was violated."""
        return not self.findings

    def __str__(self) -> str:
        """Return one line a finding, headed by the subject and the count of cases."""
        verdict = "passed" if self.passed else f"{len(self.findings)} violations"
        lines = [f"{self.subject}: {verdict} ({self.num_cases} cases)"]
        lines += [f"  violated: {finding}" for finding in self.findings]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def raise_if_failed(self) -> None:
        """Raise `ConformanceError` with the whole report if anything was violated."""
        if not self.passed:
            raise ConformanceError(str(self))


def check_drafter(
    propose: Callable[[int], Draft],
    vocab_size: int,
    num_drafts: int = 400,
    subject: str = "drafter",
    false_alarm: float = 1e-6,
) -> Report:
    """Check that the `probs` a drafter reports are the distribution of the tokens it draws.

    A token drawn from q has, given everything before it, E[1(x = v)] = q(v) for every v and
    E[q(x)] = sum of q^2. Both differences are summed over drafts and nodes and must be zero within
    chance. An argmax reported with full probabilities fails the second; a tree pruned after its
    tokens were seen, or a temperature that was left out, fails one of the two.

    Args:
        propose: draws a draft for one fixed context; only the seed differs between calls. A drafter
            that samples but reports no probs is noted: lossless, but accepted less than it could.
        vocab_size: V.
        num_drafts: seeds 0 .. num_drafts - 1.
        subject: its name in the report.
        false_alarm: probability that an honest drafter is refused.
    """
    drafts = [propose(seed) for seed in range(num_drafts)]
    findings = _check_proposals(drafts, vocab_size)
    notes: tuple[str, ...] = ()
    if not findings and all(draft.probs is None for draft in drafts):
        notes = _note_sampled_point_mass(drafts)
    elif not findings:
        findings = _check_reported_probs(drafts, vocab_size, false_alarm)
    return Report(subject, num_drafts, tuple(findings), notes)


def _check_proposals(drafts: Sequence[Draft], vocab_size: int) -> list[Finding]:
    """Check every draft's own values, with the checks of `verify`."""
    for seed, draft in enumerate(drafts):
        if (draft.probs is None) != (drafts[0].probs is None):
            return [Finding("probs", f"seed {seed} and seed 0 disagree on reporting probs")]
        target = torch.zeros(draft.batch_size, draft.num_nodes + 1, vocab_size)
        target[:, :, 0] = 1
        try:
            check_values(target.to(draft.tokens.device), draft, "any", None, None)
        except (ValueError, RuntimeError) as error:
            return [Finding("draft", f"seed {seed}: {error}")]
    return []


def _note_sampled_point_mass(drafts: Sequence[Draft]) -> tuple[str, ...]:
    first = drafts[0]
    for seed, draft in enumerate(drafts):
        same = draft.tokens.shape == first.tokens.shape and torch.equal(draft.tokens, first.tokens)
        if not same:
            cost = "lossless, but reporting probs would get more of them accepted"
            return (f"seeds 0 and {seed} drew other tokens and no probs are reported: {cost}",)
    return ()


def _check_reported_probs(
    drafts: Sequence[Draft], vocab_size: int, false_alarm: float
) -> list[Finding]:
    num_tests = vocab_size + 1
    # Bernstein's inequality for martingales: increments are at most 1.
    budget = math.log(2 * num_tests / false_alarm)
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    count_variance = torch.zeros_like(counts)
    match_sum, match_variance, num_drawn = 0.0, 0.0, 0
    for draft in drafts:
        assert draft.probs is not None
        real = draft.real_nodes()
        probs = draft.probs[real].double().cpu()  # [R, V]
        drawn = torch.nn.functional.one_hot(draft.tokens[real].cpu(), vocab_size).double()
        counts += (drawn - probs).sum(0)
        count_variance += (probs * (1 - probs)).sum(0)
        expected = (probs * probs).sum(1)
        match_sum += ((drawn * probs).sum(1) - expected).sum().item()
        match_variance += ((probs**3).sum(1) - expected**2).sum().item()
        num_drawn += probs.shape[0]

    findings = []
    if abs(match_sum) > _chance(match_variance, budget):
        direction = "more" if match_sum > 0 else "less"
        findings.append(
            Finding(
                "reported probs",
                f"drawn tokens are {direction} likely under the reported probs than draws from "
                f"them would be, by {abs(match_sum) / max(num_drawn, 1):.2g} a token over "
                f"{num_drawn} tokens. Argmax and top-k are point masses: report probs=None",
            )
        )
    limits = torch.tensor([_chance(variance, budget) for variance in count_variance.tolist()])
    excess = counts.abs() - limits
    if num_drawn and excess.max() > 0:
        token = int(excess.argmax())
        findings.append(
            Finding(
                "reported probs",
                f"token {token} was drawn {counts[token]:+.0f} times against what the reported "
                f"probs say, over {num_drawn} tokens; chance explains {limits[token]:.0f}",
            )
        )
    return findings


def _chance(variance: float, budget: float) -> float:
    """Bound a sum of zero-mean increments of at most 1 with this variance, by Bernstein."""
    return budget / 3 + math.sqrt(budget * budget / 9 + 2 * budget * variance)


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

    The output distribution is computed exactly, with `verdict_distribution`, for chains and trees,
    deterministic, independent and without-replacement siblings, and several temperatures, and
    compared with the target's joint distribution over four positions.

    Args:
        engine: (target_probs, draft, *, uniforms, noise) -> Verdict. Its randomness must be what it
            is given; uniforms and noise are float64. All tensors are on the CPU: an adapter of a
            GPU engine moves them, and its verdict back.
        rule: the rule that the engine claims to implement.
        dtype: dtype of the probabilities; float32 is held to 1e-6, float64 to 1e-12.
        seed: seed of the random worlds.
        subject: its name in the report.
    """
    chosen = get_rule(rule)
    generator = torch.Generator().manual_seed(seed)
    findings: list[Finding] = []
    worst = 0.0
    cases = _cases(generator, dtype, chosen.supports_trees)
    for name, case, target in cases:
        verdicts = verdict_distribution(engine, case.target_probs, case.draft)
        bias = total_variation(emitted_joint(case, verdicts, target), target.joint())
        worst = max(worst, bias)
        if chosen.lossless and not bias <= TOLERANCE[dtype]:
            message = f"{name}: total variation to the target is {bias:.2g} over 4 positions"
            findings.append(Finding("losslessness", f"{message}, at most {TOLERANCE[dtype]:g}"))
        if verdicts.spread.numel() and verdicts.spread.max() > TOLERANCE[dtype]:
            message = f"{name}: a node's acceptance depends on uniforms of nodes judged elsewhere"
            findings.append(
                Finding("one number a node", f"{message} by {verdicts.spread.max():.2g}")
            )
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
    apart = engine(target_probs[some], ragged.map_rows(lambda t: t[some]), **moved)
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
