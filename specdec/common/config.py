"""Strict configurations: pydantic models behind YAML files and `key=value` overrides."""

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from specdec.common.arguments import merged, nearest
from specdec.common.files import first_line, read_json, replace_file

Model = TypeVar("Model", bound=BaseModel)
Count = Annotated[int, Field(ge=0)]

# Far more than a configuration holds, and little enough to be read at once.
_MAX_CHARS, _MAX_VALUES, _MAX_DEPTH = 2**20, 50_000, 50
_INTEGER, _FINITE = "a whole number of at most 63 bits", "a finite number"
# Rules by the kind of pydantic's error, or by its first word.
_RULES = {
    **{"int": _INTEGER, "float": _FINITE, "finite": _FINITE, "bool": "true or false"},
    "string": "text, in quotes where YAML reads something else",
    **{"greater_than_equal": "at least {ge}", "greater_than": "above {gt}"},
    **{"less_than_equal": "at most {le}", "less_than": "below {lt}"},
    **{"literal_error": "one of {expected}", "string_too_short": "not empty"},
    **{"list_type": "a list", "tuple_type": "a list"},
    **{"too_short": "a list of at least {min_length}", "too_long": "of at most {max_length}"},
}


class Config(BaseModel):
    """A configuration: no unknown key, no value of another type, no number that is not finite.

    A validator raises a `ValueError` whose text goes on after the key, as in "must be even".
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class HasOptions(Config):
    """A config whose `options`, those of a drafter, may also stand beside its own keys."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        if isinstance(given, str) and "type" in cls.model_fields:  # a name alone
            return {"type": given}
        # What is nearly a key of its own is a typing error and no option; but dtype is no type.
        own = {
            key: value
            for key, value in (given.items() if isinstance(given, dict) else ())
            for near in difflib.get_close_matches(str(key), cls.model_fields, 1, cutoff=0.75)
            if near[0] == str(key)[0]
        }
        if not isinstance(given, dict) or len(own) == len(given):
            return given
        rest = {key: given[key] for key in given if key == "options" or key not in own}
        return {**own, "options": merged(rest)}


def load_config(
    model: type[Model], path: str, file: Path, overrides: Sequence[str] = (), example: str = "a=1"
) -> Model:
    return validated(model, read_yaml(path, file, overrides, example))


def validated(model: type[Model], given: Any, noun: str = "config") -> Model:
    """Build a model from plain values; its first fault is one line with key, value and rule."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{noun} {_fault(model, error)}") from error


def read_model(model: type[Model], path: Path) -> Model:
    """Read a JSON file that specdec wrote into its model."""
    text = json.dumps(read_json(path))
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(
            f"{str(path)!r} is damaged, or of another version: {_fault(model, error)}; make it anew"
        ) from error


def model_bytes(content: BaseModel) -> bytes:
    return (content.model_dump_json(by_alias=True, indent=1) + "\n").encode()


def write_model(path: Path, content: BaseModel) -> None:
    replace_file(path, model_bytes(content))


def _fault(model: type[BaseModel], error: ValidationError) -> str:
    """Say what pydantic found first, unknown keys before all others."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")  # the latter of dataclasses
    found = sorted(error.errors(), key=lambda each: each["type"] not in unknown)[0]
    kind, context = found["type"], found.get("ctx", {})
    keys = [str(part) for part in found["loc"]]
    key, value = ".".join(keys), found["input"]
    if kind in unknown:
        known = _fields(model, found["loc"][:-1])
        near = nearest(keys[-1], known)
        hint = f"; did you mean {'.'.join([*keys[:-1], near])}?" if near else ";"
        return f"key {key} does not exist{hint} known: {', '.join(sorted(known))}"
    if kind == "missing":
        return f"{key} is missing; give it"
    if kind == "value_error" and isinstance(context.get("error"), ValueError):
        text = str(context["error"])
        return f"{key} is {value!r:.200} but {text}" if text.startswith("must ") else text
    if kind in ("dict_type", "model_type", "model_attributes_type", "dataclass_type"):
        return f"{key} is {value!r:.200} but must be a mapping of key: value".lstrip()
    rule = (_RULES.get(kind) or _RULES.get(kind.split("_")[0], "")).format(**context)
    return f"{key} is {value!r:.200}{f' but must be {rule}' if rule else ': ' + found['msg']}"


