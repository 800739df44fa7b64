"""The base of the layouts of the field: `config.json`, and tensors under other names."""

from collections.abc import Callable
from dataclasses import replace
from statistics import mode
from typing import Any, ClassVar

from pydantic import ConfigDict, model_validator
from torch import Tensor

from specdec.checkpoints.folder import RawFiles
from specdec.checkpoints.head import HeadCheckpoint, checked, head_of
from specdec.common.config import Config, validated


def _without_nulls(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    return {key: _without_nulls(value) for key, value in given.items() if value is not None}


class ForeignConfig(Config):
    """Keys of a `config.json` that are read; null stands for a key that is not there."""

    model_config = ConfigDict(extra="ignore")
    _drop_nulls = model_validator(mode="before")(_without_nulls)


class Layout(ForeignConfig):
    """A layout of the field: keys of its `config.json`, and how they and its tensors are meant."""

    name: ClassVar[str]
    kind: ClassVar[str]  # of its heads
    weights: ClassVar[str] = "model.safetensors"
    carried: ClassVar[tuple[str, ...]] = ()  # tensors that may be there for nothing
    dtype_key: ClassVar[str] = "torch_dtype"
    engines: ClassVar[tuple[str, ...]] = ()  # that `specdec export` writes it for

    @staticmethod
    def matches(files: RawFiles) -> bool:
        raise NotImplementedError

    def parse(self, files: RawFiles) -> HeadCheckpoint:
        """Read a head, its tensors under the names of the file."""
        raise NotImplementedError

    @classmethod
    def config(cls, checkpoint: HeadCheckpoint, options: Any) -> dict[str, Any]:
        """Make the `config.json` of a head, given its checkpoint and all its options."""
        raise NotImplementedError

    @classmethod
    def naming(cls, checkpoint: HeadCheckpoint) -> Callable[[str], str]:
        """Make the function from our name of a tensor to the layout's."""
        return str

    @classmethod
    def cannot_hold(cls, what: str, fix: str = "use the layout 'specdec'") -> ValueError:
        return ValueError(f"the layout {cls.name!r} cannot hold {what}; {fix}")

    @classmethod
    def read(cls, files: RawFiles) -> HeadCheckpoint:
        keys = validated(cls, files.config, repr(files.config_path))
        found = replace(keys.parse(files), layout=cls.name)
        return checked(found, files.weights_path, cls.naming(found), cls.carried)

    @classmethod
    def write(cls, checkpoint: HeadCheckpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Make `config.json` and the tensors."""
        tensors, name_of = checkpoint.tensors, cls.naming(checkpoint)
        config = cls.config(checkpoint, head_of(checkpoint).options)
        dtype = mode(str(tensor.dtype) for tensor in tensors.values() if tensor.ndim == 2)
        config[cls.dtype_key] = dtype.removeprefix("torch.")
        return config, {name_of(name): tensor for name, tensor in tensors.items()}
