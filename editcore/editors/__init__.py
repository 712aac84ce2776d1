"""The name of an editor in; its functions and its settings for a model out: the only tables of editors."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from editcore.editors import calinet, control, ft, grace, memit, rome
from editcore.editors.prepare import Prepared, Sources
from editcore.instructedit import ke, mend

__all__ = ["EDITORS", "PATCHERS", "Editor", "Prepared", "Sources", "configure", "simple"]


@dataclass(frozen=True)
class Editor:
    """One way to edit; all of them are used alike."""

    config: type        # frozen dataclass of its settings
    paper: dict         # published settings by model: {model: {field: value}}
    prepare: Callable   # (model, tok, config, Sources) -> what it needs, from the unedited model, once a run
    grouped: Callable   # (model, tok, groups of facts, config, (Prepared a group, Delta carried a group or None))
                        # -> one Delta a group; the model stays as it was
    variant: dict = field(default_factory=dict)     # settings that make it this one of several with the same functions
    remember: Callable = lambda prepared, keys, config: prepared    # what later updates need of this one's Delta.keys
    finish: Callable = lambda total, weights, config: total         # what is measured of the sum of all updates

    @property
    def together(self):
        """True if several runs may share the passes of `grouped`, which then draws no random numbers."""
        return not hasattr(self.grouped, "alone")

    def edit(self, model, tok, facts, config, prepared=None):
        """One Delta with all facts, as one update of the model."""
        return self.grouped(model, tok, [facts], config, ([prepared], None))[0]

    def each(self, model, tok, facts, config, prepared=None):
        """A Delta a fact, each alone on the model as it is, in the same passes."""
        return self.grouped(model, tok, [[fact] for fact in facts], config, ([prepared] * len(facts), None))


def simple(edit):
    """The `grouped` of an editor that has only edit(model, tok, facts, config, prepared) -> Delta: one by one.

    Such an editor may draw random numbers; its runs are made apart.
    """
    def grouped(model, tok, groups, config, several):
        deltas = []
        for index, (group, prepared) in enumerate(zip(groups, several[0], strict=True)):
            with several[1][index].applied(model) if several[1] else contextlib.nullcontext():
                deltas.append(edit(model, tok, group, config, prepared))
        return deltas
    grouped.alone = True
    return grouped


def _memit(paper=memit.PAPER, **variant):
    return Editor(memit.Memit, paper, memit.prepare, memit.grouped, variant, memit.remember, memit.finish)


def _rome(**variant):
    return Editor(rome.Rome, rome.PAPER, rome.prepare, rome.grouped, variant)


EDITORS = {
    "rome": _rome(),
    "r-rome": _rome(convention="r-rome"),
    "p-rome": _rome(convention="p-rome"),
    "nas": _rome(anchor=20),
    "emmet": _memit(memit.EMMET, site="mlp_out", keys="mean", exact=True),
    "memit": _memit(),
    "memit-past": _memit(memory=True),
    "encore": _memit(memit.ENCORE),
    "alphaedit": _memit(memit.ALPHAEDIT, memory=True),
    "rect": _memit(keep=0.4),
    "prune": _memit(prune=1.2),
    "mend": Editor(mend.Mend, mend.PAPER, mend.prepare, mend.grouped),
    "ke": Editor(ke.Ke, ke.PAPER, ke.prepare, simple(ke.edit)),
    "ft": Editor(ft.Ft, ft.PAPER, ft.prepare, ft.grouped),
    "random": Editor(control.Random, control.PAPER, control.prepare, control.grouped),
}

# Editors whose result is a Patch: `+` and `applied` work as a Delta's do, but runs of many edits know weights only.
PATCHERS = {
    "grace": Editor(grace.Grace, grace.PAPER, grace.prepare, grace.grouped),
    "calinet": Editor(calinet.Calinet, calinet.PAPER, calinet.prepare, calinet.grouped),
}


def configure(name, settings=None, model="", table=EDITORS):
    """The configuration of editor `name`: what is published for `model` (a name or folder), overridden by `settings`.

    settings: {field: value}, values of the field's type or text that reads as it ("5", "0,1,2"); "lambda" is
    accepted for `lambda_`. table: EDITORS or PATCHERS. ValueError names an unknown editor or field, a value of the
    wrong type, or what is missing.
    """
    if name not in table:
        raise ValueError(f"unknown editor {name!r}: choose one of {', '.join(table)}")
    editor = table[name]
    fields = {field.name: field for field in dataclasses.fields(editor.config)}
    values = editor.variant | editor.paper.get(published(model, editor.paper), {})
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
