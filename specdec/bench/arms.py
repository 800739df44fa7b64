"""Arms of a comparison: our engine with a drafter or plainly, and transformers `generate`."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from specdec.bench.config import ArmConfig, ConcurrentConfig, RunConfig, SamplingOptions
from specdec.bench.measure import Arm, Requests, serve
from specdec.bench.store import Run
from specdec.common.files import read_json
from specdec.engine.draft_length import DraftLength, OnlineController, Schedule
from specdec.engine.engine import Engine
from specdec.engine.interfaces import Drafter
from specdec.registry import load_drafter
from specdec.targets.hf import HFTarget


@dataclass(frozen=True)
class Decoding:
    """Settings that all arms share.

    Attributes:
        sampling: settings of every request.
        rule: verification rule of our engine.
        max_rows: requests decoded together, at most.
        max_cache_bytes: limit of the engine's caches; None for no limit.
    """

    sampling: SamplingOptions
    rule: str = "token"
    max_rows: int = 1
    max_cache_bytes: int | None = None


def decoding_of(config: RunConfig) -> Decoding:
    """The part of a configuration that arms need."""
    limit = config.max_cache_bytes if isinstance(config, ConcurrentConfig) else None
    return Decoding(config.sampling, config.rule, config.rows, limit)


def build_arms(config: RunConfig, target: HFTarget) -> dict[str, Arm]:
    """Build every arm afresh, so that nothing it saw before helps it."""
    decoding = decoding_of(config)
    baselines = [ArmConfig(type=name) for name in config.baselines]
    return {arm.name: build_arm(arm, target, decoding) for arm in (*baselines, *config.arms)}


def build_arm(arm: ArmConfig, target: HFTarget, decoding: Decoding) -> Arm:
    """Build one arm; errors as in `load_drafter`."""
    if arm.type == "plain":
        return EngineArm(target, decoding)
    if arm.type == "hf_generate":
        return HFArm(target, decoding, {})
    if arm.type == "hf_prompt_lookup":
        return HFArm(target, decoding, {"prompt_lookup_num_tokens": 8, **arm.options})
    if arm.type == "hf_assisted":
        return HFArm(target, decoding, _assistant(arm.options, target))
    drafter = load_drafter({"type": arm.type, **arm.options}, target)
    return EngineArm(target, decoding, drafter, load_draft_length(arm, drafter, target))


def load_draft_length(arm: ArmConfig, drafter: Drafter, target: HFTarget) -> DraftLength | None:
    """Build what limits an arm's drafts; None for no limit.

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
        plan = read_json(path)
        # JSON keeps batch sizes and nodes under text keys.
        step_s = {
            int(size): {int(nodes): float(seconds) for nodes, seconds in row.items()}
            for size, row in plan["controller"]["step_s"].items()
        }
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
    """Refuse costs of another drafter or target; a plan written by hand may leave both out."""
    sizes = {"vocab_size": target.vocab_size, "num_layers": target.config.num_hidden_layers}
    sizes["hidden_size"] = target.config.hidden_size
    pairs = [("a drafter of type", planned["type"] or arm.type, arm.type)]
    pairs += [(f"a target of {key}", planned.get(key, size), size) for key, size in sizes.items()]
    for noun, made_for, given in pairs:
        if made_for != given:
            raise ValueError(
                f"draft_length.plan {str(path)!r} of {arm.name!r} was made for {noun} {made_for}, "
                f"not {given}: a step costs something else there; plan this one, or give a "
                "schedule as in {1: 6, 8: 0}"
            )


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


class EngineArm:
    """Our engine, with a drafter or plainly."""

    cache_bytes: int | None = None

    def __init__(
        self,
        target: HFTarget,
        decoding: Decoding,
        drafter: Drafter | None = None,
        draft_length: DraftLength | None = None,
    ) -> None:
        self._target, self._decoding, self._drafter = target, decoding, drafter
        self.makes_trees = drafter is not None and drafter.makes_trees
        self._draft_length = draft_length

    def __call__(self, requests: Requests, after_step: Callable[[], None]) -> list[Run | str]:
        """Serve the requests with an engine of their own."""
        decoding = self._decoding
        engine = Engine(
            self._target,
            self._drafter,
            max_rows=min(decoding.max_rows, len(requests)),
            max_cache_bytes=decoding.max_cache_bytes,
            rule=decoding.rule,
            draft_length=self._draft_length,
        )
        rows = serve(engine, requests, decoding.sampling, after_step)
        self.cache_bytes = engine.peak_cache_bytes
        return rows


