"""Edit facts with any of the editors: the table that names them, their settings, `edit` itself."""

import contextlib
import dataclasses
import importlib
from dataclasses import dataclass, field
from pathlib import Path

from editcore import fit, templates
from editcore.editors.prepare import EditorInputs, Prepared
from editcore.editors.settings import read
from editcore.facts import check_agreement
from editcore.files import cache_folder
from editcore.generate import default_texts
from editcore.model import n_layers, name_of, resolve

__all__ = ["EDITORS", "Editor", "EditorInputs", "Prepared", "configure", "edit", "prepare"]


@dataclass(frozen=True)
class Editor:
    """A line of EDITORS: an editor's module, and what the rest of the package must know of it.

    The module defines `Settings` (a frozen dataclass) and

        edit(model, tok, facts, config, prepared) -> Delta or Patch; the model stays as it was

    and may define PAPER ({model: {field: published value}}), prepare, edit_each, remember, finish
    and edit_groups (then `edit` may be left out), which are called as the methods below.
    """

    module: str                     # imported on first use
    variant: dict = field(default_factory=dict)     # settings that make it one of several editors
    names: dict = field(default_factory=dict)       # other names in the module, e.g. of "edit"
    needs_moments: bool = False     # `prepare` needs second moments of the keys
    shares_passes: bool = False     # has edit_groups, which draws nothing at random
    makes_patch: bool = False       # an edit stands beside the weights: a Patch, no Delta
    version: int = 1                # raised when what it does changes: finished runs get other ids

    def _defined(self, name, default=None):
        module = importlib.import_module(self.module)
        return getattr(module, self.names.get(name, name), default)

    @property
    def config(self):
        """Return the dataclass of its settings."""
        return self._defined("Settings")

    @property
    def paper(self):
        """Return published settings by model."""
        return self._defined("PAPER", {})

    def prepare(self, model, tok, config, inputs=None):
        """Take from the unedited model what its edits need; inputs: EditorInputs.

        ValueError if the model lacks a layer, or does not work as editors suppose: see `fit.check`.
        """
        fit.check(model, tok)
        layers = getattr(config, "layers", None) or (getattr(config, "layer", 0),)
        for layer in filter(lambda layer: isinstance(layer, int), layers):
            name_of(model, "block", layer + n_layers(model) * (layer < 0))
        function = self._defined("prepare", lambda *_: None)
        return function(model, tok, config, inputs or EditorInputs())

    def edit(self, model, tok, facts, config, prepared=None):
        """Return one Delta or Patch with all facts, as one update of the model as it is."""
        if function := self._defined("edit"):
            return function(model, tok, facts, config, prepared)
        return self.edit_groups(model, tok, [facts], config, prepared=[prepared])[0]

    def edit_each(self, model, tok, facts, config, prepared=None):
        """Return one Delta or Patch per fact, each alone on the model as it is."""
        if function := self._defined("edit_each"):
            return function(model, tok, facts, config, prepared)
        groups = [[fact] for fact in facts]
        return self.edit_groups(model, tok, groups, config, prepared=[prepared] * len(facts))

    def edit_groups(self, model, tok, groups, config, *, prepared, current=None):
        """Return one Delta per group of facts, each an edit of its own copy of the model.

        prepared: one per group; current: the Delta that each group's model carries already, if any.
        """
        if self.shares_passes:
            function = self._defined("edit_groups")
            return function(model, tok, groups, config, prepared=prepared, current=current)
        deltas = []
        for index, group in enumerate(groups):
            with current[index].applied(model) if current else contextlib.nullcontext():
                deltas.append(self.edit(model, tok, group, config, prepared[index]))
        return deltas

    def remember(self, prepared, keys, config):
        """Return `prepared` with the keys of an update, for editors that remember them."""
        return self._defined("remember", lambda prepared, *_: prepared)(prepared, keys, config)

    def finish(self, total, weights, config):
        """Return what is measured of a sum of updates; weights: {name: unedited parameter}."""
        return self._defined("finish", lambda total, *_: total)(total, weights, config)


def _closed_form(module, paper="PAPER", *, version=1, **variant):
    return Editor(f"editcore.editors.{module}", variant, {"PAPER": paper}, needs_moments=True,
                  shares_passes=True, version=version)


RANDOM_NAMES = {"Settings": "RandomSettings", "PAPER": "RANDOM_PAPER", "edit": "random_update",
                "prepare": "prepare_random"}
