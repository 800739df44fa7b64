"""The only decoding loop: prefill, then draft, score, verify, commit until every row has ended.

Plain decoding is the same loop with empty drafts, so both arms of a comparison share every line.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from specdec.batch import Batch
from specdec.draft_length import DraftLength
from specdec.interfaces import Drafter, Target
from specdec.request import Prompt, Request, Result, StopRules, encode
from specdec.sampling_config import SamplingConfig
from specdec.text import TextStream
from specdec.verify import get_rule

Sampling = SamplingConfig | Sequence[SamplingConfig]
Limits = int | Sequence[int]


@dataclass(frozen=True)
class Chunk:
    """What one step added to one prompt; `finish_reason` is None until its last chunk."""

    index: int
    tokens: list[int]
    text: str
    finish_reason: str | None


class _Call:
    """One call of `generate` or `stream`: its requests, some running and some waiting."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        rules: list[StopRules],
        batch_size: int | None,
        rule: str,
        draft_length: DraftLength | None,
    ) -> None:
        self.target, self.drafter, self.rule = target, drafter, rule
        self.draft_length = draft_length
        configs = _configs(sampling, len(prompts))
        self.batch_size = _check(target, drafter, len(prompts), batch_size, rules[0], rule)
        self.deadline = time.perf_counter() + (rules[0].max_time_s or float("inf"))
        ids = [encode(prompt, target, index) for index, prompt in enumerate(prompts)]
        self.requests = [
            Request(i, prompt, config, limits, target)
            for i, (prompt, config, limits) in enumerate(zip(ids, configs, rules, strict=True))
        ]

    @torch.inference_mode()
    def run(self) -> Iterator[list[tuple[Request, int]]]:
        """Decode everything, a step at a time: rows and their numbers of new tokens.

        A row that finishes makes room for the next prompt at once, so that the batch stays full.
        """
        batch = Batch(self.target, self.drafter, self.rule, self.draft_length)
        waiting = deque(self.requests)
        while waiting or batch.rows:
            room = min(self.batch_size - len(batch.rows), len(waiting))
            news = batch.admit([waiting.popleft() for _ in range(room)]) if room else batch.step()
            if time.perf_counter() > self.deadline:
                waiting.clear()
                for request in self.requests:
                    request.finish_reason = request.finish_reason or "time"
            yield news
            batch.retire()


def _configs(sampling: Sampling, num_prompts: int) -> list[SamplingConfig]:
    if isinstance(sampling, SamplingConfig):
        # Prompts that share one configuration still draw their own numbers.
        return [replace(sampling, seed=sampling.seed + i) for i in range(num_prompts)]
    if len(sampling) != num_prompts:
        raise ValueError(
            f"sampling has {len(sampling)} entries for {num_prompts} prompts; give one for all "
            "or one for each"
        )
    return list(sampling)


def _rules(
    max_new_tokens: Limits, stop: Sequence[str], max_time_s: float | None, num_prompts: int
) -> list[StopRules]:
    """The rules of every prompt; at least one, so that what they share can be read off it."""
    if isinstance(max_new_tokens, int):
        return [StopRules(max_new_tokens, tuple(stop), max_time_s)] * max(1, num_prompts)
    if len(max_new_tokens) != num_prompts or not num_prompts:
        raise ValueError(
            f"max_new_tokens has {len(max_new_tokens)} entries for {num_prompts} prompts; give "
            "one for all or one for each"
        )
    return [StopRules(limit, tuple(stop), max_time_s) for limit in max_new_tokens]


def _check(
    target: Target,
    drafter: Drafter | None,
    num_prompts: int,
    batch_size: int | None,
    rules: StopRules,
    rule: str,
) -> int:
    """Refuse what the target or the rule cannot do; returns the batch size."""
    if num_prompts == 0:
        raise ValueError("prompts is empty but must hold at least one prompt")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1")
    size = min(batch_size or num_prompts, num_prompts)
    if size > 1 and not target.capabilities.batched:
        raise ValueError(f"batch_size is {size} but this target takes one row; pass batch_size=1")
    if rules.stop and target.tokenizer is None:
        raise ValueError("stop strings need a target with a tokenizer")
    chosen_rule = get_rule(rule)
    makes_trees = drafter is not None and drafter.makes_trees
    if makes_trees and not chosen_rule.supports_trees:
        raise ValueError(f"rule {rule!r} judges chains only but this drafter makes trees")
    if makes_trees and not target.capabilities.trees:
        raise ValueError("this target scores chains only but the drafter makes trees")
    return size


