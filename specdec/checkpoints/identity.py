"""The identity of a target: facts to compare, and the refusal of another one."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.checkpoints.head import HeadCheckpoint, TargetIdentity

# Weights that the hash looks at, spread over every matrix of the model.
NUM_SAMPLES = 2**20
# Its key where a run says what makes it the same run.
TARGET = "the target"
# Weights of every tensor whose magnitudes are kept.
NUM_MEASURED = 2**12
SIZES = ("hidden_size", "vocab_size", "num_layers")
# Keys of a config that change nothing of what a model computes from tokens. All others count, for
# a key that we do not know may matter; what only one of two versions of transformers knows is not
# compared.
_IDLE = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "return_dict"),
    *("output_hidden_states", "output_attentions", "output_router_logits", "pretraining_tp"),
    *("initializer_range", "router_aux_loss_coef", "gradient_checkpointing", "tokenizer_class"),
    *("chunk_size_feed_forward", "pad_token_id", "bos_token_id", "quantization_config"),
}


def identify_target(target: Any) -> TargetIdentity:
    """Collect the facts of an `HFTarget` that a head depends on."""
    return TargetIdentity(
        name=_name(str(getattr(target.model.config, "_name_or_path", "") or "")),
        hidden_size=target.config.hidden_size,
        vocab_size=target.vocab_size,
        num_layers=target.config.num_hidden_layers,
        weights=_hash_of_weights(target.model),
        tokenizer=hash_of_vocabulary(target.tokenizer),
        facts=_facts(target),
        magnitudes={
            _name_of(name, weight, target.model): magnitude(weight)
            for name, weight in target.model.named_parameters()
            if weight.numel() and not weight.is_meta
        },
    )


def check_target(checkpoint: HeadCheckpoint, identity: TargetIdentity, force: bool = False) -> None:
    """Refuse a head that was trained for another target.

    A fact that the checkpoint or the target does not know is not compared, nor are names, which
    change with a folder.

    Args:
        checkpoint: the head.
        identity: the target that is to use it, from `identify_target`.
        force: take a target with other weights or another tokenizer; never one of another size.

    Raises:
        ValueError: the first fact that differs.
    """
    _check_taps(checkpoint, identity)
    known = checkpoint.target
    if known is None:
        return
    ours, theirs = _called(known), _called(identity)
    renew = "specdec convert HEAD NEW_FOLDER --to specdec --target TARGET"
    for fact, wanted, given in differences(known, identity, "the head", renew):
        if fact in SIZES:
            raise ValueError(
                f"the head was trained for {ours} with {fact} {wanted}, but {theirs} has {fact} "
                f"{given}; use the target that it was trained for, or train a head for this one"
            )
        if not force:
            noun = _NOUNS.get(fact.split(" ")[0], "configuration")
            raise ValueError(
                f"the head was trained for {ours}, whose {noun} differs from that of {theirs} "
                f"({fact} {wanted}, not {given}); use that target, or force=true to draft for this "
                "one all the same"
            )


_NOUNS = {"tokenizer": "vocabulary", "weights": "set of weights", "magnitude": "set of weights"}


def differences(
    known: TargetIdentity, given: TargetIdentity, where: str, renew: str, is_resume: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Yield facts that differ, with both values; what an identity does not know is not compared.

    A quantized version of a target is the same one to a head, which drafts well for it: how it is
    quantized, and weights that are rounded otherwise, count only where a run is to go on.

    Args:
        known: the target as it was written down.
        given: the target that is there.
        where: holder of the known one, for a warning if an older version wrote it.
        renew: the command that writes it anew.
        is_resume: a run is to go on with it.
    """
    if known.facts is None and (known.weights or is_resume):
        warnings.warn(
            f"{where} knows its target by the signs of sampled weights at most, as older versions "
            "wrote it: another configuration, norm or scale of weights goes unseen. To renew it: "
            f"{renew}",
            stacklevel=4,
        )
    for fact in (*SIZES, "tokenizer"):
        ours, theirs = getattr(known, fact), getattr(given, fact)
        if None not in (ours, theirs) and ours != theirs:
            yield fact, _short(ours), _short(theirs)
    facts = [dict(each.facts or {}) for each in (known, given)]
    quantized = [each.get("quantization") for each in facts]
    if not is_resume:
        for each in facts:
            each.pop("quantization", None)
    yield from _different_facts(*facts)
    if quantized[0] != quantized[1] and known.facts and given.facts:
        return
    if None not in (known.weights, given.weights) and known.weights != given.weights:
        yield "weights", _short(known.weights), _short(given.weights)
    now = given.magnitudes or {}
    for name, ours in (known.magnitudes or {}).items():
        theirs = now.get(name, ours)
        near = 1e-2 * max(ours[0], theirs[0]) + 1e-7  # no dtype rounds them by more
        if any(abs(a - b) > near for a, b in zip(ours, theirs, strict=True)):
            yield f"magnitude of {name}", ours, theirs
            return


