"""The checkpoints of a run: safetensors and JSON, whole or not there, for any number of processes.

transformers' own are unchecked pickles, and sharded ones fit one number of processes only.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from specdec.checkpoints.identity import TARGET, check_resumed
from specdec.common.config import Config, read_model, write_model
from specdec.common.files import check_same_run, disk_trouble, whole_folder

_STATE, _PROGRESS = "trainer_state.json", "progress.json"  # the first is transformers' own name


class Progress(Config, ser_json_inf_nan="constants"):
    """A checkpoint but for its tensors and the state of transformers' `Trainer`."""

    identity: dict[str, Any]  # facts that make a run the same run
    seconds: float  # of all sessions, evaluation and saving included
    step_seconds: float  # of the training steps alone
    scheduler: dict[str, Any]  # state of the learning rate's schedule
    scaler: dict[str, float] = Field(default_factory=dict)  # of the loss, for float16
    numbers: dict[str, float] = Field(default_factory=dict)  # plain ones of the optimizer's state


class Checkpoint(NamedTuple):
    folder: Path
    progress: Progress
    state: TrainerState


def newest_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """Find the newest checkpoint of a run, whose folder is made; None if there is none yet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if PartialState().is_main_process:
            for unfinished in folder.glob(".checkpoint-*.partial"):  # of a killed run
                shutil.rmtree(unfinished)
        found = get_last_checkpoint(str(folder))
    except OSError as error:
        raise disk_trouble(folder, error) from error
    if found is None:
        return None
    place = Path(found)
    try:
        progress = read_model(Progress, place / _PROGRESS)
        state = TrainerState.load_from_json(str(place / _STATE))
    except (OSError, TypeError, ValueError) as error:
        raise _damaged(place, f"its {_PROGRESS} or {_STATE} cannot be read ({error})") from error
    checks = {TARGET: partial(check_resumed, folder)}
    check_same_run(folder, progress.identity, identity, checks)
    return Checkpoint(place, progress, state)


def write_checkpoint(
    folder: Path, progress: Progress, state: TrainerState, tensors: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint, flushed to the disk; all processes call together."""
    is_first = PartialState().is_main_process
    with whole_folder(folder) if is_first else nullcontext() as place:
        (place,) = broadcast_object_list([place])
        if is_first:
            write_model(place / _PROGRESS, progress)
            state.save_to_json(str(place / _STATE))
        writer = dcp.HuggingFaceStorageWriter(str(place), save_distributed=True)
        with _distributed() as is_alone:
            dcp.save(dict(tensors), storage_writer=writer, no_dist=is_alone)
    PartialState().wait_for_everyone()


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Fill tensors in place with those of a checkpoint, from however many processes."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        _check(folder, tensors, reader.read_metadata().state_dict_metadata, prefix)
        with _distributed() as is_alone:
            dcp.load(dict(tensors), storage_reader=reader, no_dist=is_alone)
    except SafetensorError as error:
        raise _damaged(folder, f"a file of it cannot be read ({error})") from error
    for name, tensor in tensors.items():
        if not whole(tensor.isfinite().all()):
            raise _damaged(folder, f"its {name!r} holds numbers that are not finite")


def _check(folder: Path, tensors: Mapping[str, Tensor], found: Any, prefix: str) -> None:
    """The planner of torch looks at shapes alone, and not whether all parts of one are there."""
    for name in found:
        if name.startswith(prefix) and name not in tensors:
            raise _damaged(folder, f"{name!r} is not of this run")
    for name, tensor in tensors.items():
        if name not in found:
            raise _damaged(folder, f"it lacks {name!r}")
        stored = found[name]
        was = f"{list(stored.size)} {stored.properties.dtype}"
        if was != (now := f"{list(tensor.shape)} {tensor.dtype}"):
            raise _damaged(folder, f"its {name!r} is {was} but must be {now}")
        if sum(prod(chunk.sizes) for chunk in stored.chunks) != prod(stored.size):
            raise _damaged(folder, f"it lacks a part of {name!r}")


def _damaged(folder: Path, fault: str) -> ValueError:
    fix = "remove it, and the same command resumes from the one before"
    return ValueError(f"the checkpoint {str(folder)!r} is damaged: {fault}; {fix}")


@contextmanager
def _distributed() -> Iterator[bool]:
    """Tell whether a process is alone, which is no warning; errors come as they were raised."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield PartialState().num_processes == 1
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        pressed = (each for each in causes if isinstance(each, KeyboardInterrupt))
        raise next(pressed, causes[0]) from None


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold the weights of a sharded model whole; all processes enter together.

    Inside, each may call what it likes without gradients, but for a first forward of the model.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    # The model itself stays whole after its forward anyway.
    inner = [part for part in parts if part is not model]
    for part in parts:
        part.unshard()
    for part in inner:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor if it is sharded; all processes call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module, is_kept: bool) -> dict[str, Tensor]:
    """Copy trained parameters and persistent buffers to the CPU; all processes call together."""
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights stay tied
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            continue
        if id(tensor) not in seen:
            gathered = whole(tensor.detach())
            seen[id(tensor)] = gathered.cpu() if is_kept else gathered.new_empty(0)
        found[name] = seen[id(tensor)]
    return found
