"""Put a rule, an engine adapter or a drafter through the checks that losslessness rests on.

Each check returns a `Report` that says in words what is violated and by how much:

    check_rule("block").raise_if_failed()
    check_engine(my_adapter, rule="token").raise_if_failed()
    check_drafter(lambda seed: my_drafter(prompt, seed)).raise_if_failed()
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import log

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from specdec.verify.checks import draft_faults, refuse
from specdec.verify.draft import Draft, Verdict
from specdec.verify.rules import Rule, get_rule, verify

__all__ = ["ConformanceError", "Finding", "Report", "check_drafter", "check_engine", "check_rule"]

# Called like `specdec.verify.verify`: (target_probs, draft, *, uniforms, noise) -> Verdict.
Engine = Callable[..., Verdict]
# The float64 distribution [V] after every prefix that is shorter than a horizon.
World = dict[tuple[int, ...], Tensor]

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
CHAIN_SHAPE = (-1, 0, 1)
TREE_SHAPES = ((-1, -1, 0, 0), (-1, 0, 0, 1), (-1, 0, -1, 2))
SIBLING_KINDS = ("deterministic", "independent", "without replacement")
PROCESSING = ((1.0, 1.0), (0.4, 0.8), (0.0, 1.0))  # temperature, top-p
_VOCAB_SIZE = 3
_HORIZON = 4  # emitted positions whose joint distribution is compared
_BITS = 53  # of a float64 in [0, 1)
_LARGEST = 1.0 - 2.0**-_BITS
_REJECTED_NOISE = 1e30


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
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Nothing was violated."""
        return not self.findings

    def __str__(self) -> str:
        """Return one line a finding, headed by the subject and the count of cases."""
        verdict = "passed" if self.passed else f"{len(self.findings)} violations"
        lines = [f"{self.subject}: {verdict} ({self.num_cases} cases)"]
        lines += [f"  violated: {finding}" for finding in self.findings]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def raise_if_failed(self) -> None:
        """Raise `ConformanceError` with the whole report if anything was violated."""
        if not self.passed:
            raise ConformanceError(str(self))


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
    chosen, most = get_rule(rule), TOLERANCE[dtype]
    generator = torch.Generator().manual_seed(seed)
    shapes = (CHAIN_SHAPE, *TREE_SHAPES) if chosen.supports_trees else (CHAIN_SHAPE,)
    cases = []
    for index, (shape, kind) in enumerate(product(shapes, SIBLING_KINDS)):
        temperature, top_p = PROCESSING[index % len(PROCESSING)]
        name = f"parents {shape}, {kind} siblings, temperature {temperature}, top-p {top_p}"
        target = random_world(_VOCAB_SIZE, _HORIZON, generator, dtype, temperature, top_p)
        drafter = random_world(_VOCAB_SIZE, _HORIZON, generator, dtype)
        case = build_case(target, drafter, shape, kind, dtype, as_chain=shape == CHAIN_SHAPE)
        cases.append((name, target, case))
    biases, findings = [], []
    for name, target, case in cases:
        verdicts = verdict_distribution(engine, case.target_probs, case.draft)
        biases.append(total_variation(emitted_joint(case, verdicts, target), joint(target)))
        broken = []
        if chosen.lossless and not biases[-1] <= most:
            message = f"total variation to the target is {biases[-1]:.2g} over 4 positions"
            broken.append(("losslessness", f"{message}, at most {most:g}"))
        if (spread := verdicts.spread.max().item()) > most:
            message = "a node's acceptance depends on uniforms of nodes judged elsewhere"
            broken.append(("one number a node", f"{message} by {spread:.2g}"))
        broken += _broken_contracts(engine, case, generator)
        findings += [Finding(check, f"{name}: {message}") for check, message in broken]
    note = f"lossy by declaration: total variation up to {max(biases):.2g}"
    return Report(subject, len(cases), tuple(findings), () if chosen.lossless else (note,))


