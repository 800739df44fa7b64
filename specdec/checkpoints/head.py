"""A draft head's checkpoint in one form, whatever layout it came from."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

KINDS = ("medusa", "eagle", "eagle3")


@dataclass(frozen=True)
class TargetIdentity:
    """What a head remembers of the target that it was trained for.

    Attributes:
        name: hub id, or the last folder of a path; for people. None where the layout has no name.
        hidden_size: H of the target.
        vocab_size: V of the target; None where the layout does not hold it.
        num_layers: decoder layers of the target; None where the layout does not hold it.
        weights: hash of the signs of a few of its weights; None where the layout does not hold
            one, and for targets that are quantised.
        tokenizer: hash of its vocabulary; None where the layout does not hold one, and for
            targets without a tokenizer.
        facts: its text config as far as it changes what is computed, its stop ids
            ("eos_token_ids") and how it is quantised ("quantization"); None where an older specdec
            wrote the identity.
        magnitudes: tensor -> two figures of sampled weights, see `identity.magnitude`; None as for
            `facts`.
    """

    name: str | None
    hidden_size: int
    vocab_size: int | None = None
    num_layers: int | None = None
    weights: str | None = None
    tokenizer: str | None = None
    facts: dict[str, Any] | None = None
    magnitudes: dict[str, list[float]] | None = None


@dataclass(frozen=True, eq=False)
class HeadCheckpoint:
    """A head as its drafter builds it.

    Attributes:
        kind: one of `KINDS`.
        options: of `specdec.drafters.{kind}.build`, JSON values only; taps are Hugging Face
            `hidden_states` indices.
        tensors: under the names of that module's `state_dict`.
        tree: choices of a static tree that came with it; None for none.
        target: what it was trained for; None if the layout does not say.
        training: how it was trained (data, tokens seen, seconds, loss, acceptance), JSON values.
        layout: it was read from.
    """

    kind: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    tree: list[list[int]] | None = None
    target: TargetIdentity | None = None
    training: dict[str, Any] = field(default_factory=dict)
    layout: str = "specdec"