EDITORS = {
    "rome": _closed_form("rome"),
    "r-rome": _closed_form("rome", convention="r-rome"),
    "p-rome": _closed_form("rome", convention="p-rome"),
    "nas": _closed_form("rome", version=2, anchor=100),
    "emmet": _closed_form("memit", "EMMET", version=2, exact=True),
    "memit": _closed_form("memit"),
    "memit-past": _closed_form("memit", memory=True),
    "encore": _closed_form("memit", "ENCORE", version=2, memory=True),
    "alphaedit": _closed_form("memit", "ALPHAEDIT", memory=True),
    "rect": _closed_form("memit", version=2, keep=0.4),
    "prune": _closed_form("memit", prune=1.2),
    "mend": Editor("editcore.instructedit.mend", shares_passes=True),
    "ke": Editor("editcore.instructedit.ke", shares_passes=True),
    "ft": Editor("editcore.editors.ft"),
    "random": Editor("editcore.editors.rome", names=RANDOM_NAMES, needs_moments=True),
    "grace": Editor("editcore.editors.grace", makes_patch=True),
    "calinet": Editor("editcore.editors.calinet", makes_patch=True),
}


def edit(model, tok, facts, editor="rome", **options):
    """Edit facts into a model as one update; the model stays as it was.

        delta = edit(model, tok, [fact], "rome", layer=3)
        with delta.applied(model):
            ...

    options: the editor's settings, and what else `prepare` takes. Returns a Delta, or a Patch from
    "grace" and "calinet". ValueError if two facts contradict each other.
    """
    facts = list(facts)
    check_agreement(facts)
    config, prepared = prepare(model, tok, editor, pilot=facts, **options)
    return EDITORS[editor].edit(model, tok, facts, config, prepared)


def prepare(model, tok, editor="rome", *, texts=None, moments=None, contexts=None, seed=0,
            cache=None, pilot=(), **settings):
    """Return (config, prepared) of an editor, for many calls of EDITORS[editor].edit.

    settings replace those published for the model's name. contexts: templates; default: sampled.
    moments: second moments or their file; default: counted on `texts`, else on texts.txt beside the
    model, else on what the model writes. Both are kept by content in `cache` (default:
    files.cache_folder()). seed: of all draws; pilot: facts for "nas". ValueError if a setting
    without default is not published for this model.
    """
    name = model.config.name_or_path
    config = configure(editor, settings, name)
    if "seed" in vars(config):
        config = dataclasses.replace(config, seed=seed)
    cache = str(cache or cache_folder())
    if EDITORS[editor].needs_moments:
        contexts = contexts or templates.cached(model, tok, config.context_groups, seed, cache)
        if moments is None and texts is None:
            texts = default_texts(model, tok, config.n_tokens, seed, cache)
    inputs = EditorInputs(tuple(texts or ()), moments, tuple(contexts or ()), seed, cache,
                          tuple(pilot))
    return config, EDITORS[editor].prepare(model, tok, config, inputs)


def configure(editor, settings=None, model=""):
    """Return an editor's settings: those published for `model` (a name or folder), and `settings`.

    settings: {field: value}, values of the field's type or text that reads as it ("5", "0,1,2");
    "lambda" stands for `lambda_`. ValueError names what is unknown, does not fit or is missing.
    """
    if editor not in EDITORS:
        raise ValueError(f"unknown editor {editor!r}: choose one of {', '.join(EDITORS)}")
    method = EDITORS[editor]
    paper = method.paper
    fields = {field.name: field for field in dataclasses.fields(method.config)}
    values = method.variant | paper.get(published(model, paper), {})
    for key, value in (settings or {}).items():
        key = "lambda_" if key == "lambda" else key
        if key not in fields:
            raise ValueError(f"{editor} has no setting {key!r}; it has {', '.join(fields)}")
        values[key] = read(value, fields[key].type, f"{editor}: {key}")
    missing = [key for key, field in fields.items()
               if field.default is dataclasses.MISSING and key not in values]
    if missing:
        known = [" ".join([name, *(f"{key}={values.get(key)}" for key in missing)])
                 for name, values in paper.items()]
        doubt = "" if Path(resolve(str(model))).is_dir() else " (which is no folder here)"
        raise ValueError(f"{editor}: nothing is published for model {str(model)!r}{doubt}; give "
                         f"{', '.join(missing)}, or let `python -m editcore site MODEL` sweep it "
                         f"(published: {', '.join(known).replace(' (', '(')})")
    return method.config(**values)


def published(model, paper):
    """Return the key of `paper` that a name or folder means: "…/gpt2-xl" is "gpt2-xl"; or None."""
    parts = [part.lower().removesuffix("-hf") for part in Path(str(model)).parts]
    return next((part for part in reversed(parts) if part in paper), None)
