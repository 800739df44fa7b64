"""One arm of a comparison: our loop with a drafter, plainly, or transformers `generate`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from specdec.bench.config import ArmConfig, BenchConfig
from specdec.bench.store import Run
from specdec.common.files import parse_json
from specdec.engine.decode import generate
from specdec.engine.draft_length import DraftLength, OnlineController, Schedule
from specdec.engine.interfaces import Drafter
from specdec.registry import load_drafter
from specdec.sampling.config import SamplingConfig
from specdec.targets.hf import HFTarget


def load_draft_length(arm: ArmConfig, drafter: Drafter, target: HFTarget) -> DraftLength | None:
    """What `generate` takes as `draft_length`, built afresh; None for no limit.

    Args:
        arm: with its `draft_length`.
        drafter: of the arm.
        target: what it drafts for.

    Raises:
        FileNotFoundError: the plan is not there.
        ValueError: it holds no controller, or that of another drafter or target.
    """
    option = arm.draft_length
    if option is None:
        return None
    if "plan" not in option:
        return Schedule(option)
    path = Path(option["plan"]).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"draft_length.plan is {str(path)!r} but must be a plan.json that specdec plan wrote"
        )
    try:
        plan = parse_json(path.read_text(encoding="utf-8-sig"))
        step_s = _step_s(plan)
        planned = {**plan.get("target", {})}
        planned["type"] = plan["configurations"][0]["type"] if "configurations" in plan else None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"draft_length.plan {str(path)!r} holds no controller.step_s; give a plan.json that "
            "specdec plan wrote"
        ) from error
    _check_made_for(planned, path, arm, target)
    return OnlineController(step_s, trees=drafter.makes_trees)


def _check_made_for(planned: dict[str, Any], path: Path, arm: ArmConfig, target: HFTarget) -> None:
    """Refuse what another drafter or target costs; a plan written by hand may leave both out."""
    sizes = {"vocab_size": target.vocab_size, "num_layers": target.config.num_hidden_layers}
    sizes["hidden_size"] = target.config.hidden_size
    pairs = [("a drafter of type", planned["type"] or arm.type, arm.type)]
    pairs += [(f"a target of {key}", planned.get(key, size), size) for key, size in sizes.items()]
    for what, made_for, given in pairs:
        if made_for != given:
            raise ValueError(
                f"draft_length.plan {str(path)!r} of {arm.name!r} was made for {what} {made_for}, "
                f"not {given}: a step costs something else there; plan this one, or give a "
                "schedule as in {1: 6, 8: 0}"
            )


def _step_s(plan: dict[str, Any]) -> dict[int, dict[int, float]]:
    """Seconds of a step by batch size and nodes, which JSON keeps under text keys."""
    return {
        int(size): {int(nodes): float(seconds) for nodes, seconds in row.items()}
        for size, row in plan["controller"]["step_s"].items()
    }


class Arm(Protocol):
    """Decodes prompts as a batch.

    Attributes:
        cache_bytes: keys and values of the last batch in the target's cache; None if it was not
            used.
        makes_trees: its drafts may branch.
    """

    cache_bytes: int | None
    makes_trees: bool

    def __call__(self, prompts: Sequence[list[int]], indices: Sequence[int]) -> list[Run]:
        """Decode prompts, given their numbers in the whole bench."""


def build_arms(config: BenchConfig, target: HFTarget) -> dict[str, Arm]:
    """Build every arm afresh, so that nothing one repeat saw helps the next."""
    arms: dict[str, Arm] = {
        "plain": _LoopArm(config, target),
        "hf_generate": _HFArm(config, target, {}),
    }
    for arm in config.arms:
        arms[arm.name] = build_arm(config, target, arm)
    return arms


def build_arm(config: BenchConfig, target: HFTarget, arm: ArmConfig) -> Arm:
    """Build one arm; errors as in `load_drafter`."""
    options = dict(arm.options)
    if arm.type == "hf_prompt_lookup":
        return _HFArm(config, target, {"prompt_lookup_num_tokens": 8, **options})
    if arm.type == "hf_assisted":
        return _HFArm(config, target, _assistant(options, target))
    drafter = load_drafter({"type": arm.type, **options}, target)
    draft_length = load_draft_length(arm, drafter, target)
    return _LoopArm(config, target, drafter, draft_length)


def _assistant(options: dict[str, Any], target: HFTarget) -> dict[str, Any]:
    """Options of transformers' assisted generation with a constant draft length."""
    known = {"path": "demo", "num_draft_tokens": 5}
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"hf_assisted has no option {unknown[0]!r}; known: {', '.join(known)}")
    # The same model as our own arm's, with the same refusals.
    drafter: Any = load_drafter({"type": "draft_model", **known, **options}, target)
    model = drafter.model.model
    model.generation_config.num_assistant_tokens = drafter.num_draft_tokens
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": model}


def _room(config: BenchConfig, target: HFTarget, prompts: Sequence[list[int]]) -> int:
    """New tokens per row: transformers pads, so the longest prompt decides for all, in all arms."""
    return min(config.max_new_tokens, target.max_context_len - max(map(len, prompts)))


