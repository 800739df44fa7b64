"""One arm of a comparison: our loop with a drafter, plainly, or transformers `generate`."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from specdec.bench.config import ArmConfig, BenchConfig
from specdec.decode import generate
from specdec.metrics import StepRecord
from specdec.registry import load_drafter
from specdec.sampling_config import SamplingConfig
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target


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


Arm = Callable[[Sequence[list[int]], int], list[Run]]


def build_arms(config: BenchConfig, target: HFTarget) -> dict[str, Arm]:
    """Build every arm afresh, so that nothing one repeat saw helps the next."""
    arms: dict[str, Arm] = {
        "plain": _loop_arm(config, target, None),
        "hf_generate": _HFArm(config, target, {}),
    }
    for arm in config.arms:
        arms[arm.name] = _build(config, target, arm)
    return arms


def _build(config: BenchConfig, target: HFTarget, arm: ArmConfig) -> Arm:
    options = dict(arm.options)
    if arm.type == "hf_prompt_lookup":
        return _HFArm(config, target, {"prompt_lookup_num_tokens": 8, **options})
    if arm.type == "hf_assisted":
        return _HFArm(config, target, _assistant(options, target))
    return _loop_arm(config, target, load_drafter({"type": arm.type, **options}, target))


def _assistant(options: dict[str, Any], target: HFTarget) -> dict[str, Any]:
    """Options of transformers' assisted generation with a constant draft length."""
    from specdec.demo import demo_path

    path = options.pop("path", "demo")
    where = str(demo_path("draft")) if path == "demo" else path
    model = load_target(where, dtype=target.model.dtype, device=target.device).model
    model.generation_config.num_assistant_tokens = int(options.pop("num_draft_tokens", 5))
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    if options:
        raise ValueError(
            f"hf_assisted has no option {min(options)!r}; known: path, num_draft_tokens"
        )
    return {"assistant_model": model}


def _loop_arm(config: BenchConfig, target: HFTarget, drafter: Any) -> Arm:
    def run(prompts: Sequence[list[int]], first_index: int) -> list[Run]:
        sampling = [
            SamplingConfig(**vars(config.sampling), seed=config.seed + first_index + i)
            for i in range(len(prompts))
        ]
        results = generate(
            target,
            drafter,
            prompts,
            sampling,
            max_new_tokens=config.max_new_tokens,
            rule=config.rule,
        )
        if any(result.finish_reason == "interrupted" for result in results):
            raise KeyboardInterrupt
        return [Run(r.tokens, 1, r.ttft_s, r.decode_s, r.records) for r in results]

    return run


class _Stamps:
    """A stopping criterion that never stops; it notes when each length was reached."""

    def __init__(self) -> None:
        self.reached: list[tuple[int, float]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            # transformers waits for the device right after this call in any case.
            torch.cuda.synchronize(input_ids.device)
        self.reached.append((input_ids.shape[1], time.perf_counter()))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def run(self, tokens: list[int], width: int, started: float) -> Run:
        """The run of a row: it ended with its own last token, not with the batch's."""
        first_len, first_s = self.reached[0]
        last_s = next(when for length, when in self.reached if length - width >= len(tokens))
        num_first = min(first_len - width, len(tokens))
        return Run(tokens, num_first, first_s - started, last_s - first_s)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _HFArm:
    """transformers `generate` on the same model object, prompts and sampling settings."""

    def __init__(self, config: BenchConfig, target: HFTarget, options: dict[str, Any]) -> None:
        self._target, self._options = target, options
        self._seed, self._max_new_tokens = config.seed, config.max_new_tokens
        sampling = config.sampling
        self._sampling: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            self._sampling |= {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p or None,
            }
        if sampling.repetition_penalty != 1:
            self._sampling["repetition_penalty"] = sampling.repetition_penalty

    def __call__(self, prompts: Sequence[list[int]], first_index: int) -> list[Run]:
        target = self._target
        width = max(map(len, prompts))
        pad = target.eos_token_ids[0] if target.eos_token_ids else 0
        ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        stamps = _Stamps()
        # The checkpoint's own defaults (a penalty, a top-k) are not what is compared.
        defaults = GenerationConfig(eos_token_id=list(target.eos_token_ids) or None)
        with (
            _replaced(target.model, "generation_config", defaults),
            torch.random.fork_rng(),
        ):
            torch.manual_seed(self._seed + first_index)
            started = time.perf_counter()
            out = target.model.generate(
                torch.tensor(ids, device=target.device),
                attention_mask=torch.tensor(mask, device=target.device),
                max_new_tokens=min(self._max_new_tokens, target.max_context_len - width),
                pad_token_id=pad,
                stopping_criteria=[stamps],
                **self._sampling,
                **self._options,
            ).tolist()
        return [stamps.run(self._cut(row[width:]), width, started) for row in out]

    def _cut(self, tokens: list[int]) -> list[int]:
        eos = set(self._target.eos_token_ids)
        ends = [i + 1 for i, token in enumerate(tokens) if token in eos]
        return tokens[: ends[0]] if ends else tokens
