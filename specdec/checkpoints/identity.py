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

_NOUNS = {"tokenizer": "vocabulary", "weights": "set of weights", "magnitude": "set of weights"}
# Its key where a run says what makes it the same run.
TARGET = "the target"
# Weights that the hash looks at, spread over every matrix, and those measured of every tensor.
NUM_SAMPLES, NUM_MEASURED = 2**20, 2**12
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
    "eos_token_id",  # a generation config may say otherwise
}


def identify_target(target: Any) -> TargetIdentity:
    """Collect the facts of an `HFTarget` that a head depends on."""
    model, config = target.model, target.config
    how: Any = getattr(model.config, "quantization_config", None)
    facts = {
        name: value
        for name, value in config.to_dict().items()
        if name[0] != "_" and name not in _IDLE and not name.endswith(("dropout", "pdrop"))
    }
    facts["quantization"] = how.to_dict() if hasattr(how, "to_dict") else how
    facts["eos_token_ids"] = sorted(target.eos_token_ids)
    # Signs are the same in every floating dtype, so that a target keeps its hash in each of them.
    is_whole = not (how or getattr(model, "is_quantized", False))
    matrices = [weight for _, weight in sorted(model.named_parameters()) if weight.ndim > 1]
    return TargetIdentity(
        name=_name(str(getattr(model.config, "_name_or_path", "") or "")),
        hidden_size=config.hidden_size,
        vocab_size=target.vocab_size,
        num_layers=config.num_hidden_layers,
        weights=_hash_of_signs(matrices) if is_whole else None,
        tokenizer=hash_of_vocabulary(target.tokenizer),
        # Tuples are lists there, and what is infinite is said in words.
        facts=json.loads(json.dumps(facts, default=str), parse_constant=str),
        magnitudes=dict(_magnitudes(model)),
    )


def _name(path: str) -> str | None:
    """Keep a hub id whole; of a path only its last folder, for others do not share our disks."""
    hub = [part for part in Path(path).parts if part.startswith("models--")]
    if hub:
        return hub[0].removeprefix("models--").replace("--", "/")
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).is_dir()
    return (Path(path).name if is_local else path) or None


