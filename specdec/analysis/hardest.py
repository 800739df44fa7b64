"""Where a drafter fails worst, in the text's own words."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from specdec.analysis.evidence import Evidence
from specdec.analysis.texts import Text

NUM_CONTEXTS, NUM_BEFORE = 20, 32


def hardest_contexts(
    evidence: Evidence, texts: Sequence[Text], tokenizer: Any, count: int = NUM_CONTEXTS
) -> list[dict[str, Any]]:
    """The places of lowest overlap; among equals, those where the text's token surprised it most.

    Places where the drafter's likeliest token is the text's are none.

    Returns:
        {prompt, position, before, drafted, target, p, q, overlap}: the position is the token's in
        its answer, from 0; `before` the text up to it; `drafted` the drafter's likeliest token; p
        and q the models' probabilities of the token that came, at temperature 1.
    """
    wrong = evidence.valid[:, :, 0] & (evidence.rank[:, :, 0] != 0)
    rows, steps = np.nonzero(wrong)
    overlap = evidence.overlap[rows, steps, 0]
    surprise = evidence.draft_prob[rows, steps, 0]
    order = np.lexsort((surprise, overlap))[:count]
    found = []
    for row, step in zip(rows[order].tolist(), steps[order].tolist(), strict=True):
        text, position = texts[row], step + 1
        before = [*text.prompt, *text.tokens[:position]][-NUM_BEFORE:]
        found.append(
            {
                "prompt": row,
                "position": position,
                "before": _said(before, tokenizer),
                "drafted": [_said([int(evidence.best_draft[row, step, 0])], tokenizer)],
                "target": _said([text.tokens[position]], tokenizer),
                "p": float(evidence.target_prob[row, step, 0]),
                "q": float(evidence.draft_prob[row, step, 0]),
                "overlap": float(evidence.overlap[row, step, 0]),
            }
        )
    return found


def _said(tokens: Sequence[int], tokenizer: Any) -> str:
    """Text of tokens; their ids without a tokenizer."""
    if tokenizer is None:
        return " ".join(map(str, tokens))
    return str(tokenizer.decode(list(tokens)))
