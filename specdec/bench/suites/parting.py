"""Where the greedy tokens of an arm part from plain decoding's."""

from collections.abc import Sequence
from typing import Any

from specdec.bench.differences import LogitGaps, parting
from specdec.bench.suites.ask import Group
from specdec.bench.suites.served import Served
from specdec.bench.suites.summary import Calls, rows_of


def differences(group: Group, calls: Calls, plain: Calls, gaps: LogitGaps) -> list[dict[str, Any]]:
    """Requests whose greedy tokens are not plain decoding's, with the first place of parting.

    Args:
        group: what was asked.
        calls: what an arm gave.
        plain: what plain decoding gave.
        gaps: measures how close the target's choice was there.

    Returns:
        A dictionary a request: `request`, `position` (of the first output token that differs) and
        `top2_gap` (of the logits there; None where one token alone is allowed).
    """
    found = []
    for ask, ours, theirs in zip(
        group.asks, rows_of(group, calls), rows_of(group, plain), strict=True
    ):
        position = _position(ours, theirs)
        if position is not None:
            where, prefix = position
            gap = gaps.at(tuple(ask.prompt), prefix)
            found.append({"request": ask.id, "position": where, "top2_gap": gap})
    return found


def _position(
    ours: Sequence[Served | None], theirs: Sequence[Served | None]
) -> tuple[int, tuple[int, ...]] | None:
    """Where two outputs of one request part first, and the tokens before; None if none do."""
    for one in ours:
        for other in theirs:
            if one and other and one.tokens != other.tokens:
                where = parting(one.tokens, other.tokens)
                return where, tuple(one.tokens[:where])
    return None
