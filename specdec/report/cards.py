"""Cards: of a drafter that was trained, for its folder, and of a head, for `specdec inspect`.

What a serving engine did with a drafter is added to its card.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.checkpoints import HeadCheckpoint, head_of
from specdec.common.files import replace_file
from specdec.common.hub import HERE, HUB
from specdec.demo import demo_path
from specdec.registry import strategy
from specdec.report.document import render
from specdec.report.tables import Column, Table

if TYPE_CHECKING:
    from specdec.data.answers import AnswersManifest
    from specdec.engines.admit import Admission
    from specdec.train.results import TrainResults

_TRAINING = {
    *("learning_rate", "lr_scheduler_type", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "warmup_steps", "weight_decay"),
}


def drafter_card(results: "TrainResults", answers: "AnswersManifest | None" = None) -> str:
    """Describe a trained drafter in the README.md of its folder, with a header for the hub."""
    from huggingface_hub import ModelCardData

    config, kind = results.provenance.config, results.drafter["type"]
    drafter, path = strategy(kind), config.target.path
    is_head, is_adapter = drafter.trained_as == "head", "adapter" in results.drafter
    base = results.target.name if is_head else config.drafter.options.get("path")
    header = ModelCardData(
        base_model=str(base).removeprefix(HUB) if _is_hub_id(base) else None,
        library_name="specdec" if is_head else "peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["specdec", "speculative-decoding", kind.replace("_", "-")],
    )
    # A path that only this machine has is left out.
    inner = results.drafter["path"] if is_adapter else None
    if inner and not _is_hub_id(inner):
        inner = f"PATH/OF/{Path(inner).name}"
    paths = {"path": inner, "adapter": HERE} if is_adapter else {"path": HERE}
    marks = {name: getattr(results.target, name) for name in ("weights", "tokenizer")}
    return render(
        "drafter_card.md",
        results=results,
        config=config,
        where=results.provenance,
        header=header.to_yaml(),
        title=drafter.title or kind,
        hashes=[f"{name} {mark[:16]}" for name, mark in marks.items() if mark],
        target=path if path == "demo" or _is_hub_id(path) else Path(path).name,
        options={**results.drafter, **paths},
        here=HERE,
        is_head=is_head,
        is_adapter=is_adapter,
        acceptance=_acceptance(results) if results.validation_rows else None,
        temperatures=", ".join(f"{t:g}" for t in answers.settings.temperatures) if answers else "",
        training=config.training.model_dump(include=_TRAINING),
    )


def admission_table(admission: "Admission") -> Table:
    """Put texts and counts of an engine beside ours."""
    ours, theirs = admission.ours, admission.theirs
    rows: list[dict[str, Any]] = [
        {"what": f"equal texts, {arm}", "ours": admission.num_prompts, "theirs": equal}
        for arm, equal in admission.equal_texts.items()
    ]
    rows += [
        {"what": k, "ours": ours[k], "theirs": theirs and theirs[k]}
        for k in ours | (theirs or ours)
    ]
    engine = f"{admission.engine} {admission.version}"
    shown = [Column("what", ""), Column("ours", "here", 0), Column("theirs", engine, 0)]
    caption = f"{admission.kind}, chains of {admission.num_tokens}, temperature 0, float32"
    return Table("admission", caption, rows, shown)


def add_to_card(folder: Path, admission: "Admission") -> Path | None:
    """Write an engine's verdict into the card of a drafter's own folder, in place of its last."""
    if not folder.is_dir() or folder.resolve().parent == demo_path("target").resolve().parent:
        return None
    card, title = folder / "README.md", "\n\n## In serving engines\n\n"
    text = card.read_text() if card.exists() else f"# {folder.resolve().name}"
    before, _, said = text.partition(title)
    others = [line for line in said.split("\n") if line and f" by {admission.engine} " not in line]
    line = f"- {admission.verdict} ({admission.num_tokens} tokens a draft)"
    lines = "\n".join([*others, line])
    replace_file(card, f"{before.rstrip()}{title}{lines}\n".encode())
    return card


def _acceptance(results: "TrainResults") -> Table:
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
    shown = [Column("domain", "domain"), Column("rows", "rows", 0), Column("tau", "tau", 3)]
    shown += [Column(f"alpha.{t}", f"alpha, T = {t}", 3) for t in (0, 1)]
    depths = range(1, 1 + len(results.offline_acceptance or ()))
    shown += [Column(f"depth {depth}", f"depth {depth}", 3) for depth in depths]
    return Table("acceptance", "", rows, shown)


def _is_hub_id(path: Any) -> bool:
    text = str(path or "")
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).exists()


def head_facts(checkpoint: HeadCheckpoint, num_bytes: int) -> dict[str, Any]:
    """Describe a checkpoint, whose files have `num_bytes`, as JSON values."""
    head = head_of(checkpoint)
    # The maps of a draft vocabulary are whole numbers and no parameters.
    weights = [t for t in checkpoint.tensors.values() if t.is_floating_point()]
    target, tree = checkpoint.target, checkpoint.tree
    return {
        "schema": 1,
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
    tree, target = "none of its own", ""
    if facts["tree_nodes"]:
        tree = f"{facts['tree_nodes']} nodes on {facts['tree_levels']} levels"
    if known := facts["target"]:
        sizes = ("hidden_size", "vocab_size", "num_layers", "weights", "tokenizer")
        said = [f"{key} {str(known[key])[:8]}" for key in sizes if known.get(key)]
        target = ", ".join([known["name"] or "no name", *said])
    lines = {
        "weights": f"{facts['parameters']:,} parameters in {', '.join(facts['dtypes'])}, "
        f"{facts['bytes']:,} bytes on disk",
        **head_of(checkpoint).describe(checkpoint.options),
        "tree": tree,
        "target": target,
        "training": _short(facts["training"], "; "),
    }
    title = strategy(facts["kind"]).title or facts["kind"]
    said = [f"  {name:<9} {words or 'not said'}" for name, words in lines.items()]
    return "\n".join([f"{title} in the layout {facts['layout']!r}", *said])


def _short(value: Any, between: str = ", ") -> str:
    """Write a value in a few words; nothing for what is empty, or a table, which `--json` shows."""
    if isinstance(value, Mapping):
        said = {name.replace("_", " "): _short(each) for name, each in value.items()}
        return between.join(f"{name} {words}" for name, words in said.items() if words)
    if isinstance(value, list):
        return "" if any(isinstance(v, list) for v in value) else " ".join(map(_short, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
