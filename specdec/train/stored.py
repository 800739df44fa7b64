"""Training batches from a feature store: the target need not be there."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from specdec.data.answers import AnswerRow
from specdec.data.feature_store import FeatureStore, StoredRow
from specdec.drafters.training_batch import TrainingBatch
from specdec.train.batches import collate, padded
from specdec.train.source import Lay


class StoredSource:
    """Reads what the target made of the rows.

    Batches are those of `OnlineSource` but for what the store rounds: bf16 or int8 taps, and the
    logits outside the top k, which are all alike (`TopLogits.dense`). Where a store has no logits
    at all, the vocabulary projection makes them from the last tap. Places whose next token is no
    answer's have zeros for logits; nothing is learned there.

    Args:
        store: of the rows that batches are asked for.
        taps: HF `hidden_states` indices that the drafter reads.
        dtype: of what is returned, the drafter's.
        device: of what is returned.
        projection: of the target, on that device; only used for a store without logits.

    Raises:
        ValueError: a tap that the store lacks, or no way to the logits.
    """

    def __init__(
        self,
        store: FeatureStore,
        taps: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        projection: nn.Module | None = None,
    ) -> None:
        store.check_taps(taps)
        layout = store.layout
        if not layout.top_k and projection is None:
            raise ValueError(
                f"{str(store.folder)!r} holds no logits, and no projection is given to compute "
                "them with; give the target's, or extract the features with --top-k 64"
            )
        self.store, self.taps, self.dtype = store, tuple(taps), dtype
        self.device, self._projection = torch.device(device), projection
        last = {layout.num_layers} if not layout.top_k else set()
        self._read = sorted({*taps, *last})

    def batch(self, rows: Sequence[AnswerRow], lay: Lay = padded) -> TrainingBatch:
        """See `Source`.

        Raises:
            KeyError: a row that is not in the store.
            ValueError: a row whose tokens are not those that are stored under its id.
        """
        layout = lay([len(row.tokens) for row in rows])
        tokens = collate(rows, self.device, layout)
        sizes = self.store.layout
        hidden = {tap: self._zeros(*layout.shape, sizes.hidden_size) for tap in self.taps}
        logits = self._zeros(*layout.shape, sizes.vocab_size)
        for row, (line, first) in zip(rows, layout.places, strict=True):
            stored = self._row(row)
            for tap in self.taps:
                hidden[tap][line, first : first + len(row.tokens)] = stored.hidden[tap].to(
                    self.device, self.dtype
                )
            logits[line, first + stored.places.to(self.device)] = self._logits(stored)
        return TrainingBatch(
            tokens=tokens.tokens,
            loss_mask=tokens.loss_mask,
            hidden=hidden,
            target_logits=logits,
            positions=tokens.positions,
        )

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _row(self, row: AnswerRow) -> StoredRow:
        stored = self.store.get(row.id, self._read, max_len=len(row.tokens))
        if tuple(stored.tokens.tolist()) != row.tokens:
            raise ValueError(
                f"row {row.id!r} has other tokens than the row of that id in "
                f"{str(self.store.folder)!r}; train on the rows of the store itself"
            )
        return stored

    def _logits(self, stored: StoredRow) -> Tensor:
        """Logits [P, V] of a row's places."""
        if stored.logits is not None:
            top = stored.logits.to(self.device)
            return top.dense(self.store.layout.vocab_size, self.dtype)
        assert self._projection is not None
        states = stored.hidden[self.store.layout.num_layers][stored.places]
        weight = next(self._projection.parameters())
        with torch.no_grad():
            logits: Tensor = self._projection(states.to(weight.device, weight.dtype))
        return logits.to(self.device, self.dtype)
