"""The checkpoints of a run: written whole or not at all, the newest two kept."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from specdec.checkpoints.identity import TARGET, check_resumed
from specdec.common.files import NO_SPACE, disk_trouble, read_json, sync, write_durably

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shard(
    model: nn.Module,
    units: Sequence[nn.Module],
    device: torch.device,
    num_processes: int,
    mixed_precision: str,
) -> None:
    """Make every parameter a `DTensor` of which each process holds a part.

    Args:
        model: whose forward makes the loss; the same in all processes.
        units: parts of it that are gathered one after the other; what is outside of them is
            gathered for the whole forward.
        device: of this process.
        num_processes: in all.
        mixed_precision: "no", "bf16" or "fp16"; gradients are summed in float32 in any case.

    Raises:
        ValueError: a quantised parameter.
    """
    _require_floats(model)
    mesh = init_device_mesh(device.type, (num_processes,))
    dtype = _DTYPES.get(mixed_precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*units, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold the weights of a model whole; nothing where it is not sharded.

    All processes enter together. Inside, each may call what it likes, as often as it likes,
    without gradients, but for a first forward of the model itself.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    inner = [part for part in parts if part is not model]
    for part in parts:
        part.unshard()
    # The model itself stays whole behind its forward anyway.
    for part in inner:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)


def set_gradient_sync(model: nn.Module, is_on: bool) -> None:
    """Whether the next backward pass of a sharded model exchanges gradients."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(is_on)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered if it is sharded; all processes call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module, is_kept: bool) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers of a module, on the CPU.

    All processes call together.

    Args:
        module: sharded or not.
        is_kept: whether this process wants them; else it gets none, and needs no memory for them.
    """
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights stay tied
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        if id(tensor) not in seen:
            gathered = whole(tensor.detach())
            seen[id(tensor)] = gathered.cpu() if is_kept else gathered.new_empty(0)
        if is_kept:
            found[name] = seen[id(tensor)]
    return found


def _require_floats(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            raise ValueError(
                f"config sharding is 'fsdp2', but {name.removeprefix('module.')!r} is quantised "
                f"({str(weight.dtype).removeprefix('torch.')}), which cannot be sharded; set "
                "sharding=none, where every process holds the base, or "
                "drafter.options.method=lora"
            )


def write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, flushed to the disk; all processes call together.

    Args:
        folder: exists, and holds none yet.
        tensors: by name, the same names in all processes; `DTensor` or plain.

    Raises:
        OSError: one of the processes could not write.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _expected():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=_is_alone())


def read_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors with what `write_tensors` wrote, from however many processes.

    Args:
        folder: given to `write_tensors`.
        tensors: by name; written in place.

    Raises:
        ValueError: a tensor that is missing, is not wanted, has another shape or dtype, or holds
            a number that is not finite; a file that cannot be read.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        _check(folder, tensors, reader.read_metadata().state_dict_metadata)
        with _expected():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=_is_alone())
    except SafetensorError as error:
        raise _damaged(folder, f"a file of it cannot be read ({error})") from error
    for name, tensor in tensors.items():
        if not whole(tensor.isfinite().all()):
            raise _damaged(folder, f"its {name!r} holds numbers that are not finite")


def _check(folder: Path, tensors: Mapping[str, Tensor], found: Mapping[str, Any]) -> None:
    """The planner of torch looks at shapes alone, and not whether all parts of one are there."""
    for name in sorted(tensors.keys() ^ found.keys()):
        fault = f"it lacks {name!r}" if name in tensors else f"{name!r} is not of this run"
        raise _damaged(folder, fault)
    for name, tensor in tensors.items():
        size, dtype = tuple(found[name].size), found[name].properties.dtype
        if (size, dtype) != (tuple(tensor.shape), tensor.dtype):
            raise _damaged(
                folder,
                f"its {name!r} is {list(size)} {dtype} but must be {list(tensor.shape)} "
                f"{tensor.dtype}",
            )
        if sum(prod(chunk.sizes) for chunk in found[name].chunks) != prod(size):
            raise _damaged(folder, f"it lacks a part of {name!r}")


def _damaged(folder: Path, fault: str) -> ValueError:
    return ValueError(
        f"the checkpoint {str(folder)!r} is damaged: {fault}; remove it, and the same command "
        "resumes from the one before"
    )


@contextmanager
def _expected() -> Iterator[None]:
    """No warning that a single process is alone, and errors as they were raised."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        raise _cause(error) from None