class _Stamps:
    """A stopping criterion that never stops; it notes when each length was reached."""

    def __init__(self) -> None:
        self.reached: list[tuple[int, float]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
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


class _OutputPenalties(LogitsProcessor):
    """Presence and frequency penalties as in `SamplingConfig`, which transformers does not have."""

    def __init__(self, presence: float, frequency: float, prompt_len: int) -> None:
        self._presence, self._frequency, self._prompt_len = presence, frequency, prompt_len

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        output = input_ids[:, self._prompt_len :]
        ones = torch.ones_like(output, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, output, ones)
        return scores - self._frequency * counts - self._presence * (counts > 0)


class HFArm:
    """transformers `generate` on the same model object, prompts and sampling settings.

    It decodes one batch of `max_rows` prompts after the other.
    """

    cache_bytes: int | None = None
    makes_trees = False

    def __init__(self, target: HFTarget, decoding: Decoding, options: dict[str, Any]) -> None:
        self._target, self._decoding, self._options = target, decoding, options

    def __call__(self, requests: Requests, after_step: Callable[[], None]) -> list[Run | str]:
        """Decode the requests, batch after batch."""
        size = self._decoding.max_rows
        batches = [requests[first : first + size] for first in range(0, len(requests), size)]
        return [run for batch in batches for run in self._decode(batch)]

    def _decode(self, batch: Requests) -> list[Run]:
        target = self._target
        prompts = [request.prompt for request in batch]
        width = max(map(len, prompts))
        pad = target.eos_token_ids[0] if target.eos_token_ids else 0
        ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        stamps = _Stamps()
        with self._own_defaults(), torch.random.fork_rng():
            torch.manual_seed(batch[0].seed)
            started = time.perf_counter()
            out = target.model.generate(
                torch.tensor(ids, device=target.device),
                attention_mask=torch.tensor(mask, device=target.device),
                max_new_tokens=batch[0].max_new_tokens,
                pad_token_id=pad,
                stopping_criteria=[stamps],
                **_in_transformers_names(self._decoding.sampling, width),
                **self._options,
            ).tolist()
        return [stamps.run(self._cut(row[width:]), width, started) for row in out]

    @contextmanager
    def _own_defaults(self) -> Iterator[None]:
        """The checkpoint's own defaults (a penalty, a top-k) are not what is compared."""
        model, before = self._target.model, self._target.model.generation_config
        model.generation_config = GenerationConfig(
            eos_token_id=list(self._target.eos_token_ids) or None
        )
        try:
            yield
        finally:
            model.generation_config = before

    def _cut(self, tokens: list[int]) -> list[int]:
        eos = set(self._target.eos_token_ids)
        ends = [i + 1 for i, token in enumerate(tokens) if token in eos]
        return tokens[: ends[0]] if ends else tokens


def _in_transformers_names(sampling: SamplingOptions, prompt_len: int) -> dict[str, Any]:
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
        options["logits_processor"] = [_OutputPenalties(presence, frequency, prompt_len)]
    return options


def add_choice(plan: Any, arms: Sequence[ArmConfig]) -> tuple[Any, list[ArmConfig]]:
    """Put what a plan chose before the arms that were given.

    A plan knows no draft lengths, and names the shapes that it thinks of itself: what has the name
    of a given arm may be another configuration. It is called "NAME (planned)" then, so that both
    are measured.

    Args:
        plan: a `planning.results.Plan`; a choice of type "plain" adds no arm.
        arms: arms that were given.

    Returns:
        The plan with its configurations under the names of the arms that measure them; and the
        arms, the choice among them once.
    """
    given = {arm.name: arm for arm in arms}

    def renamed(row: Any) -> Any:
        name = row.name
        own = row.type, row.options, None
        while (arm := given.get(name)) and (arm.type, arm.options, arm.draft_length) != own:
            name = f"{name} (planned)"
        return row.model_copy(update={"name": name})

    choice = renamed(plan.choice)
    configurations = [renamed(row) for row in plan.configurations]
    added = []
    if choice.type != "plain" and choice.name not in given:
        added = [ArmConfig(name=choice.name, type=choice.type, options=dict(choice.options))]
    renamed_plan = plan.model_copy(update={"choice": choice, "configurations": configurations})
    return renamed_plan, [*added, *arms]
