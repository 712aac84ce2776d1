"""The name of an editor in; its functions and its settings for a model out: the only table of editors."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from editcore.editors import ft, memit, rome
from editcore.editors.sources import Prepared, Sources

__all__ = ["EDITORS", "Editor", "Prepared", "Sources", "configure"]


@dataclass(frozen=True)
class Editor:
    """One way to edit; all of them are used alike."""

    config: type        # frozen dataclass of its settings
    paper: dict         # published settings by model: {model: {field: value}}
    prepare: Callable   # (model, tok, config, Sources) -> what edit needs, from the unedited model, once a run
    edit: Callable      # (model, tok, facts, config, prepared) -> one Delta with all facts; the model stays as it was
    each: Callable      # (model, tok, facts, config, prepared) -> a Delta a fact, each alone on the current model


EDITORS = {
    "rome": Editor(rome.Rome, rome.PAPER, rome.prepare, rome.edit, rome.each),
    "memit": Editor(memit.Memit, memit.PAPER, memit.prepare, memit.edit, memit.each),
    "ft": Editor(ft.Ft, ft.PAPER, ft.prepare, ft.edit, ft.each),
}


def configure(name, settings=None, model=""):
    """The configuration of editor `name`: what is published for `model` (a name or folder), overridden by `settings`.

    settings: {field: value}, values of the field's type or text that reads as it ("5", "0,1,2"); "lambda" is
    accepted for `lambda_`. ValueError names an unknown editor or field, a value of the wrong type, or what is missing.
    """
    if name not in EDITORS:
        raise ValueError(f"unknown editor {name!r}: choose one of {', '.join(EDITORS)}")
    editor = EDITORS[name]
    fields = {field.name: field for field in dataclasses.fields(editor.config)}
    values = dict(editor.paper.get(published(model, editor.paper), {}))
    for key, value in (settings or {}).items():
        key = "lambda_" if key == "lambda" else key
        if key not in fields:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(fields)}")
        values[key] = read(value, fields[key], name)
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in values]
    if missing:
        raise ValueError(f"{name}: nothing is published for model {str(model)!r} (only for {', '.join(editor.paper)}); "
                         f"give {', '.join(missing)}")
    config = editor.config(**values)
    for key, allowed in getattr(editor.config, "choices", {}).items():
        if getattr(config, key) not in allowed:
            raise ValueError(f"{name}: {key} is {getattr(config, key)!r}, but must be one of {', '.join(allowed)}")
    return config


def published(model, paper):
    """The key of `paper` that a model's name or folder means ("openai-community/gpt2-xl" -> "gpt2-xl"), or None."""
    parts = [part.lower().removesuffix("-hf") for part in Path(str(model)).parts]
    return next((part for part in reversed(parts) if part in paper), None)


def read(value, field, name):
    """`value` as the field's type: int, float, str, bool or tuple of int. ValueError names the setting."""
    kind = field.type
    try:
        if kind is tuple:
            items = value.split(",") if isinstance(value, str) else (value,) if isinstance(value, int) else value
            return tuple(int(item) if isinstance(item, (str, int)) else item for item in items)
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        if kind is str and not isinstance(value, str):
            raise ValueError
        return kind(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{name}: {field.name} is {value!r}, but must be {kind.__name__}") from error
