"""Parts of specdec inside vLLM 0.32; `docs/verify.md` tells how to switch them on."""

import inspect
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.base import padded
from specdec.registry import load_drafter
from specdec.verify import (
    Verdict,
    from_flat,
    get_rule,
    target_from_flat,
    uniforms_from_flat,
    verify,
)

VERSION = "0.32"  # of vLLM: the one whose seam this is


def install() -> None:
    """Put `specdec.verify` in the place of vLLM's rejection sampler: the plugin's entry point.

    The environment variable SPECDEC_VERIFIER holds the rule; while it is unset nothing happens.
    vLLM calls this in each of its processes. The seam is that of its first model runner, which is
    switched on.

    Raises:
        ValueError: SPECDEC_VERIFIER is no lossless rule that judges probabilities.
        RuntimeError: this vLLM has its sampler elsewhere, or its second runner was asked for.
    """
    name = os.environ.get("SPECDEC_VERIFIER")
    if not name:
        return
    fix = "unset SPECDEC_VERIFIER to keep vLLM's own"
    try:
        rule = get_rule(name)
    except ValueError as error:
        raise ValueError(f"SPECDEC_VERIFIER is {name!r}: {error}; {fix}") from error
    if not rule.lossless or rule.judge is None:
        raise ValueError(
            f"SPECDEC_VERIFIER is {name!r} but must be token, block or traversal; {fix}"
        )
    if os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0") != "0":
        raise RuntimeError(
            f"SPECDEC_VERIFIER works in vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0, "
            f"or {fix}"
        )
    try:
        from vllm.v1.sample import rejection_sampler as module

        own, draw_uniforms = module.rejection_sample, module.generate_uniform_probs
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"SPECDEC_VERIFIER needs the sampler of vLLM {VERSION}: {error}; {fix}"
        ) from error

    def rejection_sample(
        draft_token_ids: Tensor,
        num_draft_tokens: Sequence[int],
        max_spec_len: int,
        cu_num_draft_tokens: Tensor,
        draft_probs: Tensor | None,
        target_logits: Tensor,
        bonus_token_ids: Tensor,
        sampling_metadata: Any,
        synthetic_mode: bool = False,
        synthetic_conditional_rates: Tensor | None = None,
        use_fp64_gumbel: bool = False,
    ) -> Tensor:
        """Verify as vLLM's function of this name does, from the same random numbers."""
        if synthetic_mode:
            raise RuntimeError(f"vLLM's synthetic acceptance judges no draft: drop it, or {fix}")
        flat = cu_num_draft_tokens, max_spec_len
        draft = from_flat(draft_token_ids, flat[0], max_len=max_spec_len, probs=draft_probs)
        target = target_from_flat(target_logits, *flat, bonus=False)
        options: dict[str, Any] = {"rule": rule, "bonus_tokens": bonus_token_ids[:, 0].long()}
        if sampling_metadata.all_greedy:
            options["greedy"] = torch.ones_like(draft.lengths, dtype=torch.bool)
            return verify(target, draft, **options, check=False).tokens.int()
        probs = target.softmax(2, dtype=torch.float32)
        if not sampling_metadata.all_random:
            options["greedy"] = sampling_metadata.temperature == 0
            probs = torch.where(options["greedy"].view(-1, 1, 1), target, probs)
        generators = sampling_metadata.generators
        uniforms = draw_uniforms(
            len(draft_token_ids), num_draft_tokens, generators, target_logits.device
        )
        noise = torch.empty_like(
            probs[:, 0], dtype=torch.float64 if use_fp64_gumbel else torch.float32
        ).exponential_()
        for row, generator in generators.items():
            if num_draft_tokens[row]:
                noise[row].exponential_(generator=generator)
        options |= {"uniforms": uniforms_from_flat(uniforms, *flat), "noise": noise}
        return verify(probs, draft, **options, check=False).tokens.int()

    found, expected = ([*inspect.signature(f).parameters] for f in (own, rejection_sample))
    if found != expected:
        raise RuntimeError(
            f"SPECDEC_VERIFIER needs the sampler of vLLM {VERSION}, rejection_sample("
            f"{', '.join(expected)}), but here it takes ({', '.join(found)}); {fix}"
        )
    module.rejection_sample = rejection_sample


class Proposer:
    """Drafts by any drafter that needs no target: vLLM's `custom_class`.

    The environment variable SPECDEC_DRAFTER holds its name, or its options as JSON. Of a tree, the
    first child of every node is served. vLLM passes rows and not requests: a row is a new request
    unless its text is a known one and the tokens that were just sampled. What a request emits last
    is never seen, so a drafter that remembers past outputs learns that much less.

    Args:
        vllm_config: vLLM's; `num_speculative_tokens` is the budget of every row.

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
        # The drafter's rows: the text that each was told, and its last draft's nodes.
        self._texts: Sequence[tuple[int, ...]] = ()
        self._paths: list[list[int]] = []

    def load_model(self, *_: Any, **__: Any) -> None:
        """Load nothing; vLLM calls it on every proposer."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft behind every row of the batch that sampled a token; see vLLM's proposers.

        Args:
            sampled_token_ids: new tokens of each row, none where it is not to draft.
            num_tokens_no_spec: [rows] length of each row's text, the new tokens included.
            token_ids_cpu: [rows, max_model_len] the texts.
            slot_mappings: not used.
        """
        known: dict[tuple[int, ...], list[int]] = {}
        for row, text in enumerate(self._texts):
            known.setdefault(text, []).append(row)
        kept, joined = [], []  # (slot in vLLM's batch, text), in the order of the drafter's rows
        rows, committed = [], []
        for slot, sampled in enumerate(sampled_token_ids):
            if not sampled:
                continue
            text = tuple(token_ids_cpu[slot, : num_tokens_no_spec[slot]].tolist())
            if same := known.get(text[: -len(sampled)]):
                kept.append((slot, text))
                rows.append(same.pop(0))
                committed.append(sampled)
            else:
                joined.append((slot, text))
        answer: list[list[int]] = [[] for _ in sampled_token_ids]
        if not kept and not joined:
            return answer
        if kept:
            self._drafter.reorder(torch.tensor(rows))
            self._observe(rows, committed)
        if joined:
            self._drafter.begin([text for _, text in joined], None, None, join=bool(kept))
        slots, self._texts = zip(*kept, *joined, strict=True)
        budget = [max(0, min(self._num_tokens, self._max_len - len(t))) for t in self._texts]
        draft = self._drafter.propose(torch.tensor([t[-1] for t in self._texts]), budget, None)
        self._paths = []
        for slot, length, tokens, parents in zip(
            slots,
            draft.lengths.tolist(),
            draft.tokens.tolist(),
            draft.explicit_parents().tolist(),
            strict=True,
        ):
            path: list[int] = []
            for node in range(length):
                if parents[node] == (path[-1] if path else -1):
                    path.append(node)
            self._paths.append(path)
            answer[slot] = [tokens[node] for node in path]
        return answer

    def _observe(self, rows: Sequence[int], committed: Sequence[Sequence[int]]) -> None:
        """Tell the drafter what became of its last draft in these of its rows."""
        accepted = [
            self._paths[row][: len(new) - 1] for row, new in zip(rows, committed, strict=True)
        ]
        verdict = Verdict(
            torch.tensor(padded(committed, -1)),
            torch.tensor([len(path) for path in accepted]),
            torch.tensor(padded(accepted, -1), dtype=torch.long),
            torch.zeros(len(rows), 0, dtype=torch.bool),
        )
        self._drafter.observe(verdict, committed, {})
