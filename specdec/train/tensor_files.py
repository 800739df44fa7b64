"""Tensors of a checkpoint: safetensors, each process its own part, read by any number of them."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from specdec.train.sharding import whole


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
