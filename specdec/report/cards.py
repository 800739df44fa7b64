"""The card of a trained drafter: what it is, how it is used, and what it was measured to do."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.checkpoints import HeadCheckpoint, head_of
from specdec.common.files import replace_file
from specdec.common.hub import HUB
from specdec.registry import strategy

_HERE = "PATH/OF/THIS/FOLDER"


def write_drafter_card(
    results: dict[str, Any], folder: Path, answers: dict[str, Any] | None = None
) -> None:
    """Write `README.md` into a drafter's folder, with a header as the hub reads it.

    Args:
        results: content of the run's `results.json`.
        folder: of the drafter.
        answers: content of the `answers.json` of the data; None where there is none.
    """
    replace_file(folder / "README.md", drafter_card(results, answers).encode())


def drafter_card(results: dict[str, Any], answers: dict[str, Any] | None = None) -> str:
    """The text; see `write_drafter_card`."""
    parts = [
        _header(results),
        _opening(results),
        _usage(results),
        _parity(results["parity"]),
        _acceptance(results),
        _training(results, answers),
        _limits(results),
        _provenance(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(results: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    config = results["provenance"]["config"]
    is_model = _kind(results) == "draft_model"
    base = config["drafter"]["options"].get("path") if is_model else results["target"]["name"]
    is_adapter = "adapter" in results["drafter"]
    data = ModelCardData(
        base_model=base.removeprefix(HUB) if _is_hub_id(base) else None,
        library_name=("peft" if is_adapter else "transformers") if is_model else "specdec",
        tags=["specdec", "speculative-decoding", _kind(results).replace("_", "-")],
    )
    return f"---\n{data.to_yaml()}\n---"


def _opening(results: dict[str, Any]) -> str:
    target = results["target"]
    hashes = ", ".join(
        f"{name} {target[name][:16]}" for name in ("weights", "tokenizer") if target[name]
    )
    said = f" (hashes: {hashes})" if hashes else ""
    return (
        f"# {strategy(_kind(results)).title} for {_target(results)}\n\n"
        "It drafts tokens for speculative decoding: the target verifies them, so what is generated "
        "is the target's own, only sooner. It was trained by `specdec train` on answers of the "
        f"target itself. It is for this target{said} and drafts badly for any other."
    )


def _usage(results: dict[str, Any]) -> str:
    options = json.dumps(_options(results))
    target = _target(results)
    text = (
        "## Use\n\n```sh\n"
        f"specdec generate --target {target} --drafter '{options}' --prompt 'Hello'\n"
        "```\n\nIn Python, or as the entry of `drafters` in a configuration of `specdec bench`:\n\n"
        "```python\nfrom specdec import generate, load_drafter, load_target\n\n"
        f'target = load_target("{target}")\n'
        f"drafter = load_drafter({_options(results)!r}, target)\n"
        'print(generate(target, drafter, ["Hello"])[0].text)\n```'
    )
    if _kind(results) != "draft_model":
        return text + (
            "\n\n`specdec convert` writes it in the layouts of other engines. The folder's path is "
            f"in place of `{_HERE}`."
        )
    if "adapter" in results["drafter"]:
        return text + "\n\nIt is a LoRA adapter; merge it into its base for other engines."
    return text + (
        "\n\nIt is a plain causal LM, for other engines too:\n\n```sh\n"
        f"vllm serve {target} --speculative-config "
        f'\'{{"method": "draft_model", "model": "{_HERE}", "num_speculative_tokens": 5}}\'\n'
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm STANDALONE "
        f"--speculative-draft-model-path {_HERE}\n```\n\n"
        "and as `assistant_model` of transformers' `generate`. These lines were not run here."
    )


def _acceptance(results: dict[str, Any]) -> str:
    rows = results["validation_rows"]
    if not rows:
        return "## Offline acceptance\n\nNot measured: no rows were held out."
    whole = {
        "rows": rows,
        "tau": results["offline_tau"],
        "alpha": results["alpha"],
        "acceptance": results["offline_acceptance"],
    }
    domains = {**(results["domains"] or {}), "all": whole}
    depths = [f"depth {n + 1}" for n in range(len(whole["acceptance"] or ()))]
    names = ["domain", "rows", "tau", "alpha, T = 0", "alpha, T = 1", *depths]
    lines = [names, ["---"] * len(names)]
    lines += [[name, *_figures(measured)] for name, measured in domains.items()]
    table = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    return (
        f"## Offline acceptance\n\n{table}\n\n"
        "Measured on held-out rows, teacher-forced. Tau: expected tokens per forward of the target "
        "with a greedy chain, behind every token of an answer; depths: the share of drafts right "
        "so far that are right there too; alpha: the share of single drafted tokens that is "
        "accepted at a temperature. Tau is lower in decoding, whose chains start where one failed."
    )


def _figures(measured: dict[str, Any]) -> list[str]:
    alpha = measured["alpha"] or {}
    values = [measured["tau"], alpha.get("0"), alpha.get("1"), *(measured["acceptance"] or ())]
    return [str(measured["rows"]), *(_number(value) for value in values)]


def _parity(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return (
            "## In decoding\n\nNot measured: the parity gate was not run, so that nothing says "
            "whether decoding accepts what training measured."
        )
    verdict = "passed" if parity["passed"] else "**failed**: do not use it"
    return (
        f"## In decoding\n\nParity gate {verdict}. Decoding {parity['num_prompts']} held-out "
        f"prompts at temperature 0 with a {parity['shape']} took a tau of "
        f"{_number(parity['measured_tau'])}{_interval(parity['measured_tau_ci'])}, where the "
        f"drafter in memory predicts {_number(parity['predicted_tau'])}"
        f"{_interval(parity['predicted_tau_ci'])}; outputs that were not those of plain decoding: "
        f"{parity['mismatches']}."
    )


def _training(results: dict[str, Any], answers: dict[str, Any] | None) -> str:
    config = results["provenance"]["config"]
    training = config["training"]
    facts = {
        "data": f"{results['rows']:,} rows, {results['answer_tokens']:,} answer tokens read in "
        f"{results['steps']:,} steps{_answers(answers)}",
        "drafter options": _settings(
            {k: v for k, v in config["drafter"]["options"].items() if k != "path"}
        ),
        "loss": _settings(config["loss"]),
        "optimizer": f"learning rate {training['learning_rate']:g}, batch size "
        f"{training['per_device_train_batch_size']}, weight decay {training['weight_decay']:g}, "
        f"warm-up {training['warmup_steps']:g} steps",
        "trained weights": f"{results['parameters']:,}",
        "loss at the end": f"{_number(results['loss'])}, on held-out rows "
        f"{_number(results['validation_loss'])}",
    }
    vocabulary = results["draft_vocabulary"]
    if vocabulary is not None:
        facts["draft vocabulary"] = (
            f"{vocabulary['size']:,} tokens, {vocabulary['training_coverage']:.2%} of those in "
            "the answers"
        )
    return "## Training\n\n" + "\n".join(f"- {name}: {said}" for name, said in facts.items())


def _answers(answers: dict[str, Any] | None) -> str:
    if answers is None:
        return ""
    temperatures = ", ".join(f"{each:g}" for each in answers["settings"]["temperatures"])
    return f"; answers regenerated at temperature {temperatures}"


def _limits(results: dict[str, Any]) -> str:
    names = ", ".join(results["domains"] or ()) or "the domain of its rows"
    return (
        f"## Limits\n\nMeasured on {names} only; on other texts, longer contexts and at higher "
        "temperatures it is accepted less. Tau is no speed: that depends on the machine, and "
        "`specdec bench` measures it."
    )


def _provenance(results: dict[str, Any]) -> str:
    where = results["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    dirty = " with changes" if where.get("git_dirty") else ""
    return (
        f"## Provenance\n\n{where['date']}, commit {where['git_commit'] or 'not known'}{dirty}, on "
        f"{where['device']} ({where.get('cpu') or 'CPU not known'}), "
        f"{results['num_processes']} process(es), {results['seconds']:.0f} s, "
        f"{results['tokens_per_s']:.0f} tokens/s. {versions}. All settings are in `results.json` "
        "of the run."
    )


def _kind(results: dict[str, Any]) -> str:
    return str(results["drafter"]["type"])


def _options(results: dict[str, Any]) -> dict[str, Any]:
    """Of `load_drafter`, without paths that only this machine has."""
    options = dict(results["drafter"])
    place = "adapter" if "adapter" in options else "path"
    if place == "adapter" and not _is_hub_id(options["path"]):
        options["path"] = f"PATH/OF/{Path(options['path']).name}"
    return {**options, place: _HERE}


def _target(results: dict[str, Any]) -> str:
    """As it is loaded, if that is the same for others; else its name."""
    path = results["provenance"]["config"]["target"]["path"]
    return str(path) if path == "demo" or _is_hub_id(path) else Path(path).name


def _is_hub_id(path: Any) -> bool:
    text = str(path or "")
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "defaults"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _cell(value: Any) -> str:
    """Text that neither ends the cell nor is taken for a tag."""
    return str(value).replace("|", "\\|").replace("<", "&lt;")


SCHEMA = 1


def head_facts(checkpoint: HeadCheckpoint, num_bytes: int) -> dict[str, Any]:
    """What a checkpoint is, as JSON values.

    Args:
        checkpoint: the head.
        num_bytes: of its files.
    """
    head = head_of(checkpoint)
    # The maps of a draft vocabulary are whole numbers and no parameters.
    weights = [t for t in checkpoint.tensors.values() if t.is_floating_point()]
    target = checkpoint.target
    return {
        "schema": SCHEMA,
        "kind": checkpoint.kind,
        "layout": checkpoint.layout,
        "parameters": sum(weight.numel() for weight in weights),
        "dtypes": sorted({str(weight.dtype).removeprefix("torch.") for weight in weights}),
        "bytes": num_bytes,
        "options": type(head).given(checkpoint.options).model_dump(exclude_none=True),
        "sizes": head.sizes(),
        "tree_nodes": None if checkpoint.tree is None else len(checkpoint.tree),
        "tree_levels": None if checkpoint.tree is None else max(map(len, checkpoint.tree)),
        "target": None if target is None else asdict(target),
        "training": checkpoint.training,
    }


def head_text(checkpoint: HeadCheckpoint, num_bytes: int) -> str:
    """The facts of `head_facts`, a line each."""
    facts = head_facts(checkpoint, num_bytes)
    lines = {
        "weights": f"{facts['parameters']:,} parameters in {', '.join(facts['dtypes'])}, "
        f"{facts['bytes']:,} bytes on disk",
        **head_of(checkpoint).describe(checkpoint.options),
        "tree": f"{facts['tree_nodes']} nodes on {facts['tree_levels']} levels"
        if facts["tree_nodes"]
        else "none of its own",
        "target": _target_of_head(facts["target"]),
        "training": _training_of_head(facts["training"]),
    }
    title = f"{strategy(checkpoint.kind).title} in the layout {facts['layout']!r}"
    return "\n".join([title, *(f"  {n:<9} {words or 'not said'}" for n, words in lines.items())])


def _training_of_head(training: dict[str, Any]) -> str:
    """What is known of it; tables are left to `--json`."""
    said = {name: _short(value) for name, value in training.items()}
    return "; ".join(f"{name.replace('_', ' ')} {words}" for name, words in said.items() if words)


def _short(value: Any) -> str:
    """A value for reading; empty for what is empty, or too long for a line."""
    if isinstance(value, bool) or value is None:
        return str(value) if value is not None else ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "" if any(isinstance(v, list) for v in value) else " ".join(map(_short, value))
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_short(v)}" for name, v in value.items())
    return str(value)


def _target_of_head(target: dict[str, Any] | None) -> str:
    if target is None:
        return ""
    names = ("hidden_size", "vocab_size", "num_layers")
    known = [f"{name} {target[name]}" for name in names if target[name] is not None]
    hashes = [f"{name} {target[name][:8]}" for name in ("weights", "tokenizer") if target[name]]
    return ", ".join([target["name"] or "no name", *known, *hashes])
