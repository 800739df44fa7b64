"""Configurations as strict dataclasses behind YAML and `key=value` overrides."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

Schema = TypeVar("Schema")


def load_strict(
    schema: type[Schema], path: str, file: Path, overrides: Sequence[str] = (), example: str = "a=1"
) -> Schema:
    """Read YAML and overrides into a dataclass.

    A field's metadata may hold "rule", the words for what a list or a mapping must be.

    Args:
        schema: a dataclass whose fields are scalars, mappings, dataclasses or lists of dataclasses.
        path: what to call the file in messages.
        file: the YAML file.
        overrides: `key=value` each; a key may go into mappings and lists, as in `arms.0.name=x`.
        example: of an override, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key that does not exist (with the nearest one), or a value of a wrong type.
    """
    return build_strict(schema, path, read_yaml(path, file, overrides, example))


def read_yaml(path: str, file: Path, overrides: Sequence[str] = (), example: str = "a=1") -> Any:
    """The content of a YAML file with overrides; arguments and errors as in `load_strict`."""
    if not file.is_file():
        raise FileNotFoundError(f"config {path!r} is not a file; give a YAML file")
    with _named(path):
        given = OmegaConf.load(file)
        for override in overrides:
            _override(given, override, example)
        return OmegaConf.to_container(given)


def build_strict(schema: type[Schema], path: str, given: Any) -> Schema:
    """A dataclass from what `read_yaml` gave; arguments and errors as in `load_strict`."""
    with _named(path):
        _check_keys(given, schema, "")
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(given))
        config = OmegaConf.to_object(merged)
    assert isinstance(config, schema)
    return config


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Say of which file, and of which key in it, an error is."""
    try:
        yield
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        key = getattr(error, "full_key", None)
        where = f"config {path!r}, {key}" if key else f"config {path!r}"
        raise ValueError(f"{where}: {str(error).splitlines()[0]}") from error


def require_at_least(config: Any, least: float, *names: str, prefix: str = "") -> None:
    """Refuse a field, None excepted, that is below its least value."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"config {prefix}{name} is {value} but must be at least {least}")


def _override(given: Any, override: str, example: str) -> None:
    """Set one `key=value`; the key may go into a list by its index, as in `arms.0.name=x`."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} must be key=value, for instance {example}")
    # OmegaConf's own parser, so that a value means what it means in the YAML file.
    parsed = OmegaConf.from_dotlist([f"value={value}"])["value"]
    try:
        OmegaConf.update(given, key, parsed, merge=True, force_add=True)
    except (TypeError, IndexError, AssertionError) as error:
        raise ValueError(
            f"override {override!r} leads nowhere: {key!r} does not exist, or is of another kind"
        ) from error


def _check_keys(given: Any, schema: Any, prefix: str) -> None:
    if not isinstance(given, dict):
        where = f"key {prefix[:-1]}" if prefix else "file"
        raise ValueError(f"config {where} is {given!r} but must be a mapping of key: value")
    known = {field.name: field for field in fields(schema)}
    kinds = get_type_hints(schema)
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ";"
            raise ValueError(
                f"config key {prefix}{key} does not exist{hint} known: {', '.join(sorted(known))}"
            )
        _check_value(value, kinds[key], f"{prefix}{key}", known[key].metadata.get("rule"))


def _check_value(value: Any, kind: Any, key: str, rule: str | None) -> None:
    if is_dataclass(kind):
        _check_keys(value, kind, f"{key}.")
    elif get_origin(kind) is dict and not isinstance(value, dict):
        raise ValueError(f"config {key} is {value!r} but must be {rule or 'a mapping'}")
    elif get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"config {key} is {value!r} but must be {rule or 'a list'}")
        (item,) = get_args(kind)
        for index, each in enumerate(value):
            if is_dataclass(item):
                _check_keys(each, item, f"{key}.{index}.")