def generate(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Prompt],
    sampling: Sampling = SamplingConfig(),  # noqa: B008 (frozen)
    *,
    max_new_tokens: Limits = 128,
    stop: Sequence[str] = (),
    max_time_s: float | None = None,
    batch_size: int | None = None,
    rule: str = "token",
    draft_length: DraftLength | None = None,
) -> list[Result]:
    """Decode prompts speculatively; the output follows the target's own distribution.

    A row's output depends on its prompt, its sampling settings and its seed, not on its batch.
    KeyboardInterrupt ends the call early and returns what there is.

    Args:
        target: the model whose distribution is kept.
        drafter: proposes tokens; None decodes plainly.
        prompts: text, chat messages or token ids, one per prompt.
        sampling: one configuration per prompt, or one for all (prompt i then uses seed + i).
        max_new_tokens: tokens to emit per prompt, at most, one number for all or one for each; the
            context may end it earlier.
        stop: strings that end a text; they are cut off.
        max_time_s: seconds for the whole call.
        batch_size: rows decoded together, at most; a row that ends makes room for the next
            prompt. None for all prompts at once.
        rule: "token", "block", "traversal", the lossy "typical", or "match", which keeps the draft
            tokens that equal what the target would have drawn without a draft: it accepts less,
            and what it emits depends on the prompt and the seed alone, whatever the drafter (Daliri
            et al. 2024, arXiv 2408.07978). At temperature 0 all of them accept what equals the
            target's argmax.
        draft_length: chooses before every step how many nodes the rows may draft; None leaves it
            to the drafter. See `Schedule` and `OnlineController`.

    Returns:
        One result per prompt, in order.

    Raises:
        ValueError: a prompt, an option or a combination that cannot work, by name.
        FloatingPointError: the target's logits are not finite.

    Source: Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318.
    """
    rules = _rules(max_new_tokens, stop, max_time_s, len(prompts))
    call = _Call(target, drafter, prompts, sampling, rules, batch_size, rule, draft_length)
    try:
        for _ in call.run():
            pass
    except KeyboardInterrupt:
        pass  # unfinished rows say "interrupted"
    return [request.result() for request in call.requests]


def generate_baseline(
    target: Target,
    prompts: Sequence[Prompt],
    sampling: Sampling = SamplingConfig(),  # noqa: B008 (frozen)
    **options: object,
) -> list[Result]:
    """Decode plainly, one token per forward, in the same loop; options as in `generate`."""
    return generate(target, None, prompts, sampling, **options)  # type: ignore[arg-type]


class Stream:
    """Decodes as `generate` does and yields what each step added, prompt by prompt.

    Iterate it for `Chunk`s; `results()` afterwards, or at any time, gives what there is. Text that
    may still become a stop string or half a character is held back until it is settled. Arguments
    and errors are those of `generate`.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        prompts: Sequence[Prompt],
        sampling: Sampling = SamplingConfig(),  # noqa: B008 (frozen)
        *,
        max_new_tokens: Limits = 128,
        stop: Sequence[str] = (),
        max_time_s: float | None = None,
        batch_size: int | None = None,
        rule: str = "token",
        draft_length: DraftLength | None = None,
    ) -> None:
        rules = _rules(max_new_tokens, stop, max_time_s, len(prompts))
        self._call = _Call(
            target, drafter, prompts, sampling, rules, batch_size, rule, draft_length
        )
        self._texts = [TextStream(target.tokenizer, stop) for _ in self._call.requests]

    def steps(self) -> Iterator[list[Chunk]]:
        """Decode a step at a time, all its prompts together, tokens only: `text` stays empty."""
        for news in self._call.run():
            yield [
                Chunk(
                    row.index, row.tokens[len(row.tokens) - count :], "", row.finish_reason or None
                )
                for row, count in news
            ]

    def __iter__(self) -> Iterator[Chunk]:
        for chunks in self.steps():
            for chunk in chunks:
                text = self._texts[chunk.index].push(chunk.tokens, bool(chunk.finish_reason))
                yield replace(chunk, text=text)

    def results(self) -> list[Result]:
        """One result per prompt, in order; unfinished ones say "interrupted"."""
        return [request.result() for request in self._call.requests]


stream = Stream
