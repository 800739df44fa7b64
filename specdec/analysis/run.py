"""Run an analysis: texts, then every drafter of a bench's configuration along them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from specdec.analysis.describe import describe
from specdec.analysis.facts import gather_facts
from specdec.analysis.given_texts import read_texts
from specdec.analysis.predict import Predictor, check_settings
from specdec.analysis.store import AnalysisStore
from specdec.analysis.texts import Text, target_answers
from specdec.bench.config import SINGLE_PROMPT_TYPES, ArmConfig, BenchConfig
from specdec.bench.provenance import fingerprint_of_ids, machine
from specdec.bench.runner import encode_prompts, read_prompts
from specdec.bench.turns import unfold_turns
from specdec.checkpoints import identify_target
from specdec.sampling_config import SamplingConfig
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target

SCHEMA = "specdec-analysis-1"
Progress = Callable[[int, int, str], None]


def run_analysis(
    config: BenchConfig,
    folder: Path,
    text: Path | None = None,
    progress: Progress = lambda done, total, text: None,
    *,
    answers: int = 1,
) -> dict[str, Any]:
    """Analyse what is not in the folder yet, and write `analysis.json` and the evidence there.

    Args:
        config: of a bench; its drafters, its prompts, its sampling.
        folder: to write to.
        text: texts to walk along in place of the target's answers to the prompts, see
            `read_texts`.
        progress: called with drafters done, drafters in all, and what runs next.
        answers: of the target to every prompt, each with a seed of its own; 1 at temperature 0.

    Returns:
        The content of `analysis.json`.

    Raises:
        ValueError: bad configuration, prompts or texts, or a folder of another configuration.
        FloatingPointError: NaN in a model's logits.
        OSError: the folder cannot be written, or is full; finished drafters are kept.
    """
    if answers < 1:
        raise ValueError(f"--answers is {answers} but must be at least 1")
    torch.set_num_threads(config.threads)
    sampling = SamplingConfig(**vars(config.sampling), seed=config.seed)
    check_settings(sampling, config.rule)
    arms = [arm for arm in config.arms if arm.type not in SINGLE_PROMPT_TYPES]
    if not arms:
        raise ValueError("config arms holds no drafter; give at least one, like {type: ngram}")
    progress(0, len(arms), "texts")
    target = load_target(
        config.target.path,
        dtype=config.target.dtype,
        device=config.target.device,
        quantization=config.target.quantization,
    )
    repeats = 1 if sampling.is_greedy else answers
    texts, prompts = _texts(config, target, sampling, text, repeats, progress)
    mark, known = _fingerprint(config, texts), identify_target(target)
    store = AnalysisStore(folder, mark, known)
    provenance = {
        "config": asdict(config),
        "config_fingerprint": mark,
        "text": None if text is None else str(text),
        **machine(target),
    }
    predictor = Predictor(target, texts, sampling, config.seed, config.rule)
    result = {
        "schema": SCHEMA,
        "provenance": provenance,
        "target": asdict(known),
        "prompts": prompts,
        "drafters": _drafters(arms, predictor, store, progress),
        "left_out": [arm.name for arm in config.arms if arm.type in SINGLE_PROMPT_TYPES],
    }
    store.finish(result, [arm.name for arm in arms])
    return result


def _drafters(
    arms: list[ArmConfig], predictor: Predictor, store: AnalysisStore, progress: Progress
) -> list[dict[str, Any]]:
    facts = None
    for index, arm in enumerate(arms):
        if store.read(index) is not None:
            continue
        progress(index, len(arms), arm.name)
        facts = facts or gather_facts(predictor.target, predictor.texts)
        options = {"type": arm.type, **arm.options}
        store.write(index, *describe(predictor, facts, arm.name, options))
    progress(len(arms), len(arms), "done")
    found = [store.read(index) for index in range(len(arms))]
    return [each for each in found if each is not None]


def _texts(
    config: BenchConfig,
    target: HFTarget,
    sampling: SamplingConfig,
    path: Path | None,
    repeats: int,
    progress: Progress,
) -> tuple[list[Text], list[dict[str, Any]]]:
    """The texts, and what the result says of each."""
    if path is not None:
        texts = read_texts(path, target, config.prompts.num, config.max_new_tokens)
        names = [{"id": f"{path.name}-{index}", "domain": ""} for index in range(len(texts))]
    else:
        prompts = read_prompts(config)
        prompts = unfold_turns(prompts, target, config.max_new_tokens, progress)
        ids = encode_prompts(prompts, target) * repeats
        texts = target_answers(target, ids, sampling, config.max_new_tokens)
        names = [{"id": prompt.id, "domain": prompt.domain} for prompt in prompts] * repeats
    return texts, [
        {
            **name,
            "num_tokens": len(text.prompt),
            "new_tokens": len(text.tokens),
            "fingerprint": fingerprint_of_ids(text.prompt),
        }
        for name, text in zip(names, texts, strict=True)
    ]


def _fingerprint(config: BenchConfig, texts: list[Text]) -> str:
    whole = {"config": asdict(config), "texts": [asdict(text) for text in texts]}
    text = json.dumps(whole, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
