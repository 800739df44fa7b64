"""Run an analysis: texts, then every drafter of a bench's configuration along them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from specdec.analysis.describe import describe
from specdec.analysis.predict import Predictor, check_settings
from specdec.analysis.teacher_forced import Array, Evidence, gather_facts
from specdec.analysis.texts import Text, read_texts, target_answers
from specdec.bench.config import SINGLE_PROMPT_TYPES, ArmConfig, BenchConfig
from specdec.bench.prompts import encode_prompts, load_prompts
from specdec.bench.workloads import fingerprint_of, unfold_turns
from specdec.checkpoints import TargetIdentity, identify_target
from specdec.checkpoints.identity import as_json, check_resumed
from specdec.common.files import disk_trouble, parse_json, read_json, replace_file
from specdec.common.provenance import machine
from specdec.sampling.config import SamplingConfig
from specdec.targets.hf import HFTarget
from specdec.targets.load import load_target

RESULT, EVIDENCE = "analysis.json", "evidence.safetensors"
_FIELDS = tuple(Evidence.__dataclass_fields__)


class AnalysisStore:
    """One JSON and one safetensors file a finished drafter, under `drafters/`.

    Args:
        folder: made if it is not there.
        fingerprint: of configuration and texts; a folder of another one is refused.
        target: identity of the target, likewise.

    Raises:
        ValueError: the folder holds an analysis of another configuration or target.
        PermissionError: it cannot be written.
        OSError: there is no space left.
    """

    def __init__(self, folder: Path, fingerprint: str, target: TargetIdentity) -> None:
        self._folder, self._parts = folder, folder / "drafters"
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_trouble(folder, error) from error
        known, mark = self._parts / "target", self._parts / "fingerprint"
        written_by = mark.read_text() if mark.is_file() else "its fingerprint is gone"
        # A run that finished no drafter leaves a folder that serves any configuration.
        if not any(self._parts.glob("*.json")):
            replace_file(known, json.dumps(as_json(target)).encode())
            replace_file(mark, fingerprint.encode())
        elif written_by != fingerprint:
            raise ValueError(
                f"{str(folder)!r} holds an analysis of another configuration or of other texts "
                f"({written_by}, not {fingerprint}); choose another --out folder or remove this one"
            )
        else:
            check_resumed(folder, read_json(known) if known.is_file() else None, as_json(target))

    def read(self, index: int) -> dict[str, Any] | None:
        """What is said of drafter `index`; None where it is not finished."""
        path = self._parts / f"{index}.json"
        try:
            found: dict[str, Any] = parse_json(path.read_text())
            if found["method"] == "evidence":
                load_file(self._parts / f"{index}.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError):
            return None
        return found

    def write(self, index: int, described: dict[str, Any], evidence: Evidence | None) -> None:
        """Keep a finished drafter; its JSON, which makes it count, is written last.

        Raises:
            OSError: the folder cannot be written, or is full.
        """
        if evidence is not None:
            arrays = {name: np.ascontiguousarray(getattr(evidence, name)) for name in _FIELDS}
            replace_file(self._parts / f"{index}.safetensors", save(arrays))
        text = json.dumps(described, indent=1, allow_nan=False) + "\n"
        replace_file(self._parts / f"{index}.json", text.encode())

    def finish(self, result: dict[str, Any], names: list[str]) -> None:
        """Write the evidence of all drafters, each field as NAME/FIELD, and then the analysis.

        Raises:
            OSError: the folder cannot be written, or is full.
        """
        arrays: dict[str, Array] = {}
        for index, name in enumerate(names):
            path = self._parts / f"{index}.safetensors"
            if path.is_file():
                arrays |= {f"{name}/{field}": array for field, array in load_file(path).items()}
        replace_file(self._folder / EVIDENCE, save(arrays))
        text = json.dumps(result, indent=1, allow_nan=False) + "\n"
        replace_file(self._folder / RESULT, text.encode())


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
    sampling = config.sampling.with_seed(config.seed)
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
        "config": config.model_dump(mode="json"),
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
        prompts = load_prompts(**config.prompts.model_dump())
        prompts = unfold_turns(prompts, target, config.max_new_tokens, progress)
        ids = encode_prompts(prompts, target) * repeats
        texts = target_answers(target, ids, sampling, config.max_new_tokens)
        names = [{"id": prompt.id, "domain": prompt.domain} for prompt in prompts] * repeats
    return texts, [
        {
            **name,
            "num_tokens": len(text.prompt),
            "new_tokens": len(text.tokens),
            "fingerprint": fingerprint_of(text.prompt),
        }
        for name, text in zip(names, texts, strict=True)
    ]


def _fingerprint(config: BenchConfig, texts: list[Text]) -> str:
    whole = {"config": config.model_dump(mode="json"), "texts": [asdict(text) for text in texts]}
    text = json.dumps(whole, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
