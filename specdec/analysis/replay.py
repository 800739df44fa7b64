"""Driving a real drafter along a text that is there already, without decoding it.

For drafts whose nodes depend on tokens or on what came before: lookups, hybrids, dynamic trees,
and any strategy of one's own. Chosen tokens are accepted where they are the text's, at any
temperature, so the steps are certain.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdec.analysis.teacher_forced import read_target
from specdec.analysis.texts import Text
from specdec.drafters.base import BaseDrafter
from specdec.engine.interfaces import Drafter, Prompts, Target, TargetOutput, cache_owners, claimed
from specdec.engine.metrics import StepRecord
from specdec.sampling.config import SamplingConfig
from specdec.sampling.sampler import Sampler
from specdec.verify import Draft, Verdict, match
from specdec.verify.tree import StaticTree

# Called with every step: its text, the tokens done before it, the draft, and its verdict.
Watch = Callable[[int, int, Draft, Verdict], None]


@torch.inference_mode()
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
    device, rows = target.device, list[list[StepRecord]]()
    for index, text in enumerate(texts):
        rows.append([])
        if len(text.tokens) < 2:
            continue  # prefill emits the first token
        settings = [replace(sampling, seed=seed + index)]
        sampler = Sampler(settings, target.vocab_size, device, [text.prompt], target.eos_token_ids)
        hidden = read_target(target, text, index, drafter.taps).hidden if drafter.taps else {}
        with claimed(*cache_owners(drafter)):
            logits = torch.zeros(1, 1, target.vocab_size, device=device)
            known = {tap: states[None, : len(text.prompt)] for tap, states in hidden.items()}
            begun, num_done = [[*text.prompt, text.tokens[0]]], 1
            drafter.begin(begun, TargetOutput(logits, known), sampler)
            while num_done < len(text.tokens):
                # As `Request.budget`: nodes that can still be kept, beside the step's own token.
                budget = min(max(0, text.max_tokens - num_done - 1), drafter.max_nodes)
                root = torch.tensor([text.tokens[num_done - 1]], device=device)
                draft = drafter.propose(root, [budget], sampler)
                if draft.probs is not None:
                    raise ValueError(
                        f"{type(drafter).__name__} samples its drafts and cannot be given a whole "
                        "text, along which its draws cannot be replayed; choose tokens "
                        "(children=top), use temperature 0, or give it what "
                        "specdec.drafters.base.Forced describes"
                    )
                depths = draft.depths[0]  # [N]
                places = torch.cat([depths.new_zeros(1), depths])  # of root and nodes
                verdict = _verdict(draft, places, text.tokens[num_done:])
                watch(index, num_done, draft, verdict)
                new = text.tokens[num_done : num_done + int(verdict.num_accepted) + 1]
                # The text's features in place of root and nodes: right on the text's own path.
                seen = places + len(text.prompt) + num_done - 1
                features = {
                    tap: states[None, seen.clamp(max=len(states) - 1)]
                    for tap, states in hidden.items()
                }
                drafter.observe(verdict, [new], features)
                tested = int((depths * verdict.tested[0]).max()) if draft.num_nodes else 0
                rows[-1].append(
                    StepRecord(
                        prompt=index,
                        step=len(rows[-1]),
                        batch_size=1,
                        num_drafted=int(draft.lengths),
                        num_accepted=int(verdict.num_accepted),
                        depth_tested=min(tested, len(text.tokens) - num_done),
                        num_emitted=len(new),
                        draft_s=0.0,
                        target_s=0.0,
                        wall_s=0.0,
                    )
                )
                num_done += len(new)
    return rows


def _verdict(draft: Draft, places: Tensor, left: Sequence[int]) -> Verdict:
    """Match a draft with what is left of a text, whose last token counts as its step's own."""
    last = len(left) - 1
    tokens = torch.tensor(left, device=places.device)[places.clamp(max=last)]
    verdict = match(tokens.unsqueeze(0), draft)
    verdict.path[:, last:] = -1
    verdict.tokens[:, last + 1 :] = -1
    return replace(verdict, num_accepted=verdict.num_accepted.clamp(max=last))


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
        self._drafts, self._place = next(self._candidates), len(prompts[0]) - 2

    def propose(self, root: Tensor, budget: Sequence[int], sampler: Sampler) -> Draft:
        count, tree = budget[0], self._tree
        if not count:
            return Draft.empty(1, root.device)
        levels, ranks = tree.depths[:count] - 1, tree.ranks[:count]
        tokens = self._drafts[self._place, levels, ranks].unsqueeze(0).to(root.device)
        return Draft.tree(tokens, tree.parents[:count].to(root.device), depth=int(levels.max()) + 1)

    def observe(
        self, verdict: Verdict, committed: Sequence[Sequence[int]], hidden: dict[int, Tensor]
    ) -> None:
        self._place += len(committed[0])
