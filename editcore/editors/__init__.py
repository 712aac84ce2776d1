"""The table of editors: how each is set, prepared and called. The only place that knows them by name."""

import contextlib
import dataclasses
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from editcore.editors.prepare import EditorInputs, Prepared

__all__ = ["EDITORS", "Editor", "EditorInputs", "Prepared", "configure", "published"]


@dataclass(frozen=True)
class Editor:
    """A line of EDITORS: the module of an editor, and what the rest of the package must know of it.

    The module defines `Settings` (a frozen dataclass) and

        edit(model, tok, facts, config, prepared) -> Delta (or Patch) with all facts; the model stays as it was

    and may define PAPER ({model: {field: published value}}), prepare, edit_groups, remember and finish as below.
    """

    module: str                     # imported on first use
    variant: dict = field(default_factory=dict)     # settings that make it this editor of several in one module
    names: dict = field(default_factory=dict)       # other names of what the module defines: {"edit": "random_update"}
    needs_moments: bool = False     # `prepare` needs second moments of the keys
    shares_passes: bool = False     # the module's edit_groups edits several models in the same passes, without chance
    makes_patch: bool = False       # an edit stands beside the weights: a Patch, no Delta

    def _defined(self, name, default=None):
        return getattr(importlib.import_module(self.module), self.names.get(name, name), default)

    @property
    def config(self):
        """The frozen dataclass of its settings."""
        return self._defined("Settings")

    @property
    def paper(self):
        """Published settings by model."""
        return self._defined("PAPER", {})

    def prepare(self, model, tok, config, inputs=None):
        """What its edits need of the unedited model, taken once per run; inputs: EditorInputs."""
        prepare = self._defined("prepare")
        return prepare(model, tok, config, inputs or EditorInputs()) if prepare else None

    def edit(self, model, tok, facts, config, prepared=None):
        """One Delta or Patch with all facts, as one update of the model as it is."""
        return self._defined("edit")(model, tok, facts, config, prepared)

    def edit_groups(self, model, tok, groups, config, *, prepared, current=None):
        """One Delta per group of facts, each an edit of its own copy of the model.

        prepared: one per group; current: the Delta that each group's model carries already, None if none does.
        """
        if self.shares_passes:
            return self._defined("edit_groups")(model, tok, groups, config, prepared=prepared, current=current)
        deltas = []
        for index, group in enumerate(groups):
            with current[index].applied(model) if current else contextlib.nullcontext():
                deltas.append(self.edit(model, tok, group, config, prepared[index]))
        return deltas

    def edit_each(self, model, tok, facts, config, prepared=None):
        """One Delta per fact, each alone on the model as it is."""
        return self.edit_groups(model, tok, [[fact] for fact in facts], config, prepared=[prepared] * len(facts))

    def remember(self, prepared, keys, config):
        """What later updates use: `prepared` with the `keys` of an update's Delta, if the editor remembers them."""
        remember = self._defined("remember")
        return remember(prepared, keys, config) if remember else prepared

    def finish(self, total, weights, config):
        """The change that is measured of the sum of all updates; weights: {name: unedited parameter}."""
        finish = self._defined("finish")
        return finish(total, weights, config) if finish else total


def _rome(**variant):
    return Editor("editcore.editors.rome", variant, needs_moments=True, shares_passes=True)


def _memit(paper="PAPER", **variant):
    return Editor("editcore.editors.memit", variant, {"PAPER": paper}, needs_moments=True, shares_passes=True)


EDITORS = {
    "rome": _rome(),
    "r-rome": _rome(convention="r-rome"),
    "p-rome": _rome(convention="p-rome"),
    "nas": _rome(anchor=20),
    "emmet": _memit("EMMET", site="mlp_out", keys="mean", exact=True),
    "memit": _memit(),
    "memit-past": _memit(memory=True),
    "encore": _memit("ENCORE"),
    "alphaedit": _memit("ALPHAEDIT", memory=True),
    "rect": _memit(keep=0.4),
    "prune": _memit(prune=1.2),
    "mend": Editor("editcore.instructedit.mend", shares_passes=True),
    "ke": Editor("editcore.instructedit.ke", shares_passes=True),
    "ft": Editor("editcore.editors.ft"),
    "random": Editor("editcore.editors.control", needs_moments=True),
    "grace": Editor("editcore.editors.grace", shares_passes=True, makes_patch=True),
    "calinet": Editor("editcore.editors.calinet", makes_patch=True),
}


def configure(name, settings=None, model=""):
    """The configuration of editor `name`: what is published for `model` (a name or folder), overridden by `settings`.

    settings: {field: value}, values of the field's type or text that reads as it ("5", "0,1,2"); "lambda" is
    accepted for `lambda_`. ValueError names an unknown editor or field, a value that does not fit, or what is missing.
    """
    if name not in EDITORS:
        raise ValueError(f"unknown editor {name!r}: choose one of {', '.join(EDITORS)}")
    editor = EDITORS[name]
    paper = editor.paper
    fields = {field.name: field for field in dataclasses.fields(editor.config)}
    values = editor.variant | paper.get(published(model, paper), {})
    for key, value in (settings or {}).items():
        key = "lambda_" if key == "lambda" else key
        if key not in fields:
            raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(fields)}")
        values[key] = _read(value, fields[key], name)
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in values]
    if missing:
        raise ValueError(f"{name}: nothing is published for model {str(model)!r} (only for {', '.join(paper)}); "
                         f"give {', '.join(missing)}")
    return editor.config(**values)


def published(model, paper):
    """The key of `paper` that a model's name or folder means ("openai-community/gpt2-xl" -> "gpt2-xl"), or None."""
    parts = [part.lower().removesuffix("-hf") for part in Path(str(model)).parts]
    return next((part for part in reversed(parts) if part in paper), None)


def _read(value, field, name):
    """`value` as the field's type: int, float, str, bool, tuple of int or a Literal. ValueError names the setting."""
    kind = field.type
    if allowed := get_args(kind):
        if value not in allowed:
            raise ValueError(f"{name}: {field.name} is {value!r}, but must be one of {', '.join(allowed)}")
        return value
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