def _fields(model: Any, path: tuple[Any, ...]) -> list[str]:
    """List the fields of the model or dataclass that a path leads to."""
    for part in path:
        field = getattr(model, "__pydantic_fields__", {}).get(part)
        hint = field.annotation if field else model
        inner = [hint, *get_args(hint), *(each for one in get_args(hint) for each in get_args(one))]
        models = [one for one in inner if hasattr(one, "__pydantic_fields__")]
        tagged = [one for one in models if part == one.__pydantic_fields__.get("type")]
        model = (tagged or models or [model])[0]
    fields = getattr(model, "__pydantic_fields__", {})
    return [field.alias or name for name, field in fields.items()]


def read_yaml(path: str, file: Path, overrides: Sequence[str] = (), example: str = "a=1") -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"config {path!r} is not a file; give a YAML file")
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(_MAX_CHARS)
            if opened.read(1):
                raise yaml.YAMLError(f"more than {_MAX_CHARS:,} characters are no configuration")
        if not text.strip():
            raise yaml.YAMLError("it is empty; write some keys")
        _check_size(text)
        given = OmegaConf.create(text)
        for override in overrides:
            _override(given, override, example)
        plain = OmegaConf.to_container(given)
    except RecursionError as error:
        raise ValueError(f"config {path!r} is nested in itself; write it flat") from error
    # The last three are of explicit tags that do not fit, as in `!!bool x`.
    except (
        *(OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError),
        *(OverflowError, KeyError, AttributeError),
    ) as error:
        problem = getattr(error, "problem", None) or first_line(error)
        raise ValueError(f"config {path!r}: {problem}") from error
    _check_numbers(plain, "")
    return plain


def _check_size(text: str) -> None:
    """Refuse YAML that would grow without bound, or that asks for something to be filled in."""
    sizes, anchors, known = [0], [], dict[str | None, int]()
    for event in yaml.parse(text):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(1)
            anchors.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            known[anchors.pop()] = size = sizes.pop()
            sizes[-1] += size
        elif isinstance(event, yaml.AliasEvent):
            sizes[-1] += known.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            if "${" in event.value:
                raise yaml.YAMLError(f"{event.value[:80]!r} is not filled in; write the value")
            sizes[-1] += 1
        if len(sizes) > _MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} deep; write it flat")
        if sizes[-1] > _MAX_VALUES:
            raise yaml.YAMLError(f"more than {_MAX_VALUES:,} values are no configuration")


def _override(given: Any, override: str, example: str) -> None:
    """Set one `key=value`; the key may go into a list by its index, as in `arms.0.name=x`."""
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} must be key=value, for instance {example}")
    try:
        _check_size(value)
        # OmegaConf's own parser, so that a value means what it means in the YAML file.
        parsed = OmegaConf.from_dotlist([f"value={value}"])["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or first_line(error)
        raise ValueError(f"override {override!r}: {problem}") from error
    try:
        OmegaConf.update(given, key, parsed, merge=True, force_add=True)
    except (TypeError, IndexError, AssertionError, AttributeError, ValueError) as error:
        what = f"leads nowhere: {key!r} does not exist, or is of another kind"
        raise ValueError(f"override {override!r} {what}") from error


def _check_numbers(value: Any, key: str) -> None:
    """Refuse numbers that cannot be meant, wherever they stand."""
    if isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(each, f"{key}.{name}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"config {key[1:]} is {value} but must be {_FINITE}")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"config {key[1:]} is above 2**63 but must be {_INTEGER}")
