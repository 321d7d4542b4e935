"""Check a document against ``services.schema.json`` and say in words what is wrong with it.

The schema is compiled once, on first use. Its ``title`` fields say what a right value looks like.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any, cast

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.protocols import Validator

from slurmgate.config.report import JsonPath, Report, Step, nearest, show_value
from slurmgate.share import schema_file

_Wrong = dict[Step, "_Wrong | None"]
"""Steps to wrong parts of a document; None: the part there is wrong itself."""

_DISTANT = 0.4  # below that a likeness is chance
_FEW = 10  # so many known fields are all named

_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def check_structure(document: object, report: Report) -> dict[str, Any]:
    """Report every violation of the schema; give the document without the parts that are wrong.

    What is left can be read without looking at types again: each field in it is valid by itself.
    A list element that is wrong becomes None, so that the others keep their index.
    """
    wrong: _Wrong = {}
    told: set[JsonPath] = set()
    for error in _validator().iter_errors(cast(Any, document)):
        for where, text in _explain(error, tuple(error.absolute_path)):
            if where not in told:  # a number is no path, and breaks the pattern of paths, too
                told.add(where)
                report.problem(where, text)
                _mark(wrong, where)
        if report.full:
            return {}
    sound: object = _without(document, wrong) if isinstance(document, dict) else {}
    return sound if isinstance(sound, dict) else {}


@functools.cache
def _validator() -> Validator:
    schema = json.loads(schema_file().read_text("utf-8"))
    return Draft202012Validator(schema)


def _explain(error: ValidationError, path: JsonPath) -> Iterator[tuple[JsonPath, str]]:
    schema = error.schema
    if not isinstance(schema, dict):
        raise TypeError("the configuration schema has no boolean schemas")
    value: Any = error.instance
    match str(error.validator):
        case "additionalProperties":
            known = schema["properties"]
            for key in value:
                if key not in known:
                    yield (*path, key), _unknown(key, schema)
        case "required":
            # jsonschema gives one error for each missing field, and its name only in the message.
            properties = schema["properties"]
            for key in schema["required"]:
                if error.message.startswith(f"{key!r} is a required"):
                    yield (*path, key), f"is missing; it should be {_title(properties[key])}"
        case _ if "propertyNames" in error.absolute_schema_path:
            yield (*path, value), f"is not a possible name; it should be {schema['title']}"
        case keyword:
            yield path, f"{_wrong(keyword, value, schema)}; it should be {schema['title']}"


def _unknown(key: str, schema: dict[str, Any]) -> str:
    known = schema["properties"]
    homes = _homes(key)
    if homes:
        return f"unknown field here; it belongs to {homes}"
    close = nearest(key, known)
    if close is not None:
        return f"unknown field; did you mean {json.dumps(close)}?"
    if len(known) <= _FEW:
        return f"unknown field; known are {', '.join(known)}"
    distant = nearest(key, known, alike=_DISTANT)
    if distant is not None:
        return f"unknown field; the nearest is {json.dumps(distant)}"
    needed = schema.get("required", known)
    return f"unknown field; those needed are {', '.join(needed)}"


def _homes(key: str) -> str:
    """The sections that have a field of this name; empty when there is none."""
    schema: Any = _validator().schema
    sections = (
        ('the top level, beside "Services"', schema),
        ("a service", schema["$defs"]["service"]),
        ('"gate"', schema["$defs"]["gate"]),
    )
    return " or ".join(where for where, section in sections if key in section["properties"])


def _wrong(keyword: str, value: object, schema: dict[str, Any]) -> str:
    shown = show_value(value)
    match keyword:
        case "type":
            kind = _KINDS[type(value)]
            return f"{shown} is {kind}" if isinstance(value, str | int | float) else f"is {kind}"
        case "minimum" | "exclusiveMinimum":
            return f"{shown} is too small"
        case "maximum" | "exclusiveMaximum":
            return f"{shown} is too large"
        case "minItems" | "maxItems" if isinstance(value, list):
            return f"has {len(value)} elements"
        case "minLength":
            return "is empty"
        case "maxLength":
            return f"{shown} is too long"
        case "enum" if isinstance(value, str) and (close := nearest(value, schema["enum"])):
            return f"{shown} is not known (did you mean {json.dumps(close)}?)"
        case _:
            return f"{shown} is not right"


def _title(schema: dict[str, Any]) -> str:
    while "title" not in schema:
        schema = _definition(schema["$ref"])
    return str(schema["title"])


def _definition(reference: str) -> dict[str, Any]:
    definitions: dict[str, Any] = _validator().schema["$defs"]  # type: ignore[index]
    found: dict[str, Any] = definitions[reference.removeprefix("#/$defs/")]
    return found


def _mark(wrong: _Wrong, path: JsonPath) -> None:
    for step in path[:-1]:
        inner = wrong.setdefault(step, {})
        if inner is None:
            return  # a part that holds this one is wrong already
        wrong = inner
    if path:
        wrong[path[-1]] = None


def _without(value: object, wrong: _Wrong) -> object:
    """Copy of the containers that hold wrong parts, with those parts taken out."""
    if isinstance(value, dict):
        return {
            key: _without(inner, deeper) if (deeper := wrong.get(key, {})) else inner
            for key, inner in value.items()
            if wrong.get(key, {}) is not None
        }
    if isinstance(value, list):
        kept = list(value)
        for step, deeper in wrong.items():
            if isinstance(step, int):
                kept[step] = None if deeper is None else _without(kept[step], deeper)
        return kept
    return value