def _different_facts(
    ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for name in (name for name in ours if name in theirs):
        mine, other = ours[name], theirs[name]
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _different_facts(mine, other)
        elif mine != other:
            yield name, mine, other


def check_resumed(folder: Path, written: Any, given: Any) -> None:
    """Refuse to go on with a run of another target."""
    known, identity = (identity_of(each or {}) for each in (written, given))
    where, renew = repr(str(folder)), "give the command with an empty --out folder"
    for fact, was, now in differences(known, identity, where, renew, is_resume=True):
        raise ValueError(
            f"{where} is of another target: {fact} was {was} and is {now} now; choose another "
            "--out folder or remove this one"
        )


def as_json(identity: TargetIdentity) -> dict[str, Any]:
    """Turn an identity into JSON values, without the name, which changes with a folder."""
    return {name: value for name, value in asdict(identity).items() if name != "name"}


def identity_of(written: Mapping[str, Any]) -> TargetIdentity:
    """Make an identity of JSON values, whatever of it they hold."""
    known: dict[str, Any] = {each.name: written.get(each.name) for each in fields(TargetIdentity)}
    return TargetIdentity(**known)


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


def _facts(target: Any) -> dict[str, Any]:
    """Facts of a configuration that change what a target says."""
    facts = {
        name: value
        for name, value in target.config.to_dict().items()
        if name[0] != "_" and name not in _IDLE and not name.endswith(("dropout", "pdrop"))
    }
    how: Any = getattr(target.model.config, "quantization_config", None)
    facts["quantization"] = how.to_dict() if hasattr(how, "to_dict") else how
    facts.pop("eos_token_id", None)  # a generation config may say otherwise
    facts["eos_token_ids"] = sorted(target.eos_token_ids)
    found: dict[str, Any] = json.loads(json.dumps(facts, default=str))  # tuples are lists there
    return found


def _name_of(name: str, weight: Tensor, model: Any) -> str:
    """A tensor's name, that of packed weights with their dtype."""
    name = getattr(model, "names", {}).get(name, name)
    is_plain = weight.is_floating_point() and weight.itemsize > 1
    return name if is_plain else f"{name} ({str(weight.dtype).removeprefix('torch.')})"


def magnitude(weight: Tensor) -> list[float]:
    """Measure sampled weights: their root mean square, and their product with a fixed wave.

    The second sees signs and order, which the first does not. Rounding to any floating dtype of
    two bytes moves both by less than a hundredth of the first.
    """
    stride = -(-weight.numel() // NUM_MEASURED)
    samples = weight.detach().reshape(-1)[::stride].cpu().double().nan_to_num(0, 0, 0)
    wave = torch.arange(len(samples)).double().square().mul(0.7).cos()
    both = samples.square().mean().sqrt(), wave @ samples / len(samples) ** 0.5
    return [float(f"{float(figure):.4g}") for figure in both]


def _hash_of_weights(model: Any) -> str | None:
    """Hash of the signs of up to `NUM_SAMPLES` weights, taken evenly from every matrix.

    Signs are the same in every floating dtype, so that a target keeps its hash whatever dtype it
    is loaded in. None for quantized weights and where not all of them are in memory.
    """
    is_quantized = getattr(model, "is_quantized", False)
    is_quantized = is_quantized or getattr(model.config, "quantization_config", None)
    if is_quantized or getattr(model, "is_partial", False):
        return None
    matrices = [weight for _, weight in sorted(model.named_parameters()) if weight.ndim > 1]
    return _hash_of_signs(matrices)


def hash_of_ends(model: Any) -> str | None:
    """Hash the signs of a model's input embedding and vocabulary projection.

    It is known where only these two are in memory, and in a quantized model that kept both.
    """
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return _hash_of_signs([part.weight for part in parts])


def _hash_of_signs(matrices: list[Tensor]) -> str | None:
    if not all(m.is_floating_point() and m.itemsize > 1 and not m.is_meta for m in matrices):
        return None
    share = max(1, NUM_SAMPLES // max(1, len(matrices)))
    signs = [
        matrix.detach().reshape(-1)[:: -(-matrix.numel() // share)].signbit().cpu()
        for matrix in matrices
    ]
    return hashlib.sha256(torch.cat(signs).numpy().tobytes()).hexdigest() if signs else None


def _short(value: Any) -> Any:
    return f"{value[:8]}..." if isinstance(value, str) else value


def hash_of_vocabulary(tokenizer: Any) -> str | None:
    """Hash a tokenizer's tokens and their ids; None for no tokenizer."""
    if tokenizer is None:
        return None
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(tokens.encode()).hexdigest()