def _cause(error: CheckpointException) -> BaseException:
    """What happened in the first process that failed."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((each for each in causes if isinstance(each, KeyboardInterrupt)), causes[0])


def _is_alone() -> bool:
    return PartialState().num_processes == 1


def in_first_process(act: Callable[[], None]) -> None:
    """Run it in the first process; the others wait, and get the `OSError` that it raises."""
    errors: list[OSError | None] = [None]
    if PartialState().is_main_process:
        try:
            act()
        except OSError as error:
            errors = [error]
    broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]


KEPT = 2


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done; with the seed it says which rows come next.
        tokens: read so far, without padding.
        answer_tokens: of them, those that the target wrote.
        seconds: of all sessions, evaluation and saving included.
        step_seconds: of the training steps alone.
    """

    step: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint but for its tensors, which `read_tensors` reads.

    Attributes:
        progress: at the checkpoint.
        folder: of the checkpoint.
        scaler: state of the loss scaler; empty but for float16.
    """

    progress: Progress
    folder: Path
    scaler: dict[str, float] = field(default_factory=dict)


class RunFolder:
    """Checkpoints `checkpoint-{step}` in a folder, all of one run.

    Args:
        folder: of the run.
        identity: JSON values; a folder whose checkpoints have another one is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self._identity = folder, identity

    def prepare(self) -> None:
        """Make the folder and remove what a killed run did not finish; all processes call.

        Raises:
            PermissionError: the folder cannot be written.
        """
        in_first_process(self._prepare)

    def newest(self) -> Saved | None:
        """The newest checkpoint, None if there is none yet.

        Raises:
            ValueError: it belongs to another run.
        """
        found = self._all()
        if not found:
            return None
        content = read_json(found[-1] / "progress.json")
        try:
            identity, progress = dict(content["identity"]), Progress(**content["progress"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the checkpoint {str(found[-1])!r} is damaged: progress.json does not say how far "
                "it is; remove it, and the same command resumes from the one before"
            ) from error
        self._check_identity(identity)
        return Saved(progress, found[-1], content.get("scaler", {}))

    def path(self, step: int) -> Path:
        """Of the checkpoint behind so many steps."""
        return self.folder / f"checkpoint-{step}"

    def save(
        self, progress: Progress, tensors: Mapping[str, Tensor], scaler: Mapping[str, float]
    ) -> None:
        """Write `checkpoint-{step}`, then remove all but the newest ones; all processes call.

        Args:
            progress: with the step.
            tensors: see `write_tensors`.
            scaler: state of the loss scaler.

        Raises:
            OSError: it could not be written, because the disk is full for one; older checkpoints
                are as they were.
        """
        partial = self.folder / f".checkpoint-{progress.step}.partial"
        content = {"identity": self._identity, "progress": asdict(progress)}
        text = json.dumps({**content, "scaler": dict(scaler)} if scaler else content, indent=1)
        try:
            in_first_process(lambda: _begin(partial, text))
            write_tensors(partial, tensors)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._failure(progress.step, error) from error
        in_first_process(lambda: self._finish(partial, progress.step))

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for partial in self.folder.glob(".checkpoint-*.partial"):
                shutil.rmtree(partial)
        except OSError as error:
            raise disk_trouble(self.folder, error) from error

    def _finish(self, partial: Path, step: int) -> None:
        os.replace(partial, self.path(step))
        sync(self.folder)
        for old in self._all()[:-KEPT]:
            # Renamed first: a kill in between must not leave a half-removed checkpoint.
            doomed = old.with_name(f".{old.name}.partial")
            os.replace(old, doomed)
            shutil.rmtree(doomed)

    def _failure(self, step: int, error: OSError) -> OSError:
        reason = "the disk is full" if error.errno in NO_SPACE else str(error)
        older = self._all()
        kept = f"{older[-1].name} is intact" if older else "there is none before it"
        return OSError(
            f"the checkpoint of step {step} could not be written to {str(self.folder)!r}: "
            f"{reason}; {kept}. Free space there and give the same command again"
        )

    def _all(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = {
            int(number): path
            for path in self.folder.glob("checkpoint-*")
            if (number := path.name.removeprefix("checkpoint-")).isdigit()
        }
        return [found[step] for step in sorted(found)]

    def _check_identity(self, found: dict[str, Any]) -> None:
        ours, theirs = _flat(self._identity | {TARGET: None}), _flat(found | {TARGET: None})
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"{str(self.folder)!r} holds a run with another {key} ({theirs.get(key)!r}, "
                    f"not {ours.get(key)!r}); choose another --out folder or remove this one"
                )
        check_resumed(self.folder, found.get(TARGET), self._identity.get(TARGET))


def _begin(partial: Path, text: str) -> None:
    partial.mkdir()
    write_durably(partial / "progress.json", text.encode())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        flat.update({f"{prefix}{key}": value} if inner is None else inner)
    return flat
