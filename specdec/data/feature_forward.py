"""The target reads the rows of a shard, and what it made of them is put into the shard."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specdec.data.answers import AnswerRow
from specdec.data.feature_layout import FeatureLayout, logit_places
from specdec.data.feature_shard import ShardContent
from specdec.data.top_logits import TopLogits
from specdec.targets.hf import HFTarget


def fill_shard(content: ShardContent, target: HFTarget, batch_tokens: int) -> Iterator[int]:
    """Run the target over a shard's rows, in batches that do not depend on other shards.

    Args:
        content: to be filled.
        target: in eval mode.
        batch_tokens: padded tokens that the target reads at once.

    Yields:
        Tokens of each batch, without padding.

    Raises:
        FloatingPointError: hidden states or logits that are not finite.
        ValueError: a store without logits for a target whose logits need more than its projection.
    """
    layout = content.layout
    for numbers in _batches([len(row.tokens) for row in content.rows], batch_tokens):
        rows = [content.rows[number] for number in numbers]
        hidden, logits = _read(target, layout, rows)
        for line, number in enumerate(numbers):
            for tap, states in hidden.items():
                content.put_hidden(number, tap, states[line, : len(rows[line].tokens)])
            if layout.top_k:
                content.put_logits(number, logits[line])
        yield sum(len(row.tokens) for row in rows)


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of rows of like length, at most `batch_tokens` with padding, longest first."""
    batches: list[list[int]] = []
    longest = 0
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not batches or longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = lengths[number]
        batches[-1].append(number)
    return batches


@torch.no_grad()
def _read(
    target: HFTarget, layout: FeatureLayout, rows: Sequence[AnswerRow]
) -> tuple[dict[int, Tensor], list[TopLogits]]:
    """Taps [B, L, H], and the top logits of each row's places unless the store has none.

    No attention mask is needed: padding is at the end, where causal attention never looks back
    from.
    """
    places = [logit_places(row) for row in rows]
    columns = sorted(set().union(*places)) if layout.top_k else []
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row.tokens) for row in rows], batch_first=True
    )
    out = target.model(
        input_ids=tokens.to(target.device),
        output_hidden_states=bool(layout.taps),
        use_cache=False,
        # One column tells whether logits that are not stored can be had from the last tap.
        logits_to_keep=torch.tensor(columns or [0], device=target.device),
    )
    hidden = {tap: out.hidden_states[tap] for tap in layout.taps}
    _check_finite(hidden, out.logits, rows)
    if not layout.top_k:
        _check_projection(target, hidden[layout.num_layers][:, :1], out.logits)
        return hidden, []
    column_of = {place: column for column, place in enumerate(columns)}
    wanted = [torch.tensor([column_of[p] for p in each], dtype=torch.long) for each in places]
    return hidden, [
        TopLogits.of(out.logits[line, each.to(target.device)], layout.top_k)
        for line, each in enumerate(wanted)
    ]


def _check_projection(target: HFTarget, states: Tensor, logits: Tensor) -> None:
    """Refuse to leave logits out where the projection alone does not make them."""
    again = target.model.get_output_embeddings()(states).float()
    if not torch.allclose(again, logits.float(), rtol=0.02, atol=0.02 * float(again.abs().max())):
        raise ValueError(
            f"{type(target.model).__name__} does more to its logits than its vocabulary "
            "projection, so that they cannot be computed from its last hidden state; keep logits "
            "with --top-k 64"
        )


def _check_finite(hidden: dict[int, Tensor], logits: Tensor, rows: Sequence[AnswerRow]) -> None:
    named = {f"hidden_states[{tap}]": states for tap, states in hidden.items()}
    for name, values in {**named, "logits": logits}.items():
        is_finite = values.isfinite().flatten(1).all(-1)
        if not is_finite.all():
            row = rows[int(is_finite.logical_not().nonzero()[0])]
            raise FloatingPointError(
                f"{name} of row {row.id!r} are not finite; load the target with --target-dtype "
                "bfloat16 or float32"
            )
