"""Cards: of a drafter that was trained, for its folder, and of a head, for `specdec inspect`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.checkpoints import HeadCheckpoint, head_of
from specdec.common.files import replace_file
from specdec.common.hub import HUB
from specdec.registry import strategy
from specdec.report.document import markdown_table, render
from specdec.report.tables import Column, Table

if TYPE_CHECKING:
    from specdec.data.answers import AnswersManifest
    from specdec.train.results import TrainResults

_HERE = "PATH/OF/THIS/FOLDER"
_SCHEMA = 1
_TRAINING = {
    *("learning_rate", "lr_scheduler_type", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "warmup_steps", "weight_decay"),
}


def write_drafter_card(
    results: "TrainResults", folder: Path, answers: "AnswersManifest | None" = None
) -> None:
    """Write `README.md` into a drafter's folder, with a header as the hub reads it."""
    replace_file(folder / "README.md", drafter_card(results, answers).encode())


def drafter_card(results: "TrainResults", answers: "AnswersManifest | None" = None) -> str:
    """Describe a trained drafter: use, measurements, training and limits."""
    config, identity = results.provenance.config, results.target
    drafter = strategy(results.drafter["type"])
    hashes = [
        f"{name} {value[:16]}"
        for name, value in (("weights", identity.weights), ("tokenizer", identity.tokenizer))
        if value
    ]
    return render(
        "drafter_card.md",
        results=results,
        config=config,
        where=results.provenance,
        figure=_figure,
        interval=_interval,
        settings=_settings,
        title=drafter.title or results.drafter["type"],
        header=_header(results),
        target=_target(config.target.path),
        hashes=f" (hashes: {', '.join(hashes)})" if hashes else "",
        options=_options(results.drafter),
        here=_HERE,
        is_head=drafter.trained_as == "head",
        is_adapter="adapter" in results.drafter,
        acceptance=_acceptance(results),
        temperatures=", ".join(f"{t:g}" for t in answers.settings.temperatures) if answers else "",
        training=config.training.model_dump(include=_TRAINING),
    )


def _header(results: "TrainResults") -> str:
    from huggingface_hub import ModelCardData

    kind, config = results.drafter["type"], results.provenance.config
    is_head = strategy(kind).trained_as == "head"
    base = results.target.name if is_head else config.drafter.options.get("path")
    library = "specdec" if is_head else "peft" if "adapter" in results.drafter else "transformers"
    return ModelCardData(
        base_model=str(base).removeprefix(HUB) if _is_hub_id(base) else None,
        library_name=library,
        tags=["specdec", "speculative-decoding", kind.replace("_", "-")],
    ).to_yaml()


def _acceptance(results: "TrainResults") -> str | None:
    """Make a table of the acceptance on held-out rows; None where there were none."""
    if not results.validation_rows:
        return None
    whole = {
        "domain": "all",
        "rows": results.validation_rows,
        "tau": results.offline_tau,
        "alpha": results.alpha,
        "acceptance": results.offline_acceptance,
    }
    domains = [{"domain": name, **vars(each)} for name, each in (results.domains or {}).items()]
    rows = [
        {**row, **{f"depth {n}": x for n, x in enumerate(row["acceptance"] or (), start=1)}}
        for row in (*domains, whole)
    ]
    depths = range(1, 1 + len(results.offline_acceptance or ()))
    columns = [
        *(Column("domain", "domain"), Column("rows", "rows", 0), Column("tau", "tau", 3)),
        *(Column(f"alpha.{t}", f"alpha, T = {t}", 3) for t in (0, 1)),
        *(Column(f"depth {depth}", f"depth {depth}", 3) for depth in depths),
    ]
    return markdown_table(Table(id="acceptance", caption="", columns=columns, rows=rows))


def _options(drafter: Mapping[str, Any]) -> dict[str, Any]:
    """Give options of `load_drafter` without paths that only this machine has."""
    options = dict(drafter)
    if "adapter" not in options:
        return {**options, "path": _HERE}
    if not _is_hub_id(options["path"]):
        options["path"] = f"PATH/OF/{Path(options['path']).name}"
    return {**options, "adapter": _HERE}


def _target(path: str) -> str:
    """Name the target as it is loaded, if that is the same for others."""
    return path if path == "demo" or _is_hub_id(path) else Path(path).name


def _is_hub_id(path: Any) -> bool:
    text = str(path or "")
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if key != "path") or (
        "defaults"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def head_facts(checkpoint: HeadCheckpoint, num_bytes: int) -> dict[str, Any]:
    """Describe a checkpoint, whose files have `num_bytes`, as JSON values."""
    head = head_of(checkpoint)
    # The maps of a draft vocabulary are whole numbers and no parameters.
    weights = [t for t in checkpoint.tensors.values() if t.is_floating_point()]
    target, tree = checkpoint.target, checkpoint.tree
    return {
        "schema": _SCHEMA,
        "kind": checkpoint.kind,
        "layout": checkpoint.layout,
        "parameters": sum(weight.numel() for weight in weights),
        "dtypes": sorted({str(weight.dtype).removeprefix("torch.") for weight in weights}),
        "bytes": num_bytes,
        "options": type(head).given(checkpoint.options).model_dump(exclude_none=True),
        "sizes": head.sizes(),
        "tree_nodes": None if tree is None else len(tree),
        "tree_levels": None if tree is None else max(map(len, tree)),
        "target": None if target is None else asdict(target),
        "training": checkpoint.training,
    }


def head_text(checkpoint: HeadCheckpoint, num_bytes: int) -> str:
    """Describe a checkpoint, whose files have `num_bytes`, in lines."""
    facts = head_facts(checkpoint, num_bytes)
    lines = {
        "weights": f"{facts['parameters']:,} parameters in {', '.join(facts['dtypes'])}, "
        f"{facts['bytes']:,} bytes on disk",
        **head_of(checkpoint).describe(checkpoint.options),
        "tree": f"{facts['tree_nodes']} nodes on {facts['tree_levels']} levels"
        if facts["tree_nodes"]
        else "none of its own",
        "target": _identity(facts["target"] or {}),
        "training": _known(facts["training"]),
    }
    title = strategy(facts["kind"]).title or facts["kind"]
    said = [f"  {name:<9} {words or 'not said'}" for name, words in lines.items()]
    return "\n".join([f"{title} in the layout {facts['layout']!r}", *said])


def _identity(target: Mapping[str, Any]) -> str:
    sizes = [
        f"{k} {target[k]}" for k in ("hidden_size", "vocab_size", "num_layers") if target.get(k)
    ]
    hashes = [f"{key} {target[key][:8]}" for key in ("weights", "tokenizer") if target.get(key)]
    return ", ".join([target["name"] or "no name", *sizes, *hashes]) if target else ""


def _known(training: Mapping[str, Any]) -> str:
    """Say what is known of a training; tables are left to `--json`."""
    said = {name: _short(value) for name, value in training.items()}
    return "; ".join(f"{name.replace('_', ' ')} {words}" for name, words in said.items() if words)


def _short(value: Any) -> str:
    """Write a value in a few words; nothing for what is empty, or too long for a line."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_short(v)}" for name, v in value.items())
    if isinstance(value, list):
        return "" if any(isinstance(v, list) for v in value) else " ".join(map(_short, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
