"""Arms of a comparison: our engine with a drafter or plainly, and transformers `generate`."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, StaticCache

from specdec.bench.config import SINGLE_PROMPT_TYPES, ArmConfig, RunConfig, SamplingOptions
from specdec.bench.measure import Arm, Requests, Run, serve
from specdec.common.compile import as_target, compile_mode
from specdec.common.files import first_line, read_json
from specdec.engine.draft_length import DraftLength, OnlineController, Schedule
from specdec.engine.engine import Engine
from specdec.engine.interfaces import Drafter
from specdec.engine.scheduler import is_out_of_memory
from specdec.registry import load_drafter
from specdec.targets.hf import HFTarget


def build_arms(config: RunConfig, target: HFTarget) -> dict[str, Arm]:
    """Build every arm afresh, so that nothing it saw before helps it."""
    return {arm.name: build_arm(arm, target, config) for arm in config.all_arms}


def build_arm(arm: ArmConfig, target: HFTarget, config: RunConfig) -> Arm:
    """Build one arm; errors as in `load_drafter`, and for what it cannot do with this rule."""
    if arm.type in ("hf_generate", *SINGLE_PROMPT_TYPES):
        return HFArm(config, target, _hf_options(arm, target))
    drafter = None
    if arm.type != "plain":
        drafter = load_drafter({"type": arm.type, **arm.options}, target)
    return EngineArm(
        config,
        target=target,
        drafter=drafter,
        max_cache_bytes=getattr(config, "max_cache_bytes", None),
        rule=config.rule,
        draft_length=drafter and load_draft_length(arm, drafter, target),
        compile_mode=mode_of(target, arm),
    )


def mode_of(target: HFTarget, arm: ArmConfig | None = None) -> str:
    """The target's compile mode, or where that is eager, that of an arm's drafter."""
    mode = compile_mode(as_target(None, target), target.device)
    own = arm.options.get("compile") if arm and mode == "eager" else None
    return compile_mode(own, target.device) if own else mode


def load_draft_length(arm: ArmConfig, drafter: Drafter, target: HFTarget) -> DraftLength | None:
    """Build what limits an arm's drafts; a plan of another drafter or target is a `ValueError`."""
    option = arm.draft_length
    if option is None or "plan" not in option:
        return None if option is None else Schedule(option)
    path = Path(option["plan"]).expanduser()
    try:
        plan = read_json(path)
        costs = plan["controller"]["step_s"]  # JSON keeps its keys as text
        step_s = TypeAdapter(dict[int, dict[int, float]]).validate_python(costs)
        planned = dict(plan.get("target", {}))  # a plan written by hand may leave out both
        if "configurations" in plan:
            planned["drafter"] = plan["configurations"][0]["type"]
        if "provenance" in plan:
            planned["compile_mode"] = plan["provenance"].get("compile_mode", "eager")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"draft_length.plan {str(path)!r} holds no controller.step_s; give a plan.json that "
            "specdec plan wrote"
        ) from error
    ours = {
        "drafter": arm.type,
        "vocab_size": target.vocab_size,
        "num_layers": target.config.num_hidden_layers,
        "hidden_size": target.config.hidden_size,
        "compile_mode": mode_of(target),
    }
    for key, given in ours.items():
        if planned.get(key, given) != given:
            raise ValueError(
                f"draft_length.plan {str(path)!r} of {arm.name!r} was made for {key} "
                f"{planned[key]}, not {given}; plan this one, or give a schedule, {{1: 6, 8: 0}}"
            )
    return OnlineController(step_s, trees=drafter.makes_trees)


class EngineArm:
    """Our engine, with a drafter or plainly; options are those of `Engine`."""

    cache_bytes: int | None = None

    def __init__(self, config: RunConfig, *, compile_mode: str, **options: Any) -> None:
        self._config, self._options, self.compile_mode = config, options, compile_mode
        Engine(**options, max_rows=config.rows)  # refuses what does not go together

    def __call__(self, requests: Requests, after_step: Callable[[], None]) -> list[Run | str]:
        engine = Engine(**self._options, max_rows=min(self._config.rows, len(requests)))
        rows = serve(engine, requests, self._config.sampling, after_step)
        self.cache_bytes = engine.peak_cache_bytes
        return rows


