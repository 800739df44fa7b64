"""What a feature store is asked to keep."""

from dataclasses import dataclass

from specdec.data.feature_layout import GROUP_SIZE


@dataclass(frozen=True)
class FeatureOptions:
    """What to keep, and how to go about it.

    Attributes:
        taps: see `resolve_taps`.
        dtype: of the taps: "bf16", "int8" or "float32".
        group_size: channels that share a scale in int8; 0: all of a token.
        top_k: logits kept where the next token is an answer's; 0: none, they are then computed
            from the last tap.
        max_len: rows are cut to so many tokens; None: the target's context.
        batch_tokens: padded tokens that the target reads at once.
        shard_mib: MiB of a file; this much is held in memory, and lost to a kill.
    """

    taps: str = "eagle3,eagle"
    dtype: str = "bf16"
    group_size: int = GROUP_SIZE
    top_k: int = 64
    max_len: int | None = None
    batch_tokens: int = 4096
    shard_mib: int = 512

    def __post_init__(self) -> None:
        for name in ("max_len", "batch_tokens", "shard_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value} but must be at least 1")
