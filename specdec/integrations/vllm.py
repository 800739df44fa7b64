"""Parts of specdec inside vLLM 0.32; `docs/verify.md` tells how to switch them on."""

import inspect
import json
import os
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.base import padded
from specdec.registry import load_drafter
from specdec.verify import RULES, Verdict, from_flat, target_from_flat, uniforms_from_flat, verify

SEAM = (
    "draft_token_ids num_draft_tokens max_spec_len cu_num_draft_tokens draft_probs target_logits "
    "bonus_token_ids sampling_metadata synthetic_mode synthetic_conditional_rates use_fp64_gumbel"
)


def install() -> None:
    """Put `specdec.verify` in the place of vLLM's rejection sampler, in its first model runner.

    This is the plugin's entry point, called in every process of vLLM. SPECDEC_VERIFIER in the
    environment holds the rule; while it is unset, nothing happens.

    Raises:
        ValueError: SPECDEC_VERIFIER is no lossless rule for given probabilities.
        RuntimeError: this vLLM has another sampler, or its second runner is asked for.
    """
    name = os.environ.get("SPECDEC_VERIFIER")
    if not name:
        return
    rule, fix = RULES.get(name), "or unset SPECDEC_VERIFIER to keep vLLM's own"
    if rule is None or rule.judge is None or not rule.lossless:
        raise ValueError(f"SPECDEC_VERIFIER is {name!r} but must be token, block, traversal, {fix}")
    if os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0") != "0":
        raise RuntimeError(f"SPECDEC_VERIFIER needs VLLM_USE_V2_MODEL_RUNNER=0; set it, {fix}")
    try:
        from vllm.v1.sample import rejection_sampler as module

        own, draw_uniforms = module.rejection_sample, module.generate_uniform_probs
        found = " ".join(inspect.signature(own).parameters)
    except (ImportError, AttributeError) as error:
        found = str(error)
    if found != SEAM:
        raise RuntimeError(
            f"SPECDEC_VERIFIER needs rejection_sample({SEAM}) of vLLM 0.32 but found: {found}; "
            f"install that, {fix}"
        )

    @wraps(own)
    def rejection_sample(*args: Any, **options: Any) -> Tensor:
        # What vLLM's own function does, from the same random numbers.
        given = SimpleNamespace(**inspect.signature(own).bind(*args, **options).arguments)
        if getattr(given, "synthetic_mode", False):
            raise RuntimeError(f"vLLM's synthetic acceptance judges no draft: drop it, {fix}")
        sampling, num_drafted = given.sampling_metadata, given.num_draft_tokens
        ends, width = given.cu_num_draft_tokens, given.max_spec_len
        draft = from_flat(given.draft_token_ids, ends, max_len=width, probs=given.draft_probs)
        target = target_from_flat(given.target_logits, ends, width, bonus=False)
        greedy = torch.ones_like(draft.lengths, dtype=torch.bool)
        uniforms = noise = None
        if not sampling.all_greedy:
            probs, greedy = target.softmax(2, dtype=torch.float32), sampling.temperature == 0
            target = torch.where(greedy.view(-1, 1, 1), target, probs)
            total, generators = len(given.draft_token_ids), sampling.generators
            flat = draw_uniforms(total, num_drafted, generators, target.device)
            uniforms = uniforms_from_flat(flat, ends, width)
            kind = torch.float64 if getattr(given, "use_fp64_gumbel", False) else None
            noise = torch.empty_like(target[:, 0], dtype=kind).exponential_()
            for row, generator in generators.items():
                if num_drafted[row]:
                    noise[row].exponential_(generator=generator)
        rows = {"greedy": greedy, "bonus_tokens": given.bonus_token_ids[:, 0].long()}
        random = {"uniforms": uniforms, "noise": noise}
        return verify(target, draft, rule=rule, **random, **rows, check=False).tokens.int()

    module.rejection_sample = rejection_sample


class Proposer:
    """Drafts by any drafter that needs no target, as vLLM's `custom_class`.

    SPECDEC_DRAFTER in the environment holds its name, or its options as JSON. Of a tree, the first
    child of every node is served. vLLM passes rows, not requests: a row is a new request unless its
    text is a known one and the tokens just sampled. What a request emits last is never seen, so a
    drafter that remembers past outputs learns that much less.

    Raises:
        ValueError: SPECDEC_DRAFTER names no drafter, or one that needs a target.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._num_tokens = vllm_config.speculative_config.num_speculative_tokens
        self._max_len = vllm_config.model_config.max_model_len
        given = os.environ.get("SPECDEC_DRAFTER", "")
        try:
            options = json.loads(given) if given.startswith("{") else given
            self._drafter: Any = load_drafter(options, None)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"SPECDEC_DRAFTER is {given!r} but must be a drafter that needs no target, as "
                f'suffix or {{"type": "ngram", "max_ngram": 3}}: {error}'
            ) from error
        # The drafter's rows: the text each was told, and the nodes of its last draft.
        self._texts: list[tuple[int, ...]] = []
        self._paths: list[list[int]] = []

    def load_model(self, *_: Any) -> None:
        """Load nothing; vLLM calls it on every proposer."""

    def propose(
        self, sampled_token_ids: Any, num_tokens_no_spec: Any, token_ids_cpu: Any, **_: Any
    ) -> list[list[int]]:
        """Draft behind the rows that sampled tokens, the last ones of their texts.

        Args:
            sampled_token_ids: new tokens row by row, none where a row is not to draft.
            num_tokens_no_spec: [rows] lengths of the texts.
            token_ids_cpu: [rows, max_model_len] the texts.
        """
        known: dict[tuple[int, ...], list[int]] = {}
        for row, text in enumerate(self._texts):
            known.setdefault(text, []).append(row)
        kept: list[Any] = []  # (slot in vLLM's batch, text, new tokens, the drafter's row)
        joined: list[Any] = []
        for slot, new in enumerate(sampled_token_ids):
            if new:
                text = tuple(token_ids_cpu[slot, : num_tokens_no_spec[slot]].tolist())
                rows = known.get(text[: -len(new)])
                (kept if rows else joined).append((slot, text, new, rows.pop(0) if rows else -1))
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if not kept + joined:
            return drafts
        if kept:
            self._drafter.reorder(torch.tensor([row for *_, row in kept]))
            committed = [new for _, _, new, _ in kept]
            accepted = [self._paths[row][: len(new) - 1] for _, _, new, row in kept]
            path = torch.tensor(padded(accepted, -1), dtype=torch.long)
            tokens, untested = torch.tensor(padded(committed, -1)), path[:, :0] >= 0
            verdict = Verdict(tokens, (path >= 0).sum(1), path, untested)
            self._drafter.observe(verdict, committed, {})
        if joined:
            self._drafter.begin([text for _, text, *_ in joined], None, None, join=bool(kept))
        self._texts, self._paths = [text for _, text, *_ in kept + joined], []
        root = torch.tensor([text[-1] for text in self._texts])
        budget = [max(0, min(self._num_tokens, self._max_len - len(t))) for t in self._texts]
        draft = self._drafter.propose(root, budget, None)
        parents = draft.explicit_parents()
        for row, (slot, *_) in enumerate(kept + joined):
            served: list[int] = []
            for node, parent in enumerate(parents[row, : draft.lengths[row]].tolist()):
                if parent == (served[-1] if served else -1):
                    served.append(node)
            self._paths.append(served)
            drafts[slot] = draft.tokens[row, served].tolist()
        return drafts