def _magnitudes(model: Any) -> Iterator[tuple[str, list[float]]]:
    """Measure samples of every tensor: their root mean square, and their product with a fixed wave.

    The second sees signs and order, which the first does not. Rounding to any floating dtype of
    two bytes moves both by less than a hundredth of the first.
    """
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.numel():
            continue
        if not (weight.is_floating_point() and weight.itemsize > 1):  # packed
            name = f"{name} ({str(weight.dtype).removeprefix('torch.')})"
        stride = -(-weight.numel() // NUM_MEASURED)
        samples = weight.detach().reshape(-1)[::stride].cpu().double().nan_to_num(0, 0, 0)
        wave = torch.arange(len(samples)).double().square().mul(0.7).cos()
        both = samples.square().mean().sqrt(), wave @ samples / len(samples) ** 0.5
        yield name, [float(f"{float(figure):.4g}") for figure in both]


def hash_of_ends(model: Any) -> str | None:
    """Hash the signs of a model's embedding and projection; quantized models may have kept both."""
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    return _hash_of_signs([part.weight for part in parts])


def _hash_of_signs(matrices: list[Tensor]) -> str | None:
    """Hash samples of every matrix; None for packed weights and where not all are in memory."""
    if not all(m.is_floating_point() and m.itemsize > 1 and not m.is_meta for m in matrices):
        return None
    share = max(1, NUM_SAMPLES // max(1, len(matrices)))
    signs = [
        matrix.detach().reshape(-1)[:: -(-matrix.numel() // share)].signbit().cpu()
        for matrix in matrices
    ]
    return hashlib.sha256(torch.cat(signs).numpy().tobytes()).hexdigest() if signs else None


def hash_of_vocabulary(tokenizer: Any) -> str | None:
    """Hash a tokenizer's tokens and their ids; None for no tokenizer."""
    if tokenizer is None:
        return None
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(tokens.encode()).hexdigest()


def check_target(checkpoint: HeadCheckpoint, identity: TargetIdentity, force: bool = False) -> None:
    """Refuse a head that was trained for another target.

    A fact that the checkpoint or the target does not know is not compared, nor are names, which
    change with a folder. With `force` only another size and taps that are not there are refused.
    """
    known, last, theirs = checkpoint.target, identity.num_layers, _called(identity)
    for tap in checkpoint.options.get("taps") or ():
        if last is not None and tap > last:
            raise ValueError(
                f"the head reads hidden_states[{tap}] but {theirs} has only {last} layers; use the "
                "head's own"
            )
        if tap == last and checkpoint.layout != "specdec":
            raise ValueError(
                f"the head reads hidden_states[{tap}] of {theirs}, which engines capture before "
                "the final norm and we behind it; train it by specdec"
            )
    if known is None:
        return
    for fact, wanted, given in differences(known, identity):
        if fact in SIZES:
            raise ValueError(
                f"the head was trained for {_called(known)} with {fact} {wanted}, but {theirs} has "
                f"{fact} {given}; use that target, or train a head for this one"
            )
        if not force:
            noun = _NOUNS.get(fact.split(" ")[0], "configuration")
            raise ValueError(
                f"the head was trained for {_called(known)}, whose {noun} differs from that of "
                f"{theirs} ({fact} {wanted}, not {given}); use that target, or force=true"
            )


def _called(identity: TargetIdentity) -> str:
    return f"target {identity.name!r}" if identity.name else "a target"


def differences(
    known: TargetIdentity, given: TargetIdentity, is_resume: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Yield facts that differ, with both values; what an identity does not know is not compared.

    A quantized version of a target is the same one to a head, which drafts well for it: how it is
    quantized, and weights that are rounded otherwise, count only where a run is to go on.
    """
    if known.facts is None and (known.weights or is_resume):
        warnings.warn(
            "the target is known as older versions wrote it, so differences may go unseen; run "
            "again, or: specdec export HEAD --to specdec --target TARGET --out NEW_FOLDER",
            stacklevel=4,
        )

    def told(*names: str) -> list[dict[str, Any]]:
        return [{n: v for n in names if (v := getattr(e, n)) is not None} for e in (known, given)]

    facts, others = dict(known.facts or {}), dict(given.facts or {})
    is_requantized = facts.get("quantization") != others.get("quantization")
    if not is_resume:
        facts.pop("quantization", None)
    yield from _different(*told(*SIZES, "tokenizer"))
    yield from _different(facts, others)
    if facts and others and is_requantized:
        return
    yield from _different(*told("weights"))
    now = given.magnitudes or {}
    for name, ours in (known.magnitudes or {}).items():
        theirs = now.get(name, ours)
        near = 1e-2 * max(ours[0], theirs[0]) + 1e-7  # no dtype rounds them by more
        if any(abs(a - b) > near for a, b in zip(ours, theirs, strict=True)):
            yield f"magnitude of {name}", ours, theirs
            return


def _different(
    ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for name in (name for name in ours if name in theirs):
        mine, other = ours[name], theirs[name]
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from _different(mine, other)
        elif mine != other:
            yield name, _short(mine), _short(other)


def _short(value: Any) -> Any:
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 64 else value  # a hash


def check_resumed(folder: Path, written: Any, given: Any) -> None:
    """Refuse to go on with a run of another target."""
    names = [each.name for each in fields(TargetIdentity)]
    known, now = (TargetIdentity(**{n: (e or {}).get(n) for n in names}) for e in (written, given))
    for fact, was, new in differences(known, now, is_resume=True):
        raise ValueError(
            f"{str(folder)!r} is of another target: {fact} was {was} and is {new} now; choose "
            "another --out folder or remove this one"
        )


def as_json(identity: TargetIdentity) -> dict[str, Any]:
    """Turn an identity into JSON values, without the name, which changes with a folder."""
    return {name: value for name, value in asdict(identity).items() if name != "name"}
