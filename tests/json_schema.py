"""The part of JSON Schema that docs/results.schema.json uses; an unknown keyword is an error."""

_TYPES = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
}
_NOTES = {"$schema", "title", "description", "$defs"}


def violations(value, schema, root=None, path="$"):
    """Every place where the value breaks the schema, as text."""
    root = root or schema
    found = []
    for keyword, rule in schema.items():
        if keyword not in _NOTES:
            found += _CHECKS[keyword](value, rule, schema, root, path)
    return found


def _holds(condition, path, text):
    return [] if condition else [f"{path} {text}"]


def _type(value, rule, schema, root, path):
    names = rule if isinstance(rule, list) else [rule]
    return _holds(any(_TYPES[name](value) for name in names), path, f"is no {names}: {value!r}")


def _properties(value, rule, schema, root, path):
    if not isinstance(value, dict):
        return []
    return [
        each
        for key, inner in rule.items()
        if key in value
        for each in violations(value[key], inner, root, f"{path}.{key}")
    ]


def _required(value, rule, schema, root, path):
    if not isinstance(value, dict):
        return []
    return [f"{path}.{key} is missing" for key in rule if key not in value]


def _additional(value, rule, schema, root, path):
    if not isinstance(value, dict):
        return []
    others = {k: v for k, v in value.items() if k not in schema.get("properties", {})}
    if rule is False:
        return [f"{path}.{key} is not described" for key in others]
    return [each for k, v in others.items() for each in violations(v, rule, root, f"{path}.{k}")]


def _items(value, rule, schema, root, path):
    rows = enumerate(value) if isinstance(value, list) else ()
    return [each for i, row in rows for each in violations(row, rule, root, f"{path}[{i}]")]


def _reference(value, rule, schema, root, path):
    return violations(value, root["$defs"][rule.removeprefix("#/$defs/")], root, path)


def _bound(compare, size, text):
    def check(value, rule, schema, root, path):
        measured = size(value)
        fits = measured is None or compare(measured, rule)
        return _holds(fits, path, f"{text} {rule}: {value!r}")

    return check


def _number(value):
    return value if _TYPES["number"](value) else None


def _length(value):
    return len(value) if isinstance(value, list) else None


_CHECKS = {
    "type": _type,
    "properties": _properties,
    "required": _required,
    "additionalProperties": _additional,
    "items": _items,
    "$ref": _reference,
    "const": lambda v, rule, s, r, path: _holds(v == rule, path, f"is {v!r}, not {rule!r}"),
    "enum": lambda v, rule, s, r, path: _holds(v in rule, path, f"is {v!r}, not in {rule}"),
    "minimum": _bound(lambda a, b: a >= b, _number, "is below"),
    "maximum": _bound(lambda a, b: a <= b, _number, "is above"),
    "minItems": _bound(lambda a, b: a >= b, _length, "is shorter than"),
    "maxItems": _bound(lambda a, b: a <= b, _length, "is longer than"),
}