def _broken_contracts(
    engine: Engine, case: "Case", generator: torch.Generator
) -> Iterator[tuple[str, str]]:
    """Check what holds for every draw: padding, neighbors, and the outputs' bookkeeping."""
    draft, target_probs = case.draft, case.target_probs
    lengths = torch.randint(0, draft.num_nodes + 1, draft.lengths.shape, generator=generator)
    real = replace(draft, lengths=lengths).real_nodes()
    ragged = replace(draft, lengths=lengths, tokens=draft.tokens.masked_fill(~real, -1))
    randomness = {
        "uniforms": torch.rand(real.shape, generator=generator, dtype=torch.float64),
        "noise": -torch.rand(target_probs[:, 0].shape, generator=generator).double().log(),
    }
    clean = engine(target_probs, ragged, **randomness)

    poisoned, probs = target_probs.clone(), draft.probs
    poisoned[:, 1:][~real] = torch.nan
    if probs is not None:
        probs = probs.masked_fill(~real.unsqueeze(2), torch.nan)
    dirty = engine(poisoned, replace(ragged, probs=probs), **randomness)
    changed = (clean.tokens != dirty.tokens).any(1)
    if changed.any():
        yield "padding", f"NaN past the length of row {int(changed.nonzero()[0])} changed it"

    some = torch.arange(draft.batch_size // 2 + 1).flip(0)
    moved = {key: value[some] for key, value in randomness.items()}
    apart = engine(target_probs[some], ragged.map_rows(lambda t: t[some]), **moved)
    changed = (apart.tokens != clean.tokens[some]).any(1)
    if changed.any():
        yield "neighbors", f"other rows in the batch change row {int(some[changed][0])}"

    on_path = torch.zeros_like(pad(real, (0, 1)))
    on_path = on_path.scatter(1, clean.path % (draft.num_nodes + 1), True)[:, :-1]
    if (on_path & ~clean.tested).any() or (clean.tested & ~real).any():
        yield "tested", "path, tested and real nodes are not nested"
    if not torch.equal((clean.tokens >= 0).sum(1), clean.num_accepted + 1):
        yield "tokens", "a row emits other than num_accepted + 1"


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
    first = drafts[0]
    notes: tuple[str, ...] = ()
    for seed, draft in enumerate(drafts):
        if (draft.probs is None) != (first.probs is None):
            finding = Finding("probs", f"seed {seed} and seed 0 disagree on reporting probs")
            return Report(subject, num_drafts, (finding,))
        try:
            refuse(draft_faults(draft, vocab_size), "any")
        except (ValueError, RuntimeError) as error:
            return Report(subject, num_drafts, (Finding("draft", f"seed {seed}: {error}"),))
        if draft.probs is None and not notes and not torch.equal(draft.tokens, first.tokens):
            cost = "lossless, but reporting probs would get more of them accepted"
            notes = (f"seeds 0 and {seed} drew other tokens and no probs are reported: {cost}",)
    if first.probs is None:
        return Report(subject, num_drafts, (), notes)

    rows = [
        (d.probs[d.real_nodes()], d.tokens[d.real_nodes()]) for d in drafts if d.probs is not None
    ]
    probs, tokens = (torch.cat(each).cpu() for each in zip(*rows, strict=True))
    probs = probs.double()  # [R, V]
    drawn = one_hot(tokens, vocab_size).double()
    expected = (probs * probs).sum(1)
    # Statistic v counts token v; the last one is how likely the drawn tokens are.
    excess = torch.cat([(drawn - probs).sum(0), ((drawn * probs).sum(1) - expected).sum()[None]])
    variance = (probs * (1 - probs)).sum(0), ((probs**3).sum(1) - expected**2).sum()[None]
    # Bernstein's inequality for martingales: increments are at most 1.
    budget = log(2 * (vocab_size + 1) / false_alarm)
    limits = budget / 3 + (budget * budget / 9 + 2 * budget * torch.cat(variance)).sqrt()
    is_off = excess.abs() > limits
    messages = []
    if is_off[-1]:
        messages.append(
            f"drawn tokens are {'more' if excess[-1] > 0 else 'less'} likely under the reported "
            f"probs than draws from them would be, by {excess[-1].abs() / len(probs):.2g} a token "
            f"over {len(probs)} tokens. Argmax and top-k are point masses: report probs=None"
        )
    if is_off[:-1].any():
        token = int((excess.abs() - limits)[:-1].argmax())
        messages.append(
            f"token {token} was drawn {excess[token]:+.0f} times against what the reported probs "
            f"say, over {len(probs)} tokens; chance explains {limits[token]:.0f}"
        )
    findings = tuple(Finding("reported probs", message) for message in messages)
    return Report(subject, num_drafts, findings)


@dataclass(frozen=True, eq=False)
class VerdictDistribution:
    """The behavior of a rule on each draft row, over all its randomness.

    Attributes:
        spread: [B, N] float64, how far the thresholds of one node lie apart between contexts; 0 for
            a rule that judges each node by one number.
        paths: [B, K, D] accepted nodes of each of the K outcomes, -1 padded; outcomes may repeat.
        probs: [B, K] float64 probability of the outcome.
        last_probs: [B, K, V] float64 distribution of the last token given the outcome.
    """

    spread: Tensor
    paths: Tensor
    probs: Tensor
    last_probs: Tensor


def verdict_distribution(engine: Engine, target_probs: Tensor, draft: Draft) -> VerdictDistribution:
    """Integrate out the uniforms and the noise of `engine` for every row of a small draft."""
    (batch_size, num_nodes), vocab_size = draft.tokens.shape, target_probs.shape[2]
    accept = torch.tensor(list(product((True, False), repeat=num_nodes))).view(-1, num_nodes)
    num_patterns = len(accept)  # K, all decisions about N nodes

    def run(uniforms: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Judge as many copies of each row as there is randomness: the paths and last tokens."""
        copies = len(noise) // batch_size
        verdict = engine(
            target_probs.repeat_interleave(copies, 0),
            draft.map_rows(lambda tensor: tensor.repeat_interleave(copies, 0)),
            uniforms=uniforms,
            noise=noise,
        )
        return verdict.path, verdict.tokens.gather(1, verdict.num_accepted.unsqueeze(1)).squeeze(1)

    # Each node's uniform is bisected in every context of the others' extremes, [B * N * K].
    contexts = (accept.double() * _LARGEST).repeat(batch_size * num_nodes, 1)
    column = torch.arange(num_nodes).repeat_interleave(num_patterns).repeat(batch_size).unsqueeze(1)
    even = torch.ones(len(contexts), vocab_size, dtype=torch.float64)

    def path_at(value: Tensor) -> Tensor:
        return run(contexts.scatter(1, column, value.unsqueeze(1)), even)[0]

    largest = torch.full((len(contexts),), _LARGEST, dtype=torch.float64)
    accepted = path_at(torch.zeros_like(largest))
    decides = (accepted != path_at(largest)).any(1)
    _, high = _bisect(lambda middle: (path_at(middle) == accepted).all(1), largest)
    found = torch.where(decides, high, torch.nan).view(batch_size, num_nodes, num_patterns)
    is_idle = found.isnan().all(2)  # the node never decides anything
    top = found.nan_to_num(-1.0).amax(2)
    spread = (top - found.nan_to_num(2.0).amin(2)).masked_fill(is_idle, 0.0)

    cut = top.masked_fill(is_idle, 0.5).unsqueeze(1)  # [B, 1, N]
    probs = torch.where(accept, cut, 1 - cut).prod(2)
    uniforms = torch.where(accept, cut / 2, (cut + 1) / 2).clamp(max=_LARGEST).flatten(0, 1)

    # The noise of each token is bisected against that of the likeliest one, [B * K * V].
    paths, likeliest = run(uniforms, torch.ones(len(uniforms), vocab_size, dtype=torch.float64))
    likeliest = likeliest.repeat_interleave(vocab_size)
    tokens = torch.arange(vocab_size).repeat(len(uniforms))
    noise = torch.full((len(tokens), vocab_size), _REJECTED_NOISE, dtype=torch.float64)
    noise.scatter_(1, likeliest.unsqueeze(1), 1.0)
    repeated = uniforms.repeat_interleave(vocab_size, 0)

    def wins(middle: Tensor) -> Tensor:
        return run(repeated, noise.scatter(1, tokens[:, None], middle[:, None]))[1] == tokens

    low, _ = _bisect(wins, torch.ones(len(tokens), dtype=torch.float64))
    ratio = torch.where(likeliest == tokens, 1.0, low).view(batch_size, num_patterns, vocab_size)
    last_probs = ratio / ratio.sum(2, keepdim=True)
    return VerdictDistribution(spread, paths.view(*probs.shape, -1), probs, last_probs)


def _bisect(is_below: Callable[[Tensor], Tensor], high: Tensor) -> tuple[Tensor, Tensor]:
    """Enclose, for each entry of `high`, where `is_below` turns false between 0 and `high`."""
    low = torch.zeros_like(high)
    for _ in range(_BITS):
        middle = (low + high) / 2
        below = is_below(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low, high


def random_world(
    vocab_size: int,
    horizon: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> World:
    """Draw random logits after every prefix, and see them as `dtype`; temperature 0 is one-hot."""
    world = {}
    for length in range(horizon):
        for prefix in product(range(vocab_size), repeat=length):
            logits = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
            row = one_hot(logits.argmax(), vocab_size).double()
            if temperature > 0:
                row = torch.softmax(logits / temperature, 0)
                ranked, order = row.sort(descending=True)
                row[order[ranked.cumsum(0) - ranked >= top_p]] = 0
            row = (row / row.sum()).to(dtype).double()
            world[prefix] = row / row.sum()
    return world


def joint(world: World, prefix: tuple[int, ...] = ()) -> Tensor:
    """Compute the distribution of the tokens after `prefix`, up to the horizon: [V, ..., V]."""
    if prefix not in world:
        return torch.ones((), dtype=torch.float64)
    row = world[prefix]
    return torch.stack([row[token] * joint(world, (*prefix, token)) for token in range(len(row))])


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
    drafts = list(_realizations(drafter, shape, kind))
    nodes = range(-1, len(shape))
    rows = [[target[_spell(shape, tokens, node)] for node in nodes] for tokens, _, _ in drafts]
    tokens = torch.tensor([tokens for tokens, _, _ in drafts])
    probs = None
    if kind != "deterministic":
        probs = torch.stack([torch.stack(rows) for _, rows, _ in drafts]).to(dtype)
    depth = max(len(_spell(shape, shape, node)) for node in nodes)
    draft = Draft.tree(tokens, torch.tensor(shape), depth=depth, probs=probs)
    if as_chain:
        draft = Draft.chain(tokens, probs=probs)
    weights = torch.tensor([weight for _, _, weight in drafts], dtype=torch.float64)
    return Case(draft, torch.stack([torch.stack(row) for row in rows]).to(dtype), weights)


def _spell(shape: tuple[int, ...], tokens: tuple[int, ...], node: int) -> tuple[int, ...]:
    """Spell the tokens from the root's child down to `node`."""
    return () if node < 0 else (*_spell(shape, tokens, shape[node]), tokens[node])


def _realizations(
    drafter: World,
    shape: tuple[int, ...],
    kind: str,
    tokens: tuple[int, ...] = (),
    rows: tuple[Tensor, ...] = (),
    weight: float = 1.0,
) -> Iterator[tuple[tuple[int, ...], tuple[Tensor, ...], float]]:
    """List tokens, distribution of each node, and probability of every draft of the drafter."""
    node = len(tokens)
    if node == len(shape):
        yield tokens, rows, weight
        return
    earlier = [tokens[i] for i in range(node) if shape[i] == shape[node]]
    row = drafter[_spell(shape, tokens, shape[node])]
    if kind == "deterministic":  # the drafter's best tokens in order
        row = one_hot(row.argsort(descending=True)[len(earlier)], len(row)).double()
    elif kind == "without replacement" and earlier:
        left = row.index_fill(0, torch.tensor(earlier), 0)
        if left.sum() == 0:  # the drafter has run out of tokens: any true distribution will do
            left = torch.ones_like(row).index_fill(0, torch.tensor(earlier), 0)
        row = left / left.sum()
    for token in row.nonzero().flatten().tolist():
        grown = (*tokens, token), (*rows, row), weight * row[token].item()
        yield from _realizations(drafter, shape, kind, *grown)


def emitted(case: Case, verdicts: VerdictDistribution, row: int) -> dict[tuple[int, ...], float]:
    """Compute the probability of the tokens that one step can emit for one draft."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    tokens = case.draft.tokens[row].tolist()
    outcomes = (
        each[row].tolist() for each in (verdicts.paths, verdicts.probs, verdicts.last_probs)
    )
    for path, prob, last_probs in zip(*outcomes, strict=True):
        prefix = tuple(tokens[node] for node in path if node >= 0)
        for token, share in enumerate(last_probs):
            found[(*prefix, token)] += prob * share
    return found


def emitted_joint(case: Case, verdicts: VerdictDistribution, target: World) -> Tensor:
    """Compute the distribution of the first tokens, up to the horizon, when a rule emits them.

    What the rule does not emit is sampled from the target afterwards.
    """
    total: dict[tuple[int, ...], float] = defaultdict(float)
    for row, weight in enumerate(case.weights.tolist()):
        for tokens, prob in emitted(case, verdicts, row).items():
            total[tokens] += weight * prob
    found = torch.zeros_like(joint(target))
    for tokens, prob in total.items():
        found[tokens] += prob * joint(target, tokens)
    return found


def total_variation(first: Tensor, second: Tensor) -> float:
    """Compute half the absolute difference of two distributions."""
    return 0.5 * (first - second).abs().sum().item()
