"""Driving a real drafter along a text that is there already, without decoding it.

For drafts whose nodes depend on tokens or on what came before: lookups, hybrids, dynamic trees,
and any strategy of one's own. Chosen tokens are accepted where they are the text's, at any
temperature, so the steps are certain.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from specdec.analysis.acceptance_math import refuse_not_finite
from specdec.analysis.breakdown import FirstTokens, reliability
from specdec.analysis.results import Calibration
from specdec.analysis.texts import Text
from specdec.drafters.base import BaseDrafter
from specdec.engine.interfaces import (
    Drafter,
    Prompts,
    Target,
    TargetOutput,
    cache_owners,
    claimed,
)
from specdec.engine.metrics import StepRecord
from specdec.sampling.config import SamplingConfig
from specdec.sampling.sampler import Sampler
from specdec.targets.taps import read_text
from specdec.verify import Draft, Verdict, match
from specdec.verify.tree import StaticTree, node_depths

# Called with every step: its text, the tokens done before it, the draft, and its verdict.
Watch = Callable[[int, int, Draft, Verdict], None]


def replay(
    target: Target,
    drafter: Drafter,
    texts: Sequence[Text],
    sampling: SamplingConfig,
    seed: int = 0,
    watch: Watch = lambda *step: None,
) -> list[list[StepRecord]]:
    """The steps of a loop with batch size 1 that emits these texts in turn; nothing is timed.

    A drafter that remembers past outputs remembers these. Past the end of a text the loop may have
    drafted and accepted more than it kept; that is not replayed.
    """
    return [
        _Row(target, drafter, text, index, replace(sampling, seed=seed + index)).steps(watch)
        for index, text in enumerate(texts)
    ]


class _Row:
    """One text on its way."""

    def __init__(
        self, target: Target, drafter: Drafter, text: Text, index: int, sampling: SamplingConfig
    ) -> None:
        self.target, self.drafter, self.text, self.index = target, drafter, text, index
        self.sampler = Sampler(
            [sampling], target.vocab_size, target.device, [text.prompt], target.eos_token_ids
        )
        self.hidden: dict[int, Tensor] = {}  # tap -> [L, H]
        if drafter.taps and len(text.tokens) > 1:
            given = [*text.prompt, *text.tokens[:-1]]
            reading = read_text(target, given, len(text.prompt), drafter.taps)
            refuse_not_finite("target", reading.logits, index)
            self.hidden = reading.hidden

    @torch.inference_mode()
    def steps(self, watch: Watch) -> list[StepRecord]:
        """Walk from the first new token, which is prefill's, to the last."""
        records: list[StepRecord] = []
        with claimed(*cache_owners(self.drafter)):
            if len(self.text.tokens) > 1:
                self._begin()
            num_done = 1
            while num_done < len(self.text.tokens):
                record = self._step(num_done, watch)
                records.append(replace(record, step=len(records)))
                num_done += record.num_emitted
        return records

    def _begin(self) -> None:
        prompt = self.text.prompt
        logits = torch.zeros(1, 1, self.target.vocab_size, device=self.target.device)
        hidden = {tap: states[: len(prompt)].unsqueeze(0) for tap, states in self.hidden.items()}
        begun = [[*prompt, self.text.tokens[0]]]
        self.drafter.begin(begun, TargetOutput(logits, hidden), self.sampler)

    def _step(self, num_done: int, watch: Watch) -> StepRecord:
        text, left = self.text, len(self.text.tokens) - num_done
        # As `Request.budget`: the nodes that can still be kept, beside the step's own token.
        budget = min(max(0, text.max_tokens - num_done - 1), self.drafter.max_nodes)
        root = torch.tensor([text.tokens[num_done - 1]], device=self.target.device)
        draft = self.drafter.propose(root, [budget], self.sampler)
        if draft.probs is not None:
            raise ValueError(
                f"{type(self.drafter).__name__} samples its drafts and cannot be given a whole "
                "text: along a given text its draws cannot be replayed; choose tokens "
                "(children=top), use temperature 0, or give it what "
                "specdec.drafters.base.Forced describes"
            )
        depths = node_depths(draft.explicit_parents(), draft.depth)[0]  # [N]
        verdict = self._verdict(draft, depths, num_done)
        watch(self.index, num_done, draft, verdict)
        num_accepted = int(verdict.num_accepted)
        tested = int((depths * verdict.tested[0]).max()) if draft.num_nodes else 0
        new = text.tokens[num_done : num_done + num_accepted + 1]
        self.drafter.observe(verdict, [new], self._features(depths, num_done))
        return StepRecord(
            prompt=self.index,
            step=0,
            batch_size=1,
            num_drafted=int(draft.lengths),
            num_accepted=num_accepted,
            depth_tested=min(tested, left),
            num_emitted=len(new),
            draft_s=0.0,
            target_s=0.0,
            wall_s=0.0,
        )

    def _verdict(self, draft: Draft, depths: Tensor, num_done: int) -> Verdict:
        """Match the draft with the text, whose last token counts as its step's own."""
        left = torch.tensor(self.text.tokens[num_done:], device=depths.device)
        places = torch.cat([depths.new_zeros(1), depths])  # of root and nodes
        sampled = left[places.clamp(max=len(left) - 1)].unsqueeze(0)
        verdict = match(sampled, draft)
        if int(verdict.num_accepted) < len(left):
            return verdict
        path, tokens = verdict.path.clone(), verdict.tokens.clone()
        path[:, len(left) - 1 :] = -1
        tokens[:, len(left) :] = -1
        accepted = torch.full_like(verdict.num_accepted, len(left) - 1)
        return Verdict(tokens, accepted, path, verdict.tested)

    def _features(self, depths: Tensor, num_done: int) -> dict[int, Tensor]:
        """The text's features in place of root and nodes: right on the text's own path."""
        root = len(self.text.prompt) + num_done - 1
        places = root + torch.cat([depths.new_zeros(1), depths])
        return {
            tap: states[places.clamp(max=len(states) - 1)].unsqueeze(0)
            for tap, states in self.hidden.items()
        }


