"""The checkpoints of a run: safetensors and JSON, whole or not there, for any number of processes.

transformers' own are pickles that are written in place and read without a check, and sharded ones
fit the number of processes that wrote them only.
"""

import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

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

STATE = "trainer_state.json"  # transformers' name for it
_PROGRESS = "progress.json"


class Progress(Config, ser_json_inf_nan="constants"):
    """A checkpoint but for its tensors and the state of transformers' `Trainer`.

    Attributes:
        identity: facts that make a run the same run.
        seconds: duration of all sessions, evaluation and saving included.
        step_seconds: duration of the training steps alone.
        scheduler: state of the learning rate's schedule.
        scaler: state of the loss scaler; empty but for float16.
        numbers: plain numbers of the optimizer's state.
    """

    identity: dict[str, Any]
    seconds: float
    step_seconds: float
    scheduler: dict[str, Any]
    scaler: dict[str, float] = Field(default_factory=dict)
    numbers: dict[str, float] = Field(default_factory=dict)


def newest_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Path | None:
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
    written = read_progress(Path(found)).identity
    check_same_run(folder, written, identity, {TARGET: partial(check_resumed, folder)})
    return Path(found)


def read_progress(checkpoint: Path) -> Progress:
    """Read what a checkpoint says of its run."""
    try:
        return read_model(Progress, checkpoint / _PROGRESS)
    except (FileNotFoundError, ValueError) as error:
        raise _damaged(checkpoint, str(error)) from error


def read_state(checkpoint: Path) -> TrainerState:
    """Read the state of transformers' `Trainer`."""
    try:
        return TrainerState.load_from_json(str(checkpoint / STATE))
    except (OSError, TypeError, ValueError) as error:
        raise _damaged(checkpoint, f"its {STATE} cannot be read ({error})") from error


def write_checkpoint(
    folder: Path, progress: Progress, state: TrainerState, tensors: Mapping[str, Tensor]
) -> None:
    """Write a checkpoint, flushed to the disk; all processes call together."""
    is_first = PartialState().is_main_process
    with whole_folder(folder) if is_first else nullcontext() as place:
        (place,) = broadcast_object_list([place])
        if is_first:
            write_model(place / _PROGRESS, progress)
            state.save_to_json(str(place / STATE))
        writer = dcp.HuggingFaceStorageWriter(str(place), save_distributed=True)
        with _expected():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=_is_alone())
    PartialState().wait_for_everyone()


def read_tensors(folder: Path, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
    """Fill tensors in place with those of a checkpoint, from however many processes."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        found = reader.read_metadata().state_dict_metadata
        _check(folder, tensors, {n: each for n, each in found.items() if n.startswith(prefix)})
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
    """Find the error of the first process that failed."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((each for each in causes if isinstance(each, KeyboardInterrupt)), causes[0])


def _is_alone() -> bool:
    return PartialState().num_processes == 1


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


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered if it is sharded; all processes call together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module, is_kept: bool) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers of a module, on the CPU.

    All processes call together.
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
