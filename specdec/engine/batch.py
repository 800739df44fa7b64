"""A running batch: the loop owns the tokens, the target and the drafter their caches."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from specdec.common.arguments import fit
from specdec.engine.draft_length import DraftLength
from specdec.engine.interfaces import (
    CatchesUp,
    Drafter,
    HoldsCache,
    PrefillsInParts,
    Target,
    cache_owners,
    release,
)
from specdec.engine.judge import NOISE_STREAM, Judge
from specdec.engine.metrics import ForwardClock, StepRecord
from specdec.engine.request import Request
from specdec.registry import is_registered
from specdec.sampling.randomness import row_exponentials
from specdec.sampling.sampler import Sampler, sample
from specdec.verify import Draft, Rule, get_rule
from specdec.verify.checks import Fault, check_shapes, draft_faults, refuse

BUDGET = "no more nodes may be drafted than the row's budget"


class Batch:
    """Rows that share every forward: they join when there is room and leave when they finish.

    Attributes:
        rows: the running requests.
        half_read: requests that wait, of whose prompts a part is cached.
        sampler: their settings and contexts.
        root: [B] int64, the last token of every row.
        num_committed: [B] int64 committed tokens, the counter of each row's randomness.
    """

    sampler: Sampler
    root: Tensor
    num_committed: Tensor

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        rule: str | Rule,
        draft_length: DraftLength | None = None,
        check: bool = False,
    ) -> None:
        self.target, self.drafter, self.draft_length = target, drafter, draft_length
        self.rule = get_rule(rule)
        self.taps = drafter.taps if drafter else ()
        self._checks_drafts = drafter is not None and (check or not is_registered(drafter))
        self.owners = cache_owners(target, drafter)
        for owner in self.owners:
            if sum(owner is other for other in self.owners) > 1:
                raise ValueError(
                    f"this {type(owner).__name__} is there twice, as target, drafter or inside of "
                    "one, but has one cache; load it once more for the second place"
                )
        is_compiled = getattr(target, "compile_mode", "eager") == "inductor"
        self._judge = Judge(self.rule, is_compiled)
        self.rows: list[Request] = []
        self.half_read: list[Request] = []
        self._verify_clock = ForwardClock(target.device)
        self._commit_clock = ForwardClock(target.device)

    def prefill_ahead(self, requests: list[Request], num_tokens: int) -> bool:
        """Cache the next part of prompts that will join the running rows.

        Returns False, and leaves the rest to `admit`, where that is no more than a part, or where
        no row would wait for it.
        """
        target, started = self.target, time.perf_counter()
        if not self.rows or not isinstance(target, PrefillsInParts):
            return False
        cached = [[*row.prompt, *row.tokens[:-1]] for row in requests]
        if not target.prefill_ahead(cached, self.taps, num_tokens):
            return False
        target.clock.take()
        self.half_read = requests
        for row in requests:
            row.started = row.started or started
        return True

    def _forget_ahead(self) -> None:
        if self.half_read and isinstance(self.target, PrefillsInParts):
            self.target.prefill_ahead([], (), 0)
        self.half_read = []

    def admit(self, requests: list[Request]) -> None:
        """Cache the prompts, sample their first tokens and let them join the running rows.

        A request that was preempted is cached with its tokens; the last of them is its root.
        """
        started = time.perf_counter()
        cached = [[*row.prompt, *row.tokens[:-1]] for row in requests]
        joins, device = bool(self.rows), self.target.device
        sampler = self._make_sampler(requests)
        output = self.target.prefill(cached, self.taps, join=joins)
        self.half_read = []
        num_committed = torch.tensor([len(tokens) for tokens in cached], device=device)
        scores = sampler.scores(output.logits)
        if sampler.is_greedy:
            drawn = scores[:, 0].argmax(-1)
        else:
            noise = self._noise(sampler.seeds, num_committed)
            drawn = sample(sampler.probs(scores)[:, 0], noise)
        last = [row.tokens[-1] if row.tokens else -1 for row in requests]
        known = torch.tensor(last, device=device)
        new = drawn.masked_fill(known >= 0, -1)
        root = torch.maximum(new, known)
        is_finite = scores[:, 0].amax(-1).isfinite().long()
        tokens, healthy = torch.stack([root, is_finite]).tolist()
        _fail_not_finite(requests, healthy)
        sampler.observe(new.unsqueeze(1))
        if self.drafter:
            begun = [[*before, token] for before, token in zip(cached, tokens, strict=True)]
            self.drafter.begin(begun, output, sampler, join=joins)
            if self.draft_length is None and isinstance(self.drafter, CatchesUp):
                self.drafter.catch_up()  # time of the prompt, and not of the first step
            self.drafter.clock.take()
        self.target.clock.take()
        for row, token in zip(requests, tokens, strict=True):
            row.started = row.started or started
            if not row.error and not row.tokens:
                row.accept([token])
        num_committed = num_committed + 1
        if joins:
            sampler = self._make_sampler([*self.rows, *requests])
            root = torch.cat([self.root, root])
            num_committed = torch.cat([self.num_committed, num_committed])
        self.rows = [*self.rows, *requests]
        self.sampler, self.root, self.num_committed = sampler, root, num_committed

    def _make_sampler(self, rows: list[Request]) -> Sampler:
        """Build the sampler of these rows, with what they have emitted so far."""
        target = self.target
        configs, prompts = [row.sampling for row in rows], [row.prompt for row in rows]
        shared = NOISE_STREAM if self.rule.judge is None else None  # rule "match"
        sampler = Sampler(
            configs, target.vocab_size, target.device, prompts, target.eos_token_ids, shared
        )
        longest = max(len(row.tokens) for row in rows)
        if longest and not sampler.is_plain:
            padded = [row.tokens + [-1] * (longest - len(row.tokens)) for row in rows]
            sampler.observe(torch.tensor(padded, device=target.device))
        return sampler

    def step(self) -> None:
        """Run one draft, one target forward and one verdict."""
        started = time.perf_counter()
        draft, faults, is_valid = self._propose()
        output = self.target.score(self.root, draft, self.taps)
        with self._verify_clock.forward():
            verdict, packed = self._judge(self.sampler, output.logits, draft, self.num_committed)
            if is_valid is not None:
                packed[:, 3] *= is_valid
            figures, tokens = _to_host(packed)
        num_accepted, num_drafted, depth_tested, healthy = figures
        if faults and not all(healthy):
            with self._blaming_the_drafter():
                refuse(faults, self.rule.name)
        _fail_not_finite(self.rows, healthy)
        drafting_s = self.drafter.clock.take() if self.drafter else 0.0
        with self._commit_clock.forward():
            self.target.commit(verdict, num_accepted)
            self.sampler.observe(verdict.tokens)
            if self.drafter:
                self.drafter.observe(verdict, tokens, output.hidden)
            self.root = verdict.tokens.gather(1, verdict.num_accepted.unsqueeze(1)).squeeze(1)
            self.num_committed = self.num_committed + verdict.num_accepted + 1
        observing_s = self.drafter.clock.take() if self.drafter else 0.0
        kept = [row.accept(new) for row, new in zip(self.rows, tokens, strict=True)]
        times = {
            "draft_s": drafting_s + observing_s,
            "target_s": self.target.clock.take(),
            "verify_s": self._verify_clock.take(),
            # The drafter's forwards in `observe` are drafting.
            "commit_s": max(0.0, self._commit_clock.take(wait=False) - observing_s),
            "wall_s": time.perf_counter() - started,
        }
        records = []
        for i, row in enumerate(self.rows):
            if not row.error:
                record = StepRecord(
                    prompt=row.index,
                    step=len(row.records),
                    batch_size=len(self.rows),
                    num_drafted=num_drafted[i],
                    num_accepted=kept[i] - 1,
                    depth_tested=max(depth_tested[i], kept[i] - 1),
                    num_emitted=kept[i],
                    num_accepted_raw=num_accepted[i],
                    **times,
                )
                row.records.append(record)
                records.append(record)
        if self.draft_length and records:
            self.draft_length.learn(records)

    def _propose(self) -> tuple[Draft, list[Fault], Tensor | None]:
        """Ask for a draft; where it is checked, also return its possible faults and valid rows."""
        if self.drafter is None:
            return Draft.empty(len(self.rows), self.target.device), [], None
        limit = self.drafter.max_nodes
        if self.draft_length:
            chosen = self.draft_length.choose(len(self.rows))
            chosen = fit("what draft_length chose", chosen, int | None)
            if chosen is not None and chosen < 0:
                raise ValueError(f"draft_length chose {chosen} nodes but must choose 0 or more")
            limit = limit if chosen is None else min(limit, chosen)
        budget = [min(row.budget, limit) for row in self.rows]
        draft = self.drafter.propose(self.root, budget, self.sampler)
        if not self._checks_drafts:
            return draft, [], None
        with self._blaming_the_drafter():
            return self._check(draft, budget, self.drafter)

    def _check(
        self, draft: Draft, budget: list[int], drafter: Drafter
    ) -> tuple[Draft, list[Fault], Tensor]:
        """Empty the rows that cannot be, so that no forward meets them; waits for no device.

        The faults are told once the step's one synchronization has shown that there is one.
        """
        vocab_size, device = self.target.vocab_size, self.target.device
        check_shapes(draft, self.rule.name, len(self.rows), vocab_size, device)
        if draft.num_nodes > drafter.max_nodes:
            raise ValueError(f"it has {draft.num_nodes} nodes but max_nodes is {drafter.max_nodes}")
        if draft.parents is not None and not drafter.makes_trees:
            raise ValueError("it has parents but the drafter's makes_trees is False")
        draft = replace(draft, depth=min(draft.depth, draft.num_nodes))
        over = draft.lengths > torch.tensor(budget, device=device)
        faults = [*draft_faults(draft, vocab_size), ("lengths", over, draft.lengths, BUDGET)]
        masks = [mask.unsqueeze(-1).flatten(1).any(1) for _, mask, _, _ in faults]
        is_valid = ~torch.stack(masks).any(0)  # [B]
        draft = replace(draft, lengths=draft.lengths.masked_fill(~is_valid, 0))
        padding = ~draft.real_nodes()
        parents = None if draft.parents is None else draft.parents.masked_fill(padding, -1)
        tokens = draft.tokens.masked_fill(padding, -1)
        return replace(draft, tokens=tokens, parents=parents), faults, is_valid

    @contextmanager
    def _blaming_the_drafter(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError) as error:
            name = type(self.drafter).__name__
            raise type(error)(f"{name} proposed what is no draft: {error}") from error

    def _noise(self, seeds: Tensor, counters: Tensor) -> Tensor:
        return row_exponentials(seeds, counters, NOISE_STREAM, self.target.vocab_size)

    def clear(self) -> None:
        """Drop all rows; those admitted next begin a new batch, whatever state caches are in."""
        self._forget_ahead()
        self.rows = []
        release(self.owners, self)

    def retire(self) -> None:
        """Let finished rows leave the batch; the last rows move into their places."""
        if any(row.finish_reason for row in self.half_read):
            self._forget_ahead()
        stay = [i for i, row in enumerate(self.rows) if not row.finish_reason]
        if not stay:  # what is half read stays: it begins the next batch
            self.rows = []
            release(self.owners, self)
        if len(stay) == len(self.rows):
            return
        failed = [i for i, row in enumerate(self.rows) if row.error]
        behind, staying = [i for i in stay if i >= len(stay)], set(stay)
        stay = [i if i in staying else behind.pop() for i in range(len(stay))]
        for owner in (self.target, self.drafter):
            if failed and isinstance(owner, HoldsCache):
                owner.wipe(failed)  # NaN times a masked place's zero is NaN
        self.rows = [self.rows[i] for i in stay]
        rows = torch.tensor(stay, device=self.target.device)
        self.target.reorder(rows)
        self.sampler.keep(rows)
        if self.drafter:
            self.drafter.reorder(rows)
        self.root, self.num_committed = self.root[rows], self.num_committed[rows]


def _to_host(packed: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Bring four figures and the new tokens of every row to the host, a step's one synchronization.

    A row that is not healthy has no tokens.
    """
    values = packed.tolist()
    tokens = [row[4 : 5 + row[0]] if row[3] else [] for row in values]
    return [[row[column] for row in values] for column in range(4)], tokens


def _fail_not_finite(rows: list[Request], is_finite: Sequence[int]) -> None:
    for row, is_number in zip(rows, is_finite, strict=True):
        if not is_number:
            row.fail(
                f"prompt {row.index}, token {len(row.tokens)}: the target's logits are NaN or "
                "infinite, or all tokens are banned; check the weights, or load as float32"
            )
