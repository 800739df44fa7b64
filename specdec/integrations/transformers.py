"""Our loop behind `model.generate(custom_generate=...)` of transformers."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers import generation as hf

from specdec.engine.decode import stream
from specdec.engine.interfaces import Drafter
from specdec.registry import load_drafter
from specdec.targets.hf import HFTarget

# Logits processors in the one order in which `SamplingConfig` means the same, and what they set
# there; the second argument is the width of the padded prompts.
_PROCESSORS: dict[type, Callable[[Any, int], dict[str, Any]]] = {
    hf.RepetitionPenaltyLogitsProcessor: lambda p, _: {"repetition_penalty": p.penalty},
    hf.NoBadWordsLogitsProcessor: lambda p, _: {"bad_words": p.bad_word_ids},
    hf.MinLengthLogitsProcessor: lambda p, width: {"min_new_tokens": max(0, p.min_length - width)},
    hf.MinNewTokensLengthLogitsProcessor: lambda p, _: {"min_new_tokens": p.min_new_tokens},
    hf.SuppressTokensLogitsProcessor: lambda p, _: {
        "logit_bias": dict.fromkeys(p.suppress_tokens.tolist(), float("-inf"))
    },
    hf.TemperatureLogitsWarper: lambda p, _: {"temperature": p.temperature},
    hf.TopKLogitsWarper: lambda p, _: {"top_k": p.top_k},
    hf.TopPLogitsWarper: lambda p, _: {"top_p": p.top_p},
    hf.MinPLogitsWarper: lambda p, _: {"min_p": p.min_p},
    hf.LogitNormalization: lambda p, _: {},
}
_CRITERIA = (hf.MaxLengthCriteria, hf.MaxTimeCriteria, hf.EosTokenCriteria)
_CACHES = ("cache", "past_key_values", "use_cache")
_INPUTS = ("attention_mask", "position_ids", "logits_to_keep", *_CACHES)
_MODES = (hf.GenerationMode.GREEDY_SEARCH, hf.GenerationMode.SAMPLE)
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def speculative(
    drafter: Drafter | Mapping[str, Any] | str | None, **options: Any
) -> Callable[..., Tensor | hf.GenerateDecoderOnlyOutput]:
    """Make the `custom_generate` of `model.generate`.

    The model is the target as it stands; both it and the drafter are prepared in the first call
    and kept for the next ones. Other options are those of `specdec.generate`: rule, draft_length,
    batch_size. The output with `return_dict_in_generate` also has `results`, one `Result` a row.

    Raises:
        ValueError: in `generate`, an option that this loop has no counterpart for, by name.
    """

    @lru_cache(1)
    def prepare(model: PreTrainedModel, *_: Any) -> tuple[HFTarget, Drafter | None]:
        target = HFTarget(model)
        if isinstance(drafter, str | Mapping):
            return target, load_drafter(drafter, target)
        return target, drafter

    def custom_generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: hf.LogitsProcessorList,
        stopping_criteria: hf.StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Tensor | hf.GenerateDecoderOnlyOutput:
        width, mask = input_ids.shape[1], inputs.get("attention_mask")
        seen = torch.ones_like(input_ids).bool() if mask is None else mask.bool()
        _refuse_left_out(generation_config, logits_processor, stopping_criteria, inputs, seen)
        sampling: dict[str, Any] = {"temperature": 1.0}
        for each in logits_processor:
            sampling |= _PROCESSORS[type(each)](each, width)
        if generation_config.do_sample:
            sampling["seed"] = int(torch.randint(2**63 - 1, ()))
        else:
            sampling["temperature"] = 0.0
        ends: dict[type, Any] = {type(each): each for each in stopping_criteria}
        eos = getattr(ends.get(hf.EosTokenCriteria), "eos_token_id", torch.tensor([]))
        is_eager = model.config._attn_implementation == "eager"  # it takes other masks
        target, chosen = prepare(model, model.device, model.dtype, is_eager)
        target.eos_token_ids = tuple(eos.tolist())
        run = stream(
            target,
            chosen,
            [row[real].tolist() for row, real in zip(input_ids, seen, strict=True)],
            sampling,
            max_new_tokens=ends[hf.MaxLengthCriteria].max_length - width,
            max_time_s=getattr(ends.get(hf.MaxTimeCriteria), "max_time", None),
            **options,
        )
        for _ in run.steps():  # an interrupt ends the call, as it does in transformers
            pass
        results = run.results()
        new = [torch.tensor(each.tokens, device=input_ids.device) for each in results]
        padding = pad_sequence(new, True, int(generation_config._pad_token_tensor or 0))
        sequences = torch.cat([input_ids, padding], 1)
        if not generation_config.return_dict_in_generate:
            return sequences
        output = hf.GenerateDecoderOnlyOutput(sequences=cast(Any, sequences))
        output["results"] = results
        return output

    return custom_generate


def _refuse_left_out(
    config: GenerationConfig, processors: Any, criteria: Any, inputs: dict[str, Any], seen: Tensor
) -> None:
    """Name what the loop has no counterpart for: dropped without a word, it would be missed."""
    kinds, known = [type(each) for each in processors], list(_PROCESSORS)
    order = [known.index(kind) for kind in kinds if kind in known]
    mode, places = config.get_generation_mode(), inputs.get("position_ids")
    own_places = places is not None and ((places != seen.cumsum(1) - 1) & seen).any()
    left_out = {
        f"{mode.value} mode": mode not in _MODES,
        "logits processors in this order": order != sorted(set(order)),
        "min_tokens_to_keep": any(vars(p).get("min_tokens_to_keep", 1) > 1 for p in processors),
        # A number is the user's own; a tensor is transformers', and tells the padding.
        "prompt_ignore_length": int
        in {type(vars(p).get("prompt_ignore_length")) for p in processors},
        "padding on the right": not seen[:, -1].all(),
        "position_ids of one's own": own_places,
        "cache_implementation": config.cache_implementation == "quantized",
        **{name: getattr(config, name) for name in _OUTPUTS},
        **{kind.__name__: kind not in known for kind in kinds},
        **{type(each).__name__: type(each) not in _CRITERIA for each in criteria},
        **{name: value is not None and name not in _INPUTS for name, value in inputs.items()},
        "cache": any(getattr(inputs.get(name), "_is_user_defined", False) for name in _CACHES),
    }
    if names := [name for name, is_asked in left_out.items() if is_asked]:
        raise ValueError(
            f"specdec's custom_generate has no counterpart of {', '.join(names)}; leave that out, "
            "or generate without custom_generate"
        )
