"""Which target a head was trained for: facts to compare, and the refusal of another one."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.checkpoints.head import HeadCheckpoint, TargetIdentity

# Weights that the hash looks at, spread over every matrix of the model.
NUM_SAMPLES = 2**20


def identify_target(target: Any) -> TargetIdentity:
    """The facts of a target that a head depends on.

    Args:
        target: an `HFTarget`.
    """
    return TargetIdentity(
        name=_name(str(getattr(target.model.config, "_name_or_path", "") or "")),
        hidden_size=target.config.hidden_size,
        vocab_size=target.vocab_size,
        num_layers=target.config.num_hidden_layers,
        weights=_hash_of_weights(target.model),
        tokenizer=hash_of_vocabulary(target.tokenizer),
    )


def check_target(checkpoint: HeadCheckpoint, identity: TargetIdentity, force: bool = False) -> None:
    """Refuse a head that was trained for another target.

    A fact that the checkpoint or the target does not know is not compared, nor are names, which
    change with a folder.

    Args:
        checkpoint: the head.
        identity: of the target that is to use it, from `identify_target`.
        force: take a target with other weights or another tokenizer; never one of another size.

    Raises:
        ValueError: the first fact that differs.
    """
    _check_taps(checkpoint, identity)
    known = checkpoint.target
    if known is None:
        return
    for fact in ("hidden_size", "vocab_size", "num_layers"):
        wanted, given = getattr(known, fact), getattr(identity, fact)
        if None not in (wanted, given) and wanted != given:
            raise ValueError(
                f"the head was trained for {_called(known)} with {fact} {wanted}, but "
                f"{_called(identity)} has {fact} {given}; use the target that it was trained for, "
                "or train a head for this one"
            )
    for fact, noun in (("tokenizer", "vocabulary"), ("weights", "set of weights")):
        wanted, given = getattr(known, fact), getattr(identity, fact)
        if not force and None not in (wanted, given) and wanted != given:
            raise ValueError(
                f"the head was trained for {_called(known)}, whose {noun} differs from that of "
                f"{_called(identity)} (hash {wanted[:8]}, not {given[:8]}); use that target, or "
                "force=true to draft for this one all the same"
            )


def _check_taps(checkpoint: HeadCheckpoint, identity: TargetIdentity) -> None:
    """Refuse taps that the target does not have, or that another engine meant otherwise."""
    last = identity.num_layers
    for tap in checkpoint.options.get("taps") or ():
        if last is not None and tap > last:
            raise ValueError(
                f"the head reads hidden_states[{tap}] but {_called(identity)} has only {last} "
                "layers; use the target that the head was trained for"
            )
        if tap == last and checkpoint.layout != "specdec":
            raise ValueError(
                f"the head reads hidden_states[{tap}] of {_called(identity)}, which engines "
                "capture before the final norm and we behind it; only heads trained by specdec "
                "can read the last layer"
            )


def _called(identity: TargetIdentity) -> str:
    return f"target {identity.name!r}" if identity.name else "a target"


def _name(path: str) -> str | None:
    """A hub id whole; of a path only its last folder, for others do not share our disks."""
    hub = [part for part in Path(path).parts if part.startswith("models--")]
    if hub:
        return hub[0].removeprefix("models--").replace("--", "/")
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).is_dir()
    return (Path(path).name if is_local else path) or None


def _hash_of_weights(model: Any) -> str | None:
    """Hash of the signs of up to `NUM_SAMPLES` weights, taken evenly from every matrix.

    Signs are the same in every floating dtype, so that a target keeps its hash whatever dtype it
    is loaded in; rounded values would not, since they round twice. None for quantised weights,
    whose signs are another matter, and for weights that are not in memory, all or some.
    """
    config = model.config
    if getattr(model, "is_quantized", False) or getattr(config, "quantization_config", None):
        return None
    if getattr(model, "is_partial", False):
        return None
    matrices = [weight for _, weight in sorted(model.named_parameters()) if weight.ndim > 1]
    return _hash_of_signs(matrices)


def hash_of_ends(model: Any) -> str | None:
    """Hash of the signs of a model's input embedding and vocabulary projection.

    Known where only these two are in memory, and in a quantised model that kept both as they were;
    None where it did not.
    """
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return _hash_of_signs([part.weight for part in parts])


def _hash_of_signs(matrices: list[Tensor]) -> str | None:
    if not all(m.is_floating_point() and m.itemsize > 1 and not m.is_meta for m in matrices):
        return None
    share = max(1, NUM_SAMPLES // max(1, len(matrices)))
    signs = [_signs(weight.detach(), share) for weight in matrices]
    return hashlib.sha256(torch.cat(signs).numpy().tobytes()).hexdigest() if signs else None


def _signs(weight: Tensor, count: int) -> Tensor:
    """Sign bits [n] of at most `count` weights, on the CPU."""
    stride = -(-weight.numel() // count)
    return weight.reshape(-1)[::stride].signbit().cpu()


def hash_of_vocabulary(tokenizer: Any) -> str | None:
    """Hash of a tokenizer's tokens and their ids; None for no tokenizer."""
    if tokenizer is None:
        return None
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(tokens.encode()).hexdigest()