# --- transformers ---

_COMPILED = ("_compiled_call", "_last_compile_config")  # attributes of a model that it compiled


class HFArm:
    """transformers `generate` on the same model object, prompts and sampling settings.

    It decodes one batch of prompts after the other. Batches whose size is in `cache_lens` run in
    transformers' fastest mode, a compiled forward over a static cache, whose length stays the same
    from prompt to prompt, for another one would be compiled anew. The first batch of a size, which
    the warm-up has, compiles; one of another size, as after a failure, is decoded eagerly.
    """

    cache_bytes: int | None = None
    compile_mode = "eager"

    def __init__(
        self,
        config: RunConfig,
        target: HFTarget,
        options: dict[str, Any],
        cache_lens: Mapping[int, int] | None = None,
    ) -> None:
        self._config, self._target, self._options = config, target, options
        self._cache_lens = dict(cache_lens or {})
        self._caches: dict[int, StaticCache] = {}
        self._compiled: dict[str, Any] = {}  # what transformers keeps on the model

    def __call__(self, requests: Requests, after_step: Callable[[], None]) -> list[Run | str]:
        size = self._config.rows
        batches = [requests[first : first + size] for first in range(0, len(requests), size)]
        return [run for batch in batches for run in self._decode(batch)]

    def _decode(self, batch: Requests) -> list[Run]:
        target, size = self._target, len(batch)
        if size in self._cache_lens and size not in self._caches:
            try:
                cache = StaticCache(config=target.config, max_cache_len=self._cache_lens[size])
                self._generate(batch, (), cache)  # no end, or an early one would leave it for later
                if "_compiled_call" not in self._compiled:
                    raise RuntimeError("it does not compile this model")
                self._caches[size] = cache
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                if is_out_of_memory(error):
                    raise
                what = "transformers' generate cannot run compiled, and is measured eagerly"
                warnings.warn(f"{what}: {first_line(error)}", stacklevel=2)
                self._cache_lens = {}
        self.compile_mode = target.compile_mode if size in self._cache_lens else "eager"
        return self._generate(batch, target.eos_token_ids, self._caches.get(size))

    def _generate(
        self, batch: Requests, eos: tuple[int, ...], cache: StaticCache | None
    ) -> list[Run]:
        target = self._target
        pad = eos[0] if eos else 0
        width = max(request.num_tokens for request in batch)
        pads = [width - request.num_tokens for request in batch]
        ids = [[pad] * n + request.prompt for n, request in zip(pads, batch, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in pads]
        reached: list[tuple[int, float]] = []  # new tokens, and when

        def stamp(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            """A stopping criterion that never stops."""
            if input_ids.is_cuda:
                # transformers waits for the device right after this call in any case.
                torch.cuda.synchronize(input_ids.device)
            reached.append((input_ids.shape[1] - width, time.perf_counter()))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        options, limit = dict(self._options), nullcontext()
        if cache is not None:
            cache.reset()
            fastest = CompileConfig(dynamic=False)
            fastest._compile_all_devices = True  # type: ignore[assignment] # or a CPU runs eagerly
            options |= {target.cache_name: cache, "compile_config": fastest}
            # A sweep has more shapes than torch compiles before it goes on eagerly.
            limit = torch._dynamo.config.patch(recompile_limit=256)
        with limit, _borrowed(target.model, eos, self._compiled), torch.random.fork_rng():
            torch.manual_seed(batch[0].seed)
            started = time.perf_counter()
            out = target.model.generate(
                torch.tensor(ids, device=target.device),
                attention_mask=torch.tensor(mask, device=target.device),
                max_new_tokens=batch[0].max_new_tokens,
                pad_token_id=pad,
                stopping_criteria=[stamp],
                **_in_transformers_names(self._config.sampling, width),
                **options,
            )
        num_first, first_s = reached[0]
        runs = []
        for row in out[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
            # A row ended with its own last token, not with the batch's.
            last_s = next(when for size, when in reached if size >= end)
            runs.append(Run(row[:end], min(num_first, end), first_s - started, last_s - first_s))
        return runs


@contextmanager
def _borrowed(model: Any, eos: Sequence[int], compiled: dict[str, Any]) -> Iterator[None]:
    """Lend a model to transformers' generate, and leave it as it was.

    The checkpoint's own defaults (a penalty, a top-k) are not what is compared. `compiled` keeps
    what transformers compiles from call to call.
    """
    state, own = vars(model), GenerationConfig(eos_token_id=list(eos) or None)
    before = dict(state)
    state |= {"generation_config": own, **compiled}
    try:
        yield
    finally:
        compiled |= {key: state[key] for key in _COMPILED if key in state}
        state.clear()
        state.update(before)


def _hf_options(arm: ArmConfig, target: HFTarget) -> dict[str, Any]:
    """Options of `generate` for an arm; assisted generation has a constant draft length."""
    if arm.type == "hf_generate":
        return {}
    if arm.type == "hf_prompt_lookup":
        return {"prompt_lookup_num_tokens": 8, **arm.options}
    known = {"path": "demo", "num_draft_tokens": 5}
    if unknown := sorted(set(arm.options) - set(known)):
        raise ValueError(f"hf_assisted has no option {unknown[0]!r}; known: {', '.join(known)}")
    # The same model as our own arm's, with the same refusals.
    drafter: Any = load_drafter({"type": "draft_model", **known, **arm.options}, target)
    model = drafter.model.model
    model.generation_config.update(
        num_assistant_tokens=drafter.num_draft_tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    return {"assistant_model": model}


def _in_transformers_names(sampling: SamplingOptions, prompt_len: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "do_sample": sampling.temperature > 0,
        "repetition_penalty": sampling.repetition_penalty,
        "min_new_tokens": sampling.min_new_tokens or None,
    }
    if sampling.temperature > 0:
        options |= sampling.model_dump(include={"temperature", "top_k", "top_p"})
        options["min_p"] = sampling.min_p or None
    presence, frequency = sampling.presence_penalty, sampling.frequency_penalty

    def penalize(input_ids: Tensor, scores: Tensor) -> Tensor:
        """Penalties of the output alone, which transformers does not have."""
        output = input_ids[:, prompt_len:]
        ones = torch.ones_like(output, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, output, ones)
        return scores - frequency * counts - presence * (counts > 0)

    if presence or frequency:
        options["logits_processor"] = [penalize]
    return options


# --- A plan's choice ---


def add_choice(plan: Any, arms: Sequence[ArmConfig]) -> tuple[Any, list[ArmConfig]]:
    """Put what a plan chose before the arms that were given; returns the renamed plan with them.

    A plan knows no draft lengths, and names the shapes that it thinks of itself: what has the name
    of a given arm may be another configuration. It is called "NAME (planned)" then, so that both
    are measured.
    """
    given = {arm.name: arm for arm in arms}

    def renamed(row: Any) -> Any:
        name, own = row.name, (row.type, row.options, None)
        while (arm := given.get(name)) and (arm.type, arm.options, arm.draft_length) != own:
            name = f"{name} (planned)"
        return row.model_copy(update={"name": name})

    choice = renamed(plan.choice)
    if choice.type != "plain" and choice.name not in given:
        own = ArmConfig(name=choice.name, type=choice.type, options=dict(choice.options))
        arms = [own, *arms]
    configurations = [renamed(row) for row in plan.configurations]
    update = {"choice": choice, "configurations": configurations}
    return plan.model_copy(update=update), list(arms)
