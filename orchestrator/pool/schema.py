"""The JSON schema of a catalogue, for editors: from the rows that check it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, Final

from orchestrator.pool import values
from orchestrator.pool.entries import ELSEWHERE, KEY, MODEL, POOL
from orchestrator.pool.reading import NOT_IN_PRESETS
from orchestrator.settings import checks
from orchestrator.settings.fields import SETTINGS, Setting

Schema = dict[str, Any]

_SIZE: Final[Schema] = {"type": "string", "pattern": f"^ *{values.SIZE} *$"}
_NEED: Final[Schema] = {
    "anyOf": [_SIZE, {"type": "object", "additionalProperties": _SIZE, "minProperties": 1}]
}
_STRINGS: Final[Schema] = {"type": "array", "items": {"type": "string"}}
_NAMES: Final[Schema] = {"type": "array", "items": {"type": "string", "pattern": r"\S"}}
_WRITTEN: Final[Schema] = {"type": "string", "pattern": r"\S"}
_ABOVE_ZERO: Final[Schema] = {"type": "number", "exclusiveMinimum": 0}
_SHAPES: Final[dict[checks.Check, Schema]] = {
    checks.boolean: {"type": "boolean"},
    checks.integer: {"type": "integer"},
    checks.seconds: {**_ABOVE_ZERO, "maximum": checks.MAX_SECONDS},
    checks.model_path: _WRITTEN,
    SETTINGS["llama_extra_args"].check: _STRINGS,
    values.seconds_or_zero: {"type": "number", "minimum": 0, "maximum": checks.MAX_SECONDS},
    values.weight: _ABOVE_ZERO,
    values.mib_of: _SIZE,
    values.need: _NEED,
    values.budget: {"anyOf": [{"const": values.AUTO}, *_NEED["anyOf"]]},
    values.names: _NAMES,
    values.some_names: {**_NAMES, "minItems": 1},
    values.file: _WRITTEN,
    values.base_url: {"type": "string", "pattern": f"^{values.URL}$"},
    values.mapping: {
        "type": "object",
        "propertyNames": {"pattern": f"^{values.NAME}$"},
        "additionalProperties": {
            "type": "object",
            "propertyNames": {"not": {"enum": list(NOT_IN_PRESETS)}},
        },
    },
}
"""What a check accepts; any other check accepts a text."""


def schema() -> Schema:
    """Return the schema. It is a little stricter than the reader in how choices are written."""
    model = _object(MODEL, "A model of this machine or of the Hub.")
    elsewhere = _object(ELSEWHERE, "A model of another server.", "base_url")
    either = {"if": {"required": ["base_url"]}, "then": elsewhere, "else": model}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Catalogue",
        "description": "Models by name for one llama-orchestrator pool.",
        "type": "object",
        "properties": {
            "pool": _object(POOL, "The pool as a whole."),
            "models": _named({"type": "object", **either}, "Models by name."),
            "keys": _named(_object(KEY, "A key and what it may do."), "Keys by name."),
        },
        "additionalProperties": False,
    }


def of_added() -> Schema:
    """Return the schema of an entry that is added over HTTP."""
    made = _object(MODEL, "A model to add.", "name")
    known = {name: _or_null(name, one) for name, one in made["properties"].items()}
    name = {"type": "string", "pattern": f"^{values.NAME}$", "description": "Its name."}
    return {**made, "properties": {"name": name, **known}}


def _or_null(name: str, one: Schema) -> Schema:
    """JSON has null, for what a file leaves out."""
    if MODEL[name].default is not None:
        return one
    shape = {key: value for key, value in one.items() if key != "description"}
    return {"description": one["description"], "anyOf": [shape, {"type": "null"}]}


def _named(one: Schema, about: str) -> Schema:
    return {
        "description": about,
        "type": "object",
        "propertyNames": {"pattern": f"^{values.NAME}$"},
        "additionalProperties": one,
    }


def _object(rows: Mapping[str, Setting], about: str, *required: str) -> Schema:
    made: Schema = {
        "description": about,
        "type": "object",
        "properties": {name: _property(row) for name, row in rows.items()},
        "additionalProperties": False,
    }
    required += tuple(name for name, row in rows.items() if row.default is MISSING)
    return {**made, "required": list(required)} if required else made


def _property(row: Setting) -> Schema:
    about = f"{row.help[0].upper()}{row.help[1:]}.".replace("null = ", "default: ")
    made: Schema = {"description": about, **_shape(row)}
    if row.is_secret:
        made["writeOnly"] = True
    if row.default is not None and row.default is not MISSING and row.check is not values.mapping:
        made["default"] = default_of(row)
    return made


def _shape(row: Setting) -> Schema:
    if row.choices:
        return {"enum": list(row.choices)}
    shape = _SHAPES.get(row.check, {"type": "string"})
    if row.bounds is not None:
        return {**shape, "minimum": row.bounds[0], "maximum": row.bounds[1]}
    return shape


def default_of(row: Setting) -> Any:
    """Return the default of a row as it may be written."""
    if row.check is values.mib_of:
        return f"{row.default / 1024:g} GiB"
    return list(row.default) if isinstance(row.default, tuple) else row.default
