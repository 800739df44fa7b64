"""`specdec analyze`: texts, then every drafter of a bench's configuration along them."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.numpy import load_file, save

from specdec.analysis.describe import describe, gather_facts
from specdec.analysis.predict import Predictor, check_settings
from specdec.analysis.results import Analysis, AnalysisProvenance, AnalyzedPrompt, DrafterAnalysis
from specdec.analysis.texts import prompt_ids, read_texts, target_answers
from specdec.bench.config import SINGLE_PROMPT_TYPES, ArmConfig, BenchConfig
from specdec.bench.workloads import Progress, fingerprint_of
from specdec.checkpoints.identity import TARGET, as_json, check_resumed, identify_target
from specdec.common.files import Journal, replace_file
from specdec.common.provenance import machine
from specdec.targets.load import load_target


def run_analysis(
    config: BenchConfig,
    folder: Path,
    text: Path | None = None,
    progress: Progress = lambda done, total, text: None,
    *,
    answers: int = 1,
) -> Analysis:
    """Analyze what is not in the folder yet, and write `analysis.json` and the evidence there."""
    if answers < 1:
        raise ValueError(f"--answers is {answers} but must be at least 1")
    torch.set_num_threads(config.threads)
    sampling = config.sampling.with_seed(config.seed)
    check_settings(sampling, config.rule)
    arms = [arm for arm in config.arms if arm.type not in SINGLE_PROMPT_TYPES]
    if not arms:
        raise ValueError("config arms holds no drafter; give at least one, like {type: ngram}")
    progress(0, len(arms), "texts")
    target = load_target(**config.target.model_dump())
    if text is not None:
        texts = read_texts(text, target, config.prompts.num, config.max_new_tokens)
        names = [(f"{text.name}-{index}", "") for index in range(len(texts))]
    else:
        repeats = 1 if sampling.is_greedy else answers
        prompts, ids = prompt_ids(config, target, progress)
        texts = target_answers(target, ids * repeats, sampling, config.max_new_tokens)
        names = [(prompt.id, prompt.domain) for prompt in prompts] * repeats
    predictor = Predictor(target, texts, sampling, config.seed, config.rule)
    mark = fingerprint_of([config.model_dump(mode="json"), [asdict(each) for each in texts]])
    known = identify_target(target)
    identity = {"configuration with its texts": mark, TARGET: as_json(known)}
    checks = {TARGET: partial(check_resumed, folder)}
    with Journal(folder / "drafters" / "drafters.jsonl", identity, checks) as journal:
        drafters = _drafters(arms, predictor, journal, progress)
    analysis = Analysis(
        provenance=AnalysisProvenance(
            **machine(target),
            config=config,
            config_fingerprint=mark,
            text=None if text is None else str(text),
        ),
        target=known,
        prompts=[
            AnalyzedPrompt(
                id=name,
                domain=domain,
                num_tokens=len(each.prompt),
                new_tokens=len(each.tokens),
                fingerprint=fingerprint_of(each.prompt),
            )
            for (name, domain), each in zip(names, texts, strict=True)
        ],
        drafters=drafters,
        left_out=[arm.name for arm in config.arms if arm.type in SINGLE_PROMPT_TYPES],
    )
    arrays = {
        f"{each.name}/{field}": array
        for index, each in enumerate(drafters)
        if each.method == "evidence"
        for field, array in load_file(folder / "drafters" / f"{index}.safetensors").items()
    }
    replace_file(folder / "evidence.safetensors", save(arrays))
    analysis.write(folder)
    return analysis


def _drafters(
    arms: list[ArmConfig], predictor: Predictor, journal: Journal, progress: Progress
) -> list[DrafterAnalysis]:
    """Analyze the drafters that the journal does not hold yet."""
    found = {row["name"]: DrafterAnalysis.model_validate(row) for row in journal.entries}
    facts = None
    for index, arm in enumerate(arms):
        if arm.name in found:
            continue
        progress(index, len(arms), arm.name)
        facts = facts or gather_facts(predictor.target, predictor.texts)
        options = {"type": arm.type, **arm.options}
        found[arm.name], evidence = describe(predictor, facts, arm.name, options)
        if evidence is not None:
            path = journal.path.parent / f"{index}.safetensors"
            replace_file(path, save(vars(evidence)))
        # The row, which makes the drafter count, is written last.
        journal.append(found[arm.name].model_dump(mode="json"))
    progress(len(arms), len(arms), "done")
    return [found[arm.name] for arm in arms]
