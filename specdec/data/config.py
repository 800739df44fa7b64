"""Settings of collections and feature stores; options come from them, so little is loaded."""

from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from specdec.common.config import Config

Format = Literal["jsonl", "json", "text", "csv", "tsv", "parquet"]


class CollectSettings(Config):
    """How queries are read, cleaned and split."""

    format: Format | None = Field(
        None, description=f"format of files: {', '.join(get_args(Format))}"
    )
    column: str | None = Field(None, description="column of a record with what was asked")
    split: str | None = Field(None, description="split of a data set; train if not given")
    subset: str | None = Field(None, description="subset of a data set of the hub")
    turns: Literal["all", "last", "first"] = Field(
        "all", description="user turns of conversations to take: all, last or first"
    )
    domain: str | None = Field(None, description="domain of all queries")
    domain_field: str = Field("domain", description="field of a record with its domain")
    mask: bool = Field(True, description="mask addresses, numbers, cards and keys")
    phone_region: str = Field("US", description="region of national phone numbers")
    min_chars: int = Field(1, ge=1, description="least length of the last user turn")
    max_chars: int = Field(32_000, ge=1, description="greatest length of a whole query")
    near_duplicates: float = Field(
        0.8, ge=0, le=1, description="similarity to drop a query; 0 keeps all"
    )
    held_out: float = Field(0.1, ge=0, lt=1, description="share of conversations to hold out")
    num: int | None = Field(None, ge=1, description="number of queries, drawn by hash")
    seed: int = Field(0, description="seed of the draw")
    tag_language: bool = Field(False, description="tag the language of every query")
    max_bad: int = Field(100, ge=0, description="malformed lines to skip before stopping")

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.max_chars < self.min_chars:
            raise ValueError(f"max_chars is {self.max_chars} but must be at least min_chars")
        return self


class FeatureOptions(Config):
    """Options of `specdec features`: what to keep, and how to go about it."""

    taps: str = Field(
        default="eagle3,eagle",
        description="taps: head kinds, keys_values, hidden_states indices, with commas; none",
    )
    dtype: Literal["bf16", "float32"] = Field(
        default="bf16", description="dtype of the taps: bf16 or float32"
    )
    top_k: int = Field(
        default=64,
        ge=0,
        description="logits kept for each token; 0 computes them from the last tap",
    )
    max_len: int | None = Field(
        default=None, ge=1, description="tokens that rows are cut to; the context by default"
    )
    batch_tokens: int = Field(
        default=4096, ge=1, description="padded tokens that the target reads at once"
    )
    shard_mib: int = Field(
        default=512, ge=1, description="size of a file in MiB, which is held in memory"
    )
