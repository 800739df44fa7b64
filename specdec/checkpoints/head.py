"""A draft head's checkpoint in one form, whatever layout it came from, and its checks."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from specdec.registry import head_class
from specdec.verify.tree import from_choices

Count = Annotated[int, Field(ge=1)]


def _is_tree(choices: list[list[int]]) -> list[list[int]]:
    try:
        from_choices(choices)
    except ValueError as error:
        raise ValueError(f"must be a tree: {error}") from error
    return choices


Tree = Annotated[list[list[int]], AfterValidator(_is_tree)]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class TargetIdentity:
    """The target that a head was trained for; None where a fact is not known.

    Attributes:
        name: hub id, or the last folder of a path; for people.
        hidden_size: H of the target.
        vocab_size: V of the target.
        num_layers: decoder layers of the target.
        weights: hash of the signs of a few of its weights; none for quantized targets.
        tokenizer: hash of its vocabulary; none for targets without a tokenizer.
        facts: its text config as far as it changes what is computed, its stop ids
            ("eos_token_ids") and how it is quantized ("quantization").
        magnitudes: tensor -> two figures of sampled weights, see `identity.magnitude`.
    """

    name: str | None
    hidden_size: Count | None
    vocab_size: Count | None = None
    num_layers: Count | None = None
    weights: str | None = None
    tokenizer: str | None = None
    facts: dict[str, Any] | None = None
    magnitudes: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] | None = None


@dataclass(frozen=True, eq=False)
class HeadCheckpoint:
    """A head as its drafter builds it; options and training are JSON values."""

    kind: str  # in the registry
    options: dict[str, Any]  # taps are indices of Hugging Face's `hidden_states`
    tensors: dict[str, Tensor]  # under the names of the head's `state_dict`
    tree: list[list[int]] | None = None  # choices of a static tree that came with it
    target: TargetIdentity | None = None  # the model it was trained for, if the layout says
    training: dict[str, Any] = field(default_factory=dict)
    layout: str = "specdec"  # that it was read from


def construct(kind: str, options: Mapping[str, Any], target_config: Any, *parts: Any) -> Any:
    """Build the `specdec.drafters.heads.Head` of a strategy."""
    try:
        return head_class(kind)(options, target_config, *parts)
    except (TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{kind} head cannot use its options ({error})") from error


def head_of(checkpoint: HeadCheckpoint, where: str = "the head") -> Any:
    """Build a checkpoint's head on the meta device: its options, names and shapes, no weights.

    What its options leave to the target is taken from the target's identity, and from the tensors
    where that is not known.
    """
    known = {"hidden_size": None, "vocab_size": None, "num_hidden_layers": 0}
    target = checkpoint.target
    if target is None or not target.facts:  # which may leave out what tensors seem to say
        known |= head_class(checkpoint.kind).target_facts(checkpoint.tensors)
    if target is not None:
        sizes = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
        sizes["num_hidden_layers"] = target.num_layers
        known |= {name: size for name, size in sizes.items() if size} | (target.facts or {})
    try:
        with torch.device("meta"):
            return construct(checkpoint.kind, checkpoint.options, SimpleNamespace(**known))
    except ValueError as error:
        raise ValueError(f"{where!r}: {error}") from error


def checked(
    checkpoint: HeadCheckpoint,
    where: str,
    name_of: Callable[[str], str] = str,
    carried: Collection[str] = (),
) -> HeadCheckpoint:
    """Check the tensors of a checkpoint, and name them as we do."""
    head = head_of(checkpoint, where)
    tensors = take_tensors(where, checkpoint.tensors, head, name_of, carried)
    return replace(checkpoint, tensors=tensors)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)
# Why a tensor that is left over is there.
_REASONS = {
    "fc_norm": "it is of EAGLE-3.1, whose config says fc_norm=true",
    "aux_norm": "norms of auxiliary states (use_aux_norm) are not supported",
    **dict.fromkeys(("q_norm", "k_norm"), "Qwen3's norms are supported in EAGLE-3 heads only"),
    "mask_hidden": "it is of P-EAGLE, which is read in the layout of speculators",
    "_scale": "quantized heads are not supported",
    "layers.1.": "several layers are read in the layout of speculators, whose config counts them",
    "fc.bias": "is `bias` false in config.json by mistake?",
}


def take_tensors(
    where: str,
    given: Mapping[str, Tensor],
    head: Any,
    name_of: Callable[[str], str] = str,
    carried: Collection[str] = (),
) -> dict[str, Tensor]:
    """Check tensors against a module's `state_dict`, and name them as it does.

    `name_of` gives the layout's name of one of ours; `carried` tensors may be there for nothing.
    """
    wanted = head.state_dict()
    names = {ours: name_of(ours) for ours in wanted}
    left = sorted(given.keys() - {*names.values(), *carried})
    for ours, name in names.items():
        if name not in given:
            others = f" (it has {', '.join(left[:3])}, which nothing asks for)" if left else ""
            raise ValueError(
                f"{where!r} lacks the tensor {name}{others}; it is incomplete or its config of "
                "another head, copy both again"
            )
        if fault := _fault(given[name], wanted[ours]):
            raise ValueError(f"{where!r}: {name} {fault}")
    if left:
        reason = next((words for part, words in _REASONS.items() if part in left[0]), "")
        raise ValueError(
            f"{where!r} has {len(left)} tensors that its config does not ask for: "
            f"{', '.join(left[:3])}; {reason or 'the config or the tensors are of another head'}"
        )
    tensors = {ours: given[name] for ours, name in names.items()}
    try:
        head.check_values(tensors)
    except ValueError as error:
        raise ValueError(f"{where!r}: {error}") from error
    return tensors


def _fault(tensor: Tensor, wanted: Tensor) -> str | None:
    kinds = _FLOATS if wanted.is_floating_point() else _INTEGERS
    dtypes = kinds if wanted.dtype in kinds else (wanted.dtype,)
    if tensor.dtype not in dtypes:
        return f"is of {tensor.dtype} but must be of {' or '.join(map(str, dtypes))}"
    if tensor.shape != wanted.shape:
        return (
            f"has shape {tuple(tensor.shape)} but must have {tuple(wanted.shape)}; check the config"
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        return "holds NaN or infinite values; copy it again, or lower the learning rate"
    return None