class MadeDrafts(BaseDrafter):
    """Drafts along texts that were made beforehand, at every place of them.

    Args:
        candidates: [L, D, width] ids of each text that has a step, in turn, a trainee's
            `candidates`: row i drafts behind the token after place i.
        tree: nodes of every draft, in the order in which a budget keeps them.
    """

    def __init__(self, candidates: Iterable[Tensor], tree: StaticTree) -> None:
        self._candidates, self._tree = iter(candidates), tree
        self.max_nodes, self.makes_trees = len(tree.parents), True

    def begin(
        self, prompts: Prompts, output: TargetOutput, sampler: Sampler, *, join: bool = False
    ) -> None:
        """Go on with the next text."""
        self._drafts, self._place = next(self._candidates), len(prompts[0]) - 2

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        """The first nodes of the tree."""
        count, tree = budget[0], self._tree
        if not count:
            return Draft.empty(1, root.device)
        levels, ranks = tree.depths[:count] - 1, tree.ranks[:count]
        tokens = self._drafts[self._place, levels, ranks].unsqueeze(0).to(root.device)
        return Draft.tree(tokens, tree.parents[:count].to(root.device), depth=int(levels.max()) + 1)

    def observe(
        self, verdict: Verdict, committed: Sequence[Sequence[int]], hidden: dict[int, Tensor]
    ) -> None:
        """Move on by what was kept."""
        self._place += len(committed[0])


@dataclass
class ReplayNotes:
    """Notes of every step; `note` is the `watch` of a replay."""

    text: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)

    def note(self, text: int, num_done: int, draft: Draft, verdict: Verdict) -> None:
        """Keep one step; a step without a draft accepts nothing."""
        self.text.append(text)
        self.step.append(num_done - 1)
        self.accepted.append(bool(verdict.num_accepted[0] > 0))
        if draft.confidence is None or not draft.num_nodes:
            return
        path = set(verdict.path[0].tolist())
        parents = draft.explicit_parents()[0].tolist()
        whole = draft.confidence[0].tolist()
        for node in range(int(draft.lengths[0])):
            parent = parents[node]
            above = whole[parent] if parent >= 0 else 1.0
            # Judged or not: had the step come this far, this child would be the text's or not.
            if (parent < 0 or parent in path) and above > 0:
                self.confidence.append(min(1.0, whole[node] / above))
                self.taken.append(node in path)

    def first_tokens(self) -> FirstTokens:
        """The places where steps started."""
        accepted = np.array(self.accepted, dtype=np.float64)
        steps = np.array(self.step, dtype=np.int64)
        return FirstTokens(np.array(self.text, dtype=np.int64), steps, accepted, None)

    def calibration(self) -> Calibration | None:
        """Calibration of the conditional confidence of all nodes whose parent was taken."""
        return reliability(np.array(self.confidence), np.array(self.taken, dtype=bool))
