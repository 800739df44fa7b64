"""A running batch: the loop owns the tokens, the target and the drafter their caches."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.interfaces import Drafter, Target, TargetOutput
from specdec.metrics import StepRecord
from specdec.randomness import row_exponentials, row_uniforms
from specdec.request import Request
from specdec.sampling import Sampler, SamplingConfig, sample
from specdec.verify import Draft, Verdict, match, verify
from specdec.verify.tree import node_depths

# Streams of the per-row randomness; drafters take theirs from 16 upwards.
UNIFORM_STREAM, NOISE_STREAM = 0, 1


@dataclass(frozen=True)
class _HostStep:
    """The values of a step that the host needs, fetched in one synchronisation."""

    tokens: list[list[int]]
    num_accepted: list[int]
    num_drafted: list[int]
    depth_tested: list[int]


class Batch:
    """Rows that share every forward until they finish."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        requests: list[Request],
        configs: Sequence[SamplingConfig],
        rule: str,
    ) -> None:
        self.target, self.drafter, self.rule = target, drafter, rule
        self.rows = requests
        self.taps = drafter.taps if drafter else ()
        prompts = [request.prompt for request in requests]
        self.sampler = Sampler(
            configs, target.vocab_size, target.device, prompts, target.eos_token_ids
        )
        # Committed tokens of every row: the counter that its randomness is drawn from.
        self.num_committed = torch.tensor([len(p) for p in prompts], device=target.device)

    def prefill(self) -> list[tuple[Request, int]]:
        """Cache the prompts and sample every row's first token."""
        started = time.perf_counter()
        prompts = [row.prompt for row in self.rows]
        output = self.target.prefill(prompts, self.taps)
        scores = self.sampler.scores(output.logits)
        if self.sampler.is_greedy:
            self.root = scores[:, 0].argmax(-1)
        else:
            self.root = sample(self.sampler.probs(scores)[:, 0], self._noise())
        healthy = scores[:, 0].amax(-1).isfinite()
        tokens, finite = torch.stack([self.root, healthy.long()]).tolist()
        self._refuse_nan(finite)
        self.num_committed = self.num_committed + 1
        self.sampler.observe(self.root.unsqueeze(1))
        if self.drafter:
            begun = [[*prompt, token] for prompt, token in zip(prompts, tokens, strict=True)]
            self.drafter.begin(begun, output, self.sampler)
            self.drafter.clock.take()
        self.target.clock.take()
        for row, token in zip(self.rows, tokens, strict=True):
            row.started = started
            row.accept([token])
        return [(row, 1) for row in self.rows]

    def step(self) -> list[tuple[Request, int]]:
        """One draft, one target forward, one verdict; returns each row's number of new tokens."""
        started = time.perf_counter()
        rows = self.rows
        draft = self._propose()
        output = self.target.score(self.root, draft, self.taps)
        verdict, healthy = self._judge(output, draft)
        host = self._fetch(verdict, draft, healthy)
        self._commit(verdict, host, output)
        kept = [row.accept(new) for row, new in zip(rows, host.tokens, strict=True)]
        draft_s = self.drafter.clock.take() if self.drafter else 0.0
        times = (draft_s, self.target.clock.take(), time.perf_counter() - started)
        for i, row in enumerate(rows):
            row.records.append(
                StepRecord(
                    prompt=row.index,
                    step=len(row.records),
                    batch_size=len(rows),
                    num_drafted=host.num_drafted[i],
                    num_accepted=kept[i] - 1,
                    depth_tested=max(host.depth_tested[i], kept[i] - 1),
                    num_emitted=kept[i],
                    draft_s=times[0],
                    target_s=times[1],
                    wall_s=times[2],
                )
            )
        return list(zip(rows, kept, strict=True))

    def _propose(self) -> Draft:
        if self.drafter is None:
            return Draft.empty(len(self.rows), self.target.device)
        budget = [min(row.budget, self.drafter.max_nodes) for row in self.rows]
        return self.drafter.propose(self.root, budget, self.sampler)

    def _judge(self, output: TargetOutput, draft: Draft) -> tuple[Verdict, Tensor]:
        scores = self.sampler.scores(output.logits, draft)
        best, sampled = scores.max(-1)  # [B, N + 1]; a NaN wins the maximum
        # Rows past a draft's length hold anything; only real ones must be finite.
        healthy = best.isfinite() | (
            torch.arange(best.shape[1], device=best.device) > draft.lengths.unsqueeze(1)
        )
        if self.sampler.is_greedy:
            return match(sampled, draft), healthy.all(1)
        uniforms = row_uniforms(
            self.sampler.seeds, self.num_committed, UNIFORM_STREAM, draft.num_nodes
        )
        probs = self.sampler.probs(scores)
        verdict = verify(
            probs, draft, rule=self.rule, uniforms=uniforms, noise=self._noise(), check=False
        )
        return verdict, healthy.all(1)

    def _noise(self) -> Tensor:
        size = self.target.vocab_size
        return row_exponentials(self.sampler.seeds, self.num_committed, NOISE_STREAM, size)

    def _fetch(self, verdict: Verdict, draft: Draft, healthy: Tensor) -> _HostStep:
        """Bring the step to the host: the one synchronisation."""
        if draft.parents is None:
            depth_tested = verdict.tested.sum(1)
        else:
            depths = node_depths(draft.parents, draft.depth)
            depth_tested = (depths * verdict.tested).amax(1)
        counts = [verdict.num_accepted, draft.lengths, depth_tested, healthy]
        packed = torch.cat([torch.stack(counts, 1), verdict.tokens], 1).tolist()
        self._refuse_nan([row[3] for row in packed])
        return _HostStep(
            tokens=[row[4 : 5 + row[0]] for row in packed],
            num_accepted=[row[0] for row in packed],
            num_drafted=[row[1] for row in packed],
            depth_tested=[row[2] for row in packed],
        )

    def _commit(self, verdict: Verdict, host: _HostStep, output: TargetOutput) -> None:
        self.target.commit(verdict, host.num_accepted)
        self.sampler.observe(verdict.tokens)
        if self.drafter:
            self.drafter.observe(verdict, host.tokens, output.hidden)
        self.root = verdict.tokens.gather(1, verdict.num_accepted.unsqueeze(1)).squeeze(1)
        self.num_committed = self.num_committed + verdict.num_accepted + 1

    def _refuse_nan(self, finite: Sequence[int]) -> None:
        for row, is_finite in zip(self.rows, finite, strict=True):
            if not is_finite:
                raise FloatingPointError(
                    f"prompt {row.index}, token {len(row.tokens)}: the target's logits are NaN or "
                    "infinite, or the sampling settings ban every token; check the weights, or "
                    "load with dtype float32 or bfloat16"
                )

    def retire(self) -> None:
        """Let finished rows leave the batch."""
        stay = [i for i, row in enumerate(self.rows) if not row.finish_reason]
        if len(stay) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in stay]
        if not stay:
            return
        rows = torch.tensor(stay, device=self.target.device)
        self.target.reorder(rows)
        self.sampler.keep(rows)
        if self.drafter:
            self.drafter.reorder(rows)
        self.root, self.num_committed = self.root[rows], self.num_committed[rows]