class _LoopArm:
    """Our loop, with a drafter or plainly."""

    cache_bytes: int | None = None

    def __init__(
        self,
        config: BenchConfig,
        target: HFTarget,
        drafter: Drafter | None = None,
        draft_length: DraftLength | None = None,
    ) -> None:
        self._config, self._target, self._drafter = config, target, drafter
        self.makes_trees = drafter is not None and drafter.makes_trees
        self._draft_length = draft_length

    def __call__(self, prompts: Sequence[list[int]], indices: Sequence[int]) -> list[Run]:
        config, target = self._config, self._target
        results = generate(
            target,
            self._drafter,
            prompts,
            [SamplingConfig(**vars(config.sampling), seed=config.seed + i) for i in indices],
            max_new_tokens=_room(config, target, prompts),
            batch_size=config.batch_size,
            rule=config.rule,
            draft_length=self._draft_length,
        )
        if any(result.finish_reason == "interrupted" for result in results):
            raise KeyboardInterrupt
        # The last rows may have been few, but each was as large as in a full batch.
        cache = target.cache
        self.cache_bytes = cache.bytes_per_row * min(config.batch_size, len(prompts))
        return [Run(r.tokens, 1, r.ttft_s, r.decode_s, r.records) for r in results]


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


class _OutputPenalties(LogitsProcessor):
    """Presence and frequency penalties as in `SamplingConfig`, which transformers does not have."""

    def __init__(self, presence: float, frequency: float, prompt_len: int) -> None:
        self._presence, self._frequency, self._prompt_len = presence, frequency, prompt_len

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        output = input_ids[:, self._prompt_len :]
        ones = torch.ones_like(output, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, output, ones)
        return scores - self._frequency * counts - self._presence * (counts > 0)


class _HFArm:
    """transformers `generate` on the same model object, prompts and sampling settings."""

    cache_bytes: int | None = None
    makes_trees = False

    def __init__(self, config: BenchConfig, target: HFTarget, options: dict[str, Any]) -> None:
        self._config, self._target, self._options = config, target, options

    def __call__(self, prompts: Sequence[list[int]], indices: Sequence[int]) -> list[Run]:
        size = self._config.batch_size
        room = _room(self._config, self._target, prompts)
        batches = [slice(first, first + size) for first in range(0, len(prompts), size)]
        return [run for b in batches for run in self._decode(prompts[b], indices[b], room)]

    def _decode(self, prompts: Sequence[list[int]], indices: Sequence[int], room: int) -> list[Run]:
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
            torch.manual_seed(self._config.seed + indices[0])
            started = time.perf_counter()
            out = target.model.generate(
                torch.tensor(ids, device=target.device),
                attention_mask=torch.tensor(mask, device=target.device),
                max_new_tokens=room,
                pad_token_id=pad,
                stopping_criteria=[stamps],
                **self._sampling(width),
                **self._options,
            ).tolist()
        return [stamps.run(self._cut(row[width:]), width, started) for row in out]

    def _sampling(self, width: int) -> dict[str, Any]:
        """The bench's sampling settings in transformers' names."""
        sampling = self._config.sampling
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p or None,
            }
        if sampling.repetition_penalty != 1:
            options["repetition_penalty"] = sampling.repetition_penalty
        if sampling.min_new_tokens:
            options["min_new_tokens"] = sampling.min_new_tokens
        presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
        if presence or frequency:
            options["logits_processor"] = [_OutputPenalties(presence, frequency, width)]
        return options

    def _cut(self, tokens: list[int]) -> list[int]:
        eos = set(self._target.eos_token_ids)
        ends = [i + 1 for i, token in enumerate(tokens) if token in eos]
        return tokens[: ends[0]] if ends else tokens


def add_choice(
    plan: dict[str, Any], chosen: Sequence[ArmConfig], arms: Sequence[ArmConfig]
) -> tuple[dict[str, Any], list[ArmConfig]]:
    """Put what a plan chose before the arms that were given.

    A plan knows no draft lengths, and names the shapes that it thinks of itself: what has the name
    of a given arm may be another configuration. It is called "NAME (planned)" then, so that both
    are measured.

    Args:
        plan: the content of `plan.json`.
        chosen: the arm of its choice; none for plain decoding.
        arms: that were given.

    Returns:
        The plan with its configurations under the names of the arms that measure them; and the
        arms, the choice among them once.
    """
    given = {arm.name: arm for arm in arms}
    names = [_name(arm.name, arm.type, arm.options, given) for arm in chosen]
    added = [
        ArmConfig(name, arm.type, arm.options)
        for name, arm in zip(names, chosen, strict=True)
        if name not in given
    ]
    return {
        **plan,
        "choice": _renamed(plan["choice"], given),
        "configurations": [_renamed(row, given) for row in plan["configurations"]],
    }, [*added, *arms]


def _renamed(row: dict[str, Any], given: Mapping[str, ArmConfig]) -> dict[str, Any]:
    return {**row, "name": _name(row["name"], row["type"], row["options"], given)}


def _name(name: str, kind: str, options: dict[str, Any], given: Mapping[str, ArmConfig]) -> str:
    """The name of a configuration: its own, unless a given arm has it and is another one."""
    arm = given.get(name)
    if arm is None or (arm.type, arm.options, arm.draft_length) == (kind, options, None):
        return name
    return _name(f"{name} (planned)", kind, options, given)
