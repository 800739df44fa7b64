"""A draft head's checkpoint in words and in numbers."""

from dataclasses import asdict
from typing import Any

from specdec.checkpoints import HeadCheckpoint
from specdec.checkpoints.options import filled
from specdec.checkpoints.tensors import known_sizes

SCHEMA = 1
_TITLES = {"medusa": "Medusa heads", "eagle": "EAGLE-1 head", "eagle3": "EAGLE-3 head"}
_FLAGS = {
    "bias": "bias where token and feature are fused",
    "qkv_bias": "bias of queries, keys and values",
    "norm_before_residual": "the normed feature is the residual",
    "norm_before_fc": "the taps are normed before they are fused",
    "norm_output": "the normed state is fed back",
    "own_embedding": "its own embedding",
    "own_vocab_head": "a vocabulary projection for every head",
}


def head_facts(checkpoint: HeadCheckpoint, num_bytes: int) -> dict[str, Any]:
    """What a checkpoint is, as JSON values.

    Args:
        checkpoint: the head.
        num_bytes: of its files.
    """
    options = filled(checkpoint.kind, checkpoint.options)
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
        "options": options,
        "sizes": known_sizes(options, target),
        "tree_nodes": None if checkpoint.tree is None else len(checkpoint.tree),
        "tree_levels": None if checkpoint.tree is None else max(map(len, checkpoint.tree)),
        "target": None if target is None else asdict(target),
        "training": checkpoint.training,
    }


def head_text(facts: dict[str, Any]) -> str:
    """The facts of `head_facts`, a line each."""
    lines = {
        "weights": f"{facts['parameters']:,} parameters in {', '.join(facts['dtypes'])}, "
        f"{facts['bytes']:,} bytes on disk",
        "reads": _reads(facts),
        "drafts": _drafts(facts),
        "layer": _layer(facts),
        "has": ", ".join(words for name, words in _FLAGS.items() if facts["options"].get(name))
        or "no optional parts",
        "tree": f"{facts['tree_nodes']} nodes on {facts['tree_levels']} levels"
        if facts["tree_nodes"]
        else "none of its own",
        "target": _target(facts["target"]),
        "training": _training(facts["training"]),
    }
    title = f"{_TITLES[facts['kind']]} in the layout {facts['layout']!r}"
    return "\n".join([title, *(f"  {n:<9} {words or 'not said'}" for n, words in lines.items())])


def _training(training: dict[str, Any]) -> str:
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


def _reads(facts: dict[str, Any]) -> str:
    if facts["kind"] != "eagle3":
        return "the last hidden state of the target, behind its final norm"
    taps = facts["options"].get("taps")
    if taps is None:
        return "hidden_states 2, L // 2 and L - 3 of a target with L layers, as published"
    return f"hidden_states {', '.join(map(str, taps))} of the target (0 is its embedding)"


def _drafts(facts: dict[str, Any]) -> str:
    options, vocab_size = facts["options"], facts["sizes"].get("vocab_size")
    whole = f"all {vocab_size:,} tokens" if vocab_size else "all tokens of the target"
    if facts["kind"] == "medusa":
        depth, layers = options["num_heads"], options["num_layers"]
        return f"{whole}; {depth} heads, so as many levels, of {layers} residual blocks each"
    reduced = facts["sizes"].get("draft_vocab_size")
    return (
        whole if reduced in (None, vocab_size) else f"{reduced:,} of {vocab_size or '?':,} tokens"
    )


def _layer(facts: dict[str, Any]) -> str:
    backbone = facts["options"].get("backbone") or {}
    if not backbone:
        width = facts["sizes"].get("hidden_size", "?")
        return f"width {width}" + ("" if facts["kind"] == "medusa" else ", the rest as the target")
    rope = backbone.get("rope_parameters") or {}
    words = [f"{name} {value}" for name, value in backbone.items() if name != "rope_parameters"]
    return ", ".join([*words, *(f"{name} {value}" for name, value in rope.items())])


def _target(target: dict[str, Any] | None) -> str:
    if target is None:
        return ""
    names = ("hidden_size", "vocab_size", "num_layers")
    known = [f"{name} {target[name]}" for name in names if target[name] is not None]
    hashes = [f"{name} {target[name][:8]}" for name in ("weights", "tokenizer") if target[name]]
    return ", ".join([target["name"] or "no name", *known, *hashes])
