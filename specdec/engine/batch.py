"""A running batch: the loop owns the tokens, the target and the drafter their caches."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.common.arguments import fit
from specdec.engine.clock import ForwardClock
from specdec.engine.draft_length import DraftLength
from specdec.engine.interfaces import Drafter, HoldsCache, Target, cache_owners, release
from specdec.engine.metrics import StepRecord
from specdec.engine.request import Request
from specdec.registry import is_registered
from specdec.sampling.randomness import row_exponentials, row_uniforms
from specdec.sampling.sampler import Sampler, sample
from specdec.verify import Draft, Rule, Verdict, get_rule, match, verify
from specdec.verify.checks import Fault, check_draft, draft_faults, refuse
from specdec.verify.tree import node_depths

# Streams of the per-row randomness; drafters take theirs from 16 upwards.
UNIFORM_STREAM, NOISE_STREAM = 0, 1
# The rule under which the loop samples every node itself.
MATCH = "match"
BUDGET = "no more nodes may be drafted than the row's budget"


@dataclass(frozen=True)
class HostStep:
    """The values of a step that the host needs, one entry a row.

    Attributes:
        tokens: new tokens of the verdict; none in a row that is not finite.
        num_accepted: draft tokens among them.
        num_drafted: nodes of the draft.
        depth_tested: levels that were judged.
        is_finite: all logits that were looked at are numbers.
    """

    tokens: list[list[int]]
    num_accepted: list[int]
    num_drafted: list[int]
    depth_tested: list[int]
    is_finite: list[bool]

    @classmethod
    def fetch(cls, verdict: Verdict, draft: Draft, is_finite: Tensor) -> "HostStep":
        """Bring the values to the host, with the one synchronization of a step."""
        if draft.parents is None or not draft.num_nodes:
            depth_tested = verdict.tested.sum(1)
        else:
            depth_tested = (node_depths(draft.parents, draft.depth) * verdict.tested).amax(1)
        counts = [verdict.num_accepted, draft.lengths, depth_tested, is_finite]
        values = torch.cat([torch.stack(counts, 1), verdict.tokens], 1).tolist()
        return cls(
            tokens=[row[4 : 5 + row[0]] if row[3] else [] for row in values],
            num_accepted=[row[0] for row in values],
            num_drafted=[row[1] for row in values],
            depth_tested=[row[2] for row in values],
            is_finite=[bool(row[3]) for row in values],
        )


class Batch:
    """Rows that share every forward: they join when there is room and leave when they finish.

    Attributes:
        rows: the running requests.
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
        self.target, self.drafter = target, drafter
        self.rule = MATCH if get_rule(rule).judge is None else rule
        self.draft_length = draft_length
        self.taps = drafter.taps if drafter else ()
        self._checks_drafts = drafter is not None and (check or not is_registered(drafter))
        self.owners = cache_owners(target, drafter)
        for i, owner in enumerate(self.owners):
            if any(owner is other for other in self.owners[:i]):
                raise ValueError(
                    f"this {type(owner).__name__} is there twice, as target, drafter or inside of "
                    "one, but has one cache; load it once more for the second place"
                )
        self.rows: list[Request] = []
        self._verify_clock = ForwardClock(target.device)
        self._commit_clock = ForwardClock(target.device)

    def admit(self, requests: list[Request]) -> None:
        """Cache the prompts, sample their first tokens and let them join the running rows.

        A request that was preempted is cached with its tokens; the last of them is its root.
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
        tokens, is_finite = torch.stack([root, scores.amax(-1).isfinite().long()]).tolist()
        _fail_not_finite(requests, is_finite)
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
        """Draw a token [B] behind every row, from scores [B, V]."""
        if sampler.is_greedy:
            return scores.argmax(-1)
        probs = sampler.probs(scores.unsqueeze(1))[:, 0]
        return sample(probs, self._noise(sampler.seeds, num_committed))

    def _join(
        self, requests: list[Request], sampler: Sampler, root: Tensor, num_committed: Tensor
    ) -> None:
        if self.rows:
            sampler = self._make_sampler([*self.rows, *requests])
            root = torch.cat([self.root, root])
            num_committed = torch.cat([self.num_committed, num_committed])
        self.rows = [*self.rows, *requests]
        self.sampler, self.root, self.num_committed = sampler, root, num_committed

    def _make_sampler(self, rows: list[Request]) -> Sampler:
        """Build the sampler of these rows, with what they have emitted so far."""
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
        """Run one draft, one target forward and one verdict."""
        started = time.perf_counter()
        draft, faults, is_valid = self._propose()
        output = self.target.score(self.root, draft, self.taps)
        with self._verify_clock.forward():
            verdict, is_finite = self._judge(output.logits, draft)
            is_healthy = is_finite if is_valid is None else is_finite & is_valid
            host = HostStep.fetch(verdict, draft, is_healthy)
        if faults and not all(host.is_finite):
            with self._blaming_the_drafter():
                refuse(faults, get_rule(self.rule).name)
        _fail_not_finite(self.rows, host.is_finite)
        drafting_s = self.drafter.clock.take() if self.drafter else 0.0
        with self._commit_clock.forward():
            self.target.commit(verdict, host.num_accepted)
            self.sampler.observe(verdict.tokens)
            if self.drafter:
                self.drafter.observe(verdict, host.tokens, output.hidden)
            self.root = verdict.tokens.gather(1, verdict.num_accepted.unsqueeze(1)).squeeze(1)
            self.num_committed = self.num_committed + verdict.num_accepted + 1
        observing_s = self.drafter.clock.take() if self.drafter else 0.0
        self._record(
            host,
            [row.accept(new) for row, new in zip(self.rows, host.tokens, strict=True)],
            draft_s=drafting_s + observing_s,
            target_s=self.target.clock.take(),
            verify_s=self._verify_clock.take(),
            # The drafter's forwards in `observe` are drafting.
            commit_s=max(0.0, self._commit_clock.take_completed() - observing_s),
            wall_s=time.perf_counter() - started,
        )

    def _record(self, host: HostStep, kept: list[int], **times: float) -> None:
        """Add a record of the step to every healthy row, and let the draft length learn."""
        records = []
        for i, row in enumerate(self.rows):
            if row.error:
                continue
            record = StepRecord(
                prompt=row.index,
                step=len(row.records),
                batch_size=len(self.rows),
                num_drafted=host.num_drafted[i],
                num_accepted=kept[i] - 1,
                depth_tested=max(host.depth_tested[i], kept[i] - 1),
                num_emitted=kept[i],
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
        check_draft(draft, len(self.rows), vocab_size, device, get_rule(self.rule).name)
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

    def _judge(self, logits: Tensor, draft: Draft) -> tuple[Verdict, Tensor]:
        """Return the verdict, and the rows [B] whose logits are finite."""
        scores = self.sampler.scores(logits, draft)
        best, likeliest = scores.max(-1)  # [B, N + 1]; a NaN wins the maximum
        # Rows past a draft's length hold anything; only real ones must be finite.
        rows = torch.arange(best.shape[1], device=best.device)
        is_finite = ((best.abs() < torch.inf) | (rows > draft.lengths.unsqueeze(1))).all(1)
        if self.sampler.is_greedy:
            return match(likeliest, draft), is_finite
        probs = self.sampler.probs(scores)
        if self.rule == MATCH:
            return match(sample(probs, self._noise_by_node(draft)), draft), is_finite
        seeds, counters = self.sampler.seeds, self.num_committed
        verdict = verify(
            probs,
            draft,
            rule=self.rule,
            uniforms=row_uniforms(seeds, counters, UNIFORM_STREAM, draft.num_nodes),
            noise=self._noise(seeds, counters),
            check=False,
        )
        return verdict, is_finite

    def _noise(self, seeds: Tensor, counters: Tensor) -> Tensor:
        return row_exponentials(seeds, counters, NOISE_STREAM, self.target.vocab_size)

    def _noise_by_node(self, draft: Draft) -> Tensor:
        """Draw noise [B, N + 1, V] by position, so that a token's draw ignores the draft."""
        if draft.parents is None:
            depths = torch.arange(draft.num_nodes, device=self.root.device) + 1
            depths = depths.expand(draft.batch_size, -1)
        else:
            depths = node_depths(draft.explicit_parents(), draft.depth)
        positions = self.num_committed.unsqueeze(1) + pad(depths, (1, 0))  # [B, N + 1]
        seeds = self.sampler.seeds.unsqueeze(1).expand_as(positions)
        noise = self._noise(seeds.flatten(), positions.flatten())
        return noise.view(*positions.shape, -1)

    def clear(self) -> None:
        """Drop all rows; those admitted next begin a new batch, whatever state caches are in."""
        self.rows = []
        release(self.owners, self)

    def retire(self) -> None:
        """Let finished rows leave the batch; the last rows move into their places."""
        stay = [i for i, row in enumerate(self.rows) if not row.finish_reason]
        if not stay:
            self.clear()
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


def _fail_not_finite(rows: list[Request], is_finite: Sequence[int]) -> None:
    for row, is_number in zip(rows, is_finite, strict=True):
        if not is_number:
            row.fail(
                f"prompt {row.index}, token {len(row.tokens)}: the target's logits are NaN or "
                "infinite, or the sampling settings ban every token; check the weights, or "
                "load with dtype float32 or bfloat16"
            )
