"""What a call gave when one arm decoded its prompts once."""

from dataclasses import dataclass, field

from specdec.metrics import StepRecord

Key = tuple[int, int, str]  # repeat, call, arm


@dataclass(frozen=True)
class Run:
    """One prompt decoded once by one arm.

    Attributes:
        tokens: emitted ids, cut after the first end-of-sequence token, counted alike in all arms.
        num_first: tokens of the first chunk, which the decode speed leaves out.
        ttft_s: seconds to the first chunk.
        decode_s: seconds from the first chunk to the last.
        records: verify steps; empty for transformers' arms.
    """

    tokens: list[int]
    num_first: int
    ttft_s: float
    decode_s: float
    records: list[StepRecord] = field(default_factory=list)


Table = list[list[Run | None]]  # [prompt][repeat]; None where it failed


@dataclass(frozen=True)
class Memory:
    """Memory as a batch left it.

    Attributes:
        peak_rss_bytes: largest resident size of the process so far.
        peak_device_bytes: most that was allocated on the CUDA device during the batch, the models
            of all arms included; None on a CPU.
        cache_bytes: keys and values of all rows in the target's cache; None for transformers' own.
    """

    peak_rss_bytes: int
    peak_device_bytes: int | None
    cache_bytes: int | None


@dataclass(frozen=True)
class Outcome:
    """What one call gave.

    Attributes:
        rows: a run for each prompt, or the reason why there is none.
        wall_s: seconds of the whole call, prefills included; None if a prompt failed.
        memory: see `Memory`.
    """

    rows: list[Run | str]
    wall_s: float | None
    memory: Memory

    @property
    def runs(self) -> list[Run]:
        """Of the prompts that did not fail."""
        return [row for row in self.rows if isinstance(row, Run)]
