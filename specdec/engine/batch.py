"""A running batch: the loop owns the tokens, the target and the drafter their caches."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.engine.clock import ForwardClock
from specdec.engine.draft_length import DraftLength
from specdec.engine.interfaces import (
    Drafter,
    HoldsCache,
    Target,
    TargetOutput,
    cache_owners,
    release,
)
from specdec.engine.metrics import StepRecord
from specdec.engine.request import Request
from specdec.registry import is_registered
from specdec.sampling.config import fit
from specdec.sampling.randomness import row_exponentials, row_uniforms
from specdec.sampling.sampler import Sampler, sample
from specdec.verify import Draft, Rule, Verdict, get_rule, match, verify
from specdec.verify.checks import Fault, check_draft, draft_faults, refuse
from specdec.verify.tree import node_depths


@dataclass(frozen=True)
class HostStep:
    """The values of a step that the host needs, one entry a row.

    Attributes:
        tokens: that the verdict adds; none in a row that is not finite.
        num_accepted: draft tokens of them.
        num_drafted: nodes of the draft.
        depth_tested: levels that were judged.
        is_finite: whether all logits that were looked at are numbers.
    """

    tokens: list[list[int]]
    num_accepted: list[int]
    num_drafted: list[int]
    depth_tested: list[int]
    is_finite: list[bool]

    @classmethod
    def fetch(cls, packed: Tensor) -> "HostStep":
        """Bring what `pack` made to the host: the one synchronisation of a step."""
        values = packed.tolist()
        return cls(
            tokens=[row[4 : 5 + row[0]] if row[3] else [] for row in values],
            num_accepted=[row[0] for row in values],
            num_drafted=[row[1] for row in values],
            depth_tested=[row[2] for row in values],
            is_finite=[bool(row[3]) for row in values],
        )


def pack(verdict: Verdict, draft: Draft, healthy: Tensor) -> Tensor:
    """What the host needs of a step, [B, 4 + D + 1]: three counts, health [B], and the tokens."""
    if draft.parents is None or not draft.num_nodes:
        depth_tested = verdict.tested.sum(1)
    else:
        depths = node_depths(draft.parents, draft.depth)
        depth_tested = (depths * verdict.tested).amax(1)
    counts = [verdict.num_accepted, draft.lengths, depth_tested, healthy]
    return torch.cat([torch.stack(counts, 1), verdict.tokens], 1)


# Streams of the per-row randomness; drafters take theirs from 16 upwards.
UNIFORM_STREAM, NOISE_STREAM = 0, 1
# The rule under which the loop samples every node itself.
MATCH = "match"
BUDGET = "no more nodes may be drafted than the row's budget"


class Batch:
    """Rows that share every forward: they join when there is room and leave when they finish."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        rule: str | Rule,
        draft_length: DraftLength | None = None,
        check: bool = False,
    ) -> None:
        self.target, self.drafter = target, drafter
        self.rule = MATCH if get_rule(rule).judge is None else rule
        self.draft_length = draft_length
        self.taps = drafter.taps if drafter else ()
        self._checks = drafter is not None and (check or not is_registered(drafter))
        self.owners = cache_owners(target, drafter)
        for i, owner in enumerate(self.owners):
            if any(owner is other for other in self.owners[:i]):
                raise ValueError(
                    f"this {type(owner).__name__} is there twice, as target, drafter or inside of "
                    "one, but has one cache; load it once more for the second place"
                )
        self.rows: list[Request] = []
        self._verifying = ForwardClock(target.device)
        self._committing = ForwardClock(target.device)

    def admit(self, requests: list[Request]) -> None:
        """Cache the prompts, sample their first tokens and let them join the running rows.

        A request that begins again is cached with its tokens; the last of them is its root.
        """
        started = time.perf_counter()
        cached = [[*row.prompt, *row.tokens[:-1]] for row in requests]
        is_running = bool(self.rows)
        sampler = self._make_sampler(requests)
        output = self.target.prefill(cached, self.taps, join=is_running)
        num_committed = torch.tensor([len(tokens) for tokens in cached], device=self.target.device)
        scores = sampler.scores(output.logits)[:, 0]
        last = [row.tokens[-1] if row.tokens else -1 for row in requests]
        known = torch.tensor(last, device=self.target.device)
        new = self._draw(sampler, scores, num_committed).masked_fill(known >= 0, -1)
        root = torch.maximum(new, known)
        tokens, finite = torch.stack([root, scores.amax(-1).isfinite().long()]).tolist()
        _fail_what_is_nan(requests, finite)
        sampler.observe(new.unsqueeze(1))
        if self.drafter:
            begun = [[*before, token] for before, token in zip(cached, tokens, strict=True)]
            self.drafter.begin(begun, output, sampler, join=is_running)
            self.drafter.clock.take()
        self.target.clock.take()
        for row, token in zip(requests, tokens, strict=True):
            row.started = row.started or started
            if not row.error and not row.tokens:
                row.accept([token])
        self._join(requests, sampler, root, num_committed + 1)

    def _draw(self, sampler: Sampler, scores: Tensor, num_committed: Tensor) -> Tensor:
        """A token [B] behind every row, from scores [B, V]."""
        if sampler.is_greedy:
            return scores.argmax(-1)
        probs = sampler.probs(scores.unsqueeze(1))[:, 0]
        return sample(probs, self._noise(sampler, num_committed))

    def _join(
        self, requests: list[Request], sampler: Sampler, root: Tensor, num_committed: Tensor
    ) -> None:
        if not self.rows:
            self.rows, self.sampler, self.root = list(requests), sampler, root
            # Committed tokens of every row: the counter that its randomness is drawn from.
            self.num_committed = num_committed
            return
        self.rows = [*self.rows, *requests]
        self.sampler = self._make_sampler(self.rows)
        self.root = torch.cat([self.root, root])
        self.num_committed = torch.cat([self.num_committed, num_committed])

    def _make_sampler(self, rows: list[Request]) -> Sampler:
        """The sampler of these rows, told what they have emitted so far."""
        target = self.target
        configs, prompts = [row.sampling for row in rows], [row.prompt for row in rows]
        shared = NOISE_STREAM if self.rule == MATCH else None
        sampler = Sampler(
            configs, target.vocab_size, target.device, prompts, target.eos_token_ids, shared
        )
        longest = max(len(row.tokens) for row in rows)
        if longest and not sampler.is_plain:
            padded = [row.tokens + [-1] * (longest - len(row.tokens)) for row in rows]
            sampler.observe(torch.tensor(padded, device=target.device))
        return sampler

    def step(self) -> None:
        """One draft, one target forward, one verdict."""
        started = time.perf_counter()
        rows = self.rows
        draft, faults, can_be = self._propose()
        output = self.target.score(self.root, draft, self.taps)
        with self._verifying.forward():
            verdict, healthy = self._judge(output, draft)
            packed = pack(verdict, draft, healthy if can_be is None else healthy & can_be)
        host = HostStep.fetch(packed)
        if faults and not all(host.is_finite):
            with self._blaming_the_drafter():
                refuse(faults, get_rule(self.rule).name)
        _fail_what_is_nan(rows, host.is_finite)
        drafting_s = self._drafter_s()
        with self._committing.forward():
            self._commit(verdict, host, output)
        kept = [row.accept(new) for row, new in zip(rows, host.tokens, strict=True)]
        observing_s = self._drafter_s()
        times = {
            "draft_s": drafting_s + observing_s,
            "target_s": self.target.clock.take(),
            "verify_s": self._verifying.take(),
            # The drafter's forwards in `observe` are drafting.
            "commit_s": max(0.0, self._committing.take_completed() - observing_s),
            "wall_s": time.perf_counter() - started,
        }
        healthy_rows = [i for i, row in enumerate(rows) if not row.error]
        for i in healthy_rows:
            rows[i].records.append(
                StepRecord(
                    prompt=rows[i].index,
                    step=len(rows[i].records),
                    batch_size=len(rows),
                    num_drafted=host.num_drafted[i],
                    num_accepted=kept[i] - 1,
                    depth_tested=max(host.depth_tested[i], kept[i] - 1),
                    num_emitted=kept[i],
                    **times,
                )
            )
        if self.draft_length and healthy_rows:
            self.draft_length.learn([rows[i].records[-1] for i in healthy_rows])

    def _drafter_s(self) -> float:
        return self.drafter.clock.take() if self.drafter else 0.0

    def _propose(self) -> tuple[Draft, list[Fault], Tensor | None]:
        """A draft and, where drafts are checked, all faults that it may have, and rows without."""
        if self.drafter is None:
            return Draft.empty(len(self.rows), self.target.device), [], None
        limit = self.drafter.max_nodes
        chosen = self.draft_length.choose(len(self.rows)) if self.draft_length else None
        chosen = fit("what draft_length chose", chosen, int | None)
        if chosen is not None and chosen < 0:
            raise ValueError(f"draft_length chose {chosen} nodes but must choose 0 or more")
        limit = limit if chosen is None else min(limit, chosen)
        budget = [min(row.budget, limit) for row in self.rows]
        draft = self.drafter.propose(self.root, budget, self.sampler)
        if not self._checks:
            return draft, [], None
        with self._blaming_the_drafter():
            return self._checked(draft, budget)

    def _checked(self, draft: Draft, budget: list[int]) -> tuple[Draft, list[Fault], Tensor]:
        """Empty the rows that cannot be, so that no forward meets them; waits for no device.

        What was wrong is told once the step's one synchronisation has shown that something was.
        """
        drafter, vocab_size, device = self.drafter, self.target.vocab_size, self.target.device
        assert drafter is not None
        check_draft(draft, len(self.rows), vocab_size, device, get_rule(self.rule).name)
        if draft.num_nodes > drafter.max_nodes:
            raise ValueError(f"it has {draft.num_nodes} nodes but max_nodes is {drafter.max_nodes}")
        if draft.parents is not None and not drafter.makes_trees:
            raise ValueError("it has parents but the drafter's makes_trees is False")
        draft = replace(draft, depth=min(draft.depth, draft.num_nodes))
        over = draft.lengths > torch.tensor(budget, device=device)
        faults = [*draft_faults(draft, vocab_size), ("lengths", over, draft.lengths, BUDGET)]
        masks = [mask.unsqueeze(-1).flatten(1).any(1) for _, mask, _, _ in faults]
        can_be = ~torch.stack(masks).any(0)  # [B]
        draft = replace(draft, lengths=draft.lengths.masked_fill(~can_be, 0))
        padding = ~draft.real_nodes()
        parents = None if draft.parents is None else draft.parents.masked_fill(padding, -1)
        tokens = draft.tokens.masked_fill(padding, -1)
        return replace(draft, tokens=tokens, parents=parents), faults, can_be

    @contextmanager
    def _blaming_the_drafter(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError) as error:
            name = type(self.drafter).__name__
            raise type(error)(f"{name} proposed what is no draft: {error}") from error

    def _judge(self, output: TargetOutput, draft: Draft) -> tuple[Verdict, Tensor]:
        scores = self.sampler.scores(output.logits, draft)
        best, sampled = scores.max(-1)  # [B, N + 1]; a NaN wins the maximum
        # Rows past a draft's length hold anything; only real ones must be finite.
        healthy = best.isfinite() | (
            torch.arange(best.shape[1], device=best.device) > draft.lengths.unsqueeze(1)
        )
        if self.sampler.is_greedy:
            return match(sampled, draft), healthy.all(1)
        probs = self.sampler.probs(scores)
        if self.rule == MATCH:
            return match(sample(probs, self._noise_by_node(draft)), draft), healthy.all(1)
        uniforms = row_uniforms(
            self.sampler.seeds, self.num_committed, UNIFORM_STREAM, draft.num_nodes
        )
        verdict = verify(
            probs,
            draft,
            rule=self.rule,
            uniforms=uniforms,
            noise=self._noise(self.sampler, self.num_committed),
            check=False,
        )
        return verdict, healthy.all(1)

    def _noise(self, sampler: Sampler, num_committed: Tensor) -> Tensor:
        size = self.target.vocab_size
        return row_exponentials(sampler.seeds, num_committed, NOISE_STREAM, size)

    def _noise_by_node(self, draft: Draft) -> Tensor:
        """Noise [B, N + 1, V] by position, so that a token's draw knows nothing of the draft."""
        if draft.parents is None:
            depths = torch.arange(draft.num_nodes, device=self.root.device) + 1
            depths = depths.expand(draft.batch_size, -1)
        else:
            depths = node_depths(draft.explicit_parents(), draft.depth)
        positions = self.num_committed.unsqueeze(1) + pad(depths, (1, 0))  # [B, N + 1]
        seeds = self.sampler.seeds.unsqueeze(1).expand_as(positions)
        size = self.target.vocab_size
        noise = row_exponentials(seeds.flatten(), positions.flatten(), NOISE_STREAM, size)
        return noise.view(*positions.shape, size)

    def _commit(self, verdict: Verdict, host: HostStep, output: TargetOutput) -> None:
        self.target.commit(verdict, host.num_accepted)
        self.sampler.observe(verdict.tokens)
        if self.drafter:
            self.drafter.observe(verdict, host.tokens, output.hidden)
        self.root = verdict.tokens.gather(1, verdict.num_accepted.unsqueeze(1)).squeeze(1)
        self.num_committed = self.num_committed + verdict.num_accepted + 1

    def forget(self) -> None:
        """Drop all rows; those admitted next begin a new batch, whatever state caches are in."""
        self.rows = []
        release(self.owners, self)

    def retire(self) -> None:
        """Let finished rows leave the batch; the last rows move into their places."""
        stay = [i for i, row in enumerate(self.rows) if not row.finish_reason]
        if not stay:
            self.forget()
        if len(stay) == len(self.rows):
            return
        failed = [i for i, row in enumerate(self.rows) if row.error]
        behind = [i for i in stay if i >= len(stay)]
        stay = [i if i in stay else behind.pop() for i in range(len(stay))]
        self.rows = [self.rows[i] for i in stay]
        rows = torch.tensor(stay, device=self.target.device)
        self._wipe(failed)
        self.target.reorder(rows)
        self.sampler.keep(rows)
        if self.drafter:
            self.drafter.reorder(rows)
        self.root, self.num_committed = self.root[rows], self.num_committed[rows]

    def _wipe(self, failed: list[int]) -> None:
        """Zero the keys and values of failed rows: NaN times a masked place's zero is NaN."""
        for owner in (self.target, self.drafter):
            if failed and isinstance(owner, HoldsCache):
                owner.wipe(failed)


def _fail_what_is_nan(rows: list[Request], finite: Sequence[int]) -> None:
    for row, is_finite in zip(rows, finite, strict=True):
        if not is_finite:
            row.fail(
                f"prompt {row.index}, token {len(row.tokens)}: the target's logits are NaN or "
                "infinite, or the sampling settings ban every token; check the weights, or "
                "load with dtype float32 or bfloat16"
            )
