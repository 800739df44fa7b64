"""Decoding some prompts to their end, on the one loop of the engine.

Plain decoding is the same loop with empty drafts, so both arms of a comparison share every line.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from specdec.common.arguments import checked
from specdec.engine.engine import Chunk, DraftLengths, Engine, resolve_target
from specdec.engine.interfaces import Drafter, Target
from specdec.engine.request import Result
from specdec.engine.text import Prompt, split_prompts
from specdec.sampling.config import SamplingConfig
from specdec.verify import Rule

__all__ = ["Chunk", "Stream", "generate", "generate_baseline", "stream"]

Settings = SamplingConfig | Mapping[str, Any] | None
Sampling = Settings | Sequence[Settings]


def generate(
    target: Target | str,
    drafter: Drafter | Mapping[str, Any] | str | None,
    prompts: Prompt | Sequence[Prompt],
    sampling: Sampling = None,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    stop: str | Sequence[str] | None = None,
    max_time_s: float | None = None,
    batch_size: int | None = None,
    rule: str | Rule = "token",
    draft_length: DraftLengths = None,
    check: bool = False,
) -> list[Result]:
    """Decode prompts speculatively to their ends; the output follows the target's distribution.

    A row's output depends on its prompt, its sampling settings and its seed, not on its batch;
    with a `draft_length` that follows the batch (`Schedule`) or other rows (`OnlineController`)
    this holds at temperature 0 and for the rule "match" alone: elsewhere the tokens drawn depend
    on the batch too, and only their distribution does not.
    KeyboardInterrupt ends the call early and returns what there is.

    Args:
        target: the model whose distribution is kept; a string is loaded by `load_target`.
        drafter: proposes tokens; a name or options are loaded by `load_drafter`, None decodes
            plainly.
        prompts: text, chat messages or token ids (lists, arrays, or what a tokenizer returns), one
            per prompt; one such alone is one prompt.
        sampling: one configuration per prompt, or one for all (prompt i then uses seed + i), each
            a `SamplingConfig` or its fields; None is greedy.
        max_new_tokens: tokens to emit per prompt, at most, one number for all or one for each; the
            context may end it earlier.
        stop: a string or several that end a text; they are cut off.
        max_time_s: seconds for the whole call.
        batch_size: rows decoded together, at most; a row that ends makes room for the next
            prompt. None for all prompts at once.
        rule: "token", "block", "traversal", the lossy "typical", or "match", which keeps the draft
            tokens that the target would have drawn without a draft: it accepts less, and what it
            emits depends on the prompt and the seed alone, whatever the drafter (Daliri et al.
            2024, arXiv 2408.07978). At temperature 0 all accept what equals the target's argmax.
        draft_length: chooses before every step how many nodes the rows may draft; None leaves it
            to the drafter, a number holds for all batch sizes and a mapping is a `Schedule`. An
            `OnlineController` learns it.
        check: also check every draft of a registered drafter; those of others always are.

    Returns:
        One result per prompt, in order.

    Raises:
        ValueError: a prompt, an option or a combination that cannot work, by name.
        TypeError: an argument of a wrong kind, by name.
        FloatingPointError: the target's logits are not finite.
        RuntimeError: another loop has rows on this target or drafter.

    Source: Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.
    """
    run = stream(
        target,
        drafter,
        prompts,
        sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        max_time_s=max_time_s,
        batch_size=batch_size,
        rule=rule,
        draft_length=draft_length,
        check=check,
    )
    with suppress(KeyboardInterrupt):  # unfinished rows say "interrupted"
        for _ in run.steps():
            pass
    return run.results()


def generate_baseline(
    target: Target | str,
    prompts: Prompt | Sequence[Prompt],
    sampling: Sampling = None,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    stop: str | Sequence[str] | None = None,
    max_time_s: float | None = None,
    batch_size: int | None = None,
    rule: str | Rule = "token",
) -> list[Result]:
    """Decode plainly, one token per forward, in the same loop; arguments as in `generate`."""
    return generate(
        target,
        None,
        prompts,
        sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        max_time_s=max_time_s,
        batch_size=batch_size,
        rule=rule,
    )


@checked
def stream(
    target: Target | str,
    drafter: Drafter | Mapping[str, Any] | str | None,
    prompts: Prompt | Sequence[Prompt],
    sampling: Sampling = None,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    stop: str | Sequence[str] | None = None,
    max_time_s: float | None = None,
    batch_size: int | None = None,
    rule: str | Rule = "token",
    draft_length: DraftLengths = None,
    check: bool = False,
) -> "Stream":
    """Decode as `generate` does, with its arguments and errors, and yield `Chunk`s as they come."""
    target, rows = resolve_target(target), split_prompts(prompts)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1")
    max_rows = min(batch_size or len(rows), len(rows))
    limits = _one_each("max_new_tokens", max_new_tokens, len(rows))
    configs = [SamplingConfig.of(each) for each in _one_each("sampling", sampling, len(rows))]
    if not isinstance(sampling, Sequence):
        # Prompts that share one configuration still draw their own numbers.
        configs = [replace(c, seed=(int(c.seed) + i) % 2**63) for i, c in enumerate(configs)]
    engine = Engine(
        target, drafter, max_rows=max_rows, rule=rule, draft_length=draft_length, check=check
    )
    ids = [
        engine.submit(prompt, config, max_new_tokens=limit, stop=stop, max_time_s=max_time_s)
        for prompt, config, limit in zip(rows, configs, limits, strict=True)
    ]
    return Stream(engine, ids)


def _one_each(name: str, given: Any, num_prompts: int) -> list[Any]:
    """Return one entry a prompt; anything but a list is shared."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [given] * num_prompts
    if len(given) != num_prompts:
        raise ValueError(f"{name} has {len(given)} entries for {num_prompts} prompts; give as many")
    return list(given)


class Stream:
    """Requests of one call; iterate for the `Chunk`s of each step, prompt by prompt.

    Text that may still become a stop string or half a character is held back until it is settled.
    """

    def __init__(self, engine: Engine, ids: Sequence[int]) -> None:
        self._engine, self._ids = engine, list(ids)

    def __iter__(self) -> Iterator[Chunk]:
        for chunks in self._run(self._engine.step):
            yield from chunks

    def steps(self) -> Iterator[list[Chunk]]:
        """Decode a step at a time, all its prompts together, tokens only: `text` stays empty."""
        return self._run(self._engine.advance)

    def _run(self, step: Callable[[], list[Chunk]]) -> Iterator[list[Chunk]]:
        try:
            while self._engine.num_waiting or self._engine.num_running:
                chunks = step()
                for chunk in chunks:
                    if chunk.finish_reason == "error":
                        raise FloatingPointError(self._engine.peek(chunk.index).error)
                yield chunks
        finally:
            self._engine.preempt()  # who leaves early leaves the target to others

    def results(self) -> list[Result]:
        """Return one result per prompt, in order; unfinished ones say "interrupted"."""
        return [self._engine.peek(index) for index in self._ids]
