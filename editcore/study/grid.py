"""A grid of runs written in a TOML file (data/study.toml) in; its runs, each with a name, and their table out.

    planned = read("data/study.toml", "conventions", model="pocket", order=[0, 1])
    made, df = execute(planned, "results/runs", workers=2)
"""

import dataclasses
import itertools
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import get_origin

import pandas as pd

from editcore.editors import EDITORS, configure
from editcore.study import loop as study
from editcore.study.run import Run, make

FILE = "data/study.toml"
REPLICATES = ("order", "seed")          # runs that differ only in these may share a name
GROUPS = ("settings", "times")          # tables of an editor's settings: their values, factors on the published values


@dataclass(frozen=True)
class Planned:
    """A run and what figures call it."""

    name: str       # of its case; several orders or seeds share it
    run: Run


def names(path=FILE):
    """Names of the grids in a file, in its order."""
    return [name for name in tables(path) if name not in ("common", "full")]


def read(path, grid, cases=(), **words):
    """The Planned runs of a grid: every case with every point of its axes, the first axis slowest.

    words replace parameters of Run, or an axis of that name, in all cases; a list where one value is wanted makes an
    axis; "", None and [] keep the file's. `settings` is {editor or case: {field: value}}; `cases` keeps those named.
    ValueError names file, grid and case: unknown names, values of another type, names or runs that occur twice.
    """
    written, place = tables(path), f"{path}: grid {grid!r}"
    if grid not in names(path):
        raise ValueError(f"{path}: no grid {grid!r}; it has {', '.join(names(path))}")
    shared = _choices(written.get("common", {}), f"{path}: common")
    shared |= _choices({name: value for name, value in written[grid].items() if name != "cases"}, place)
    known = {case["name"]: case for case in _cases(written[grid], place)}
    if strange := [name for name in cases or () if name not in known]:
        raise ValueError(f"{place}: no case {strange[0]!r}; it has {', '.join(known)}")
    settings = words.pop("settings", None) or {}
    replaced, planned, editors = _choices(_as_table(words), f"{place}, replaced by keywords"), [], set()
    for name, case in known.items():
        where = f"{place}, case {name!r}"
        found = shared | _choices({key: value for key, value in case.items() if key != "name"}, where) | replaced
        for editor in found.get("editor", [Run().editor]):
            own = {"editor": [editor]}
            for key in {editor, name} & set(settings):
                own |= _choices(_settings_table(settings[key], editor), f"{where}, replaced by keywords")
            planned += _runs(name, found | own, where) if not cases or name in cases else []
            editors.add(editor)
    if strange := sorted(set(settings) - set(known) - editors):
        raise ValueError(f"{place}: settings of {strange[0]!r}, which is none of its cases or editors")
    return _checked(planned, place)


def execute(planned, out_dir="results/runs", workers=1):
    """(made, df): the runs as in `study.runs` with their `name`, and their rows under that name.

    In df `editor` is the planned name, so that figures compare cases, and `method` the true editor. Runs that are
    missing are made first. ValueError for settings that an editor does not take, before anything is done.
    """
    planned = _checked(planned, "these runs")
    for one in planned:
        configure(one.run.editor, dict(one.run.settings), one.run.model)
    folders = study.execute_all([one.run for one in planned], out_dir, workers)
    named = pd.DataFrame({"name": [one.name for one in planned], "run": [folder.name for folder in folders]})
    made = named.merge(study.runs(out_dir, run=list(named["run"])), on="run")
    rows = study.table(out_dir, run=list(named["run"]))
    df = named.rename(columns={"name": "editor"}).merge(rows.rename(columns={"editor": "method"}), on="run")
    return made, df[[*rows.columns, "method"]]


def typed(texts):
    """Command-line words {parameter: text} as keywords of `read`: "3" -> 3, "0,1" -> [0, 1]; ValueError names it."""
    fields, values = {field.name: field for field in dataclasses.fields(Run)}, {}
    for name, text in texts.items():
        if name not in fields:
            raise ValueError(f"-p {name}: unknown parameter; known are {', '.join(fields)}")
        kind = type(fields[name].default)
        try:
            if kind is str:
                values[name] = text
            elif name == "settings":
                values[name] = json.loads(text)
            else:
                items = [int(word) if kind is int else word.strip() for word in text.split(",")]
                values[name] = items[0] if kind is int and len(items) == 1 else items
        except ValueError as error:
            wanted = 'JSON, as in {"rome": {"layer": 3}}' if name == "settings" else kind.__name__
            raise ValueError(f"-p {name} {text}: must be {wanted}") from error
    return values


def tables(path):
    """The file's tables; FileNotFoundError, or ValueError for what is not TOML or not a table."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from error
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{path}: {name} must be a table, [{name}]")
    return tables


def _cases(table, place):
    """The cases of a grid; ValueError for one without a name or with another's."""
    cases = table.get("cases", [])
    if not isinstance(cases, list) or not cases or not all(isinstance(case, dict) for case in cases):
        raise ValueError(f"{place}: cases must be given, each as [[...cases]]")
    for number, case in enumerate(cases, 1):
        if not isinstance(case.get("name"), str) or not case["name"].strip():
            raise ValueError(f"{place}: case {number} has no name")
    every = [case["name"] for case in cases]
    if twice := [name for name in every if every.count(name) > 1]:
        raise ValueError(f"{place}: two cases are called {twice[0]!r}")
    return cases


def _choices(table, where):
    """{parameter, or (group, field) of an editor's settings: values to go through}; its axes come after the rest."""
    axes = table.get("axes", {})
    if not isinstance(axes, dict):
        raise ValueError(f"{where}: axes must be a table of lists, found {axes!r}")
    found = {key: [value] for key, value in _flat({k: v for k, v in table.items() if k != "axes"}, where).items()}
    for key, values in _flat(axes, where).items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: axis {_said(key)} must be a list with something in it, found {values!r}")
        if _wants_list(key) and not all(isinstance(value, list) for value in values):
            raise ValueError(f"{where}: axis {_said(key)} must be a list of lists, found {values!r}")
        found[key] = values
    return found


def _flat(table, where):
    """{parameter or (group, field): value}; ValueError for a name that is none of Run's."""
    known, flat = {field.name for field in dataclasses.fields(Run)} | set(GROUPS), {}
    for name, value in table.items():
        if name not in known:
            raise ValueError(f"{where}: unknown parameter {name!r}; known are name, axes, times, "
                             f"{', '.join(field.name for field in dataclasses.fields(Run))}")
        if name in GROUPS and not isinstance(value, dict):
            raise ValueError(f"{where}: {name} must be a table of an editor's settings, found {value!r}")
        flat |= {(name, field): item for field, item in value.items()} if name in GROUPS else {name: value}
    return flat


def _wants_list(key):
    """Whether one value of this parameter is a list."""
    return isinstance(key, str) and isinstance(getattr(Run(), key, None), tuple)


def _said(key):
    return key if isinstance(key, str) else ".".join(key)


def _as_table(words):
    """Keyword words as a table: lists for parameters of one value, and lists of lists for others, are axes."""
    plain, axes = {}, {}
    for name, value in words.items():
        if name == "axes":
            raise ValueError("axes are no keyword: give a list for the parameter itself")
        if value is not None and value != "" and value not in ([], (), {}):
            listed = isinstance(value, (list, tuple))
            several = listed and (not _wants_list(name) or isinstance(value[0], (list, tuple)))
            (axes if several else plain)[name] = [list(item) if isinstance(item, tuple) else item for item in value] \
                if listed else value
    return {**plain, "axes": axes}


def _settings_table(values, editor):
    """An editor's settings as a table: lists for fields of one value, and lists of lists for others, are axes."""
    known = dataclasses.fields(EDITORS[editor].config) if editor in EDITORS else ()
    fields = {field.name: get_origin(field.type) or field.type for field in known}
    several = {name: isinstance(value, list) and (fields.get(name) is not tuple or bool(value)
               and isinstance(value[0], list)) for name, value in values.items()}
    return {"settings": {name: value for name, value in values.items() if not several[name]},
            "axes": {"settings": {name: value for name, value in values.items() if several[name]}}}


def _runs(name, choices, where):
    """The Planned runs of one case, its name filled in with the values of each point."""
    planned = []
    for point in itertools.product(*choices.values()):
        chosen = dict(zip(choices, point))
        parameters = {key: value for key, value in chosen.items() if isinstance(key, str)}
        shown = {key if isinstance(key, str) else key[1]: value for key, value in chosen.items()}
        try:
            settings = {key[1]: value for key, value in chosen.items() if key[0] == "settings"}
            factors = {key[1]: value for key, value in chosen.items() if key[0] == "times"}
            settings = _needed(parameters, settings | _multiplied(parameters, settings, factors))
            run = make(**parameters, settings=dict(sorted(settings.items())))
            planned.append(Planned(name.format(**shown), run))
        except (KeyError, IndexError) as error:
            raise ValueError(f"{where}: its name asks for {error}, which is no parameter or setting of it") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return planned


def _multiplied(parameters, settings, factors):
    """{field: the editor's value for this model times a factor}."""
    config = configure(parameters.get("editor", Run().editor), settings, parameters.get("model", Run().model)) \
        if factors else None
    for field, factor in factors.items():
        value = getattr(config, field, None)
        if any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in (value, factor)):
            raise ValueError(f"times.{field} must be a factor on a setting that is a number")
    return {field: type(getattr(config, field))(getattr(config, field) * factor) for field, factor in factors.items()}


def _needed(parameters, settings):
    """The settings that are not what is published for the model anyway, so that equal runs have equal ids."""
    editor, model = parameters.get("editor", Run().editor), parameters.get("model", Run().model)
    config = configure(editor, settings, model)
    try:
        published = configure(editor, {}, model)
    except ValueError:      # nothing is published for this model
        return settings
    given = {"lambda_" if field == "lambda" else field: value for field, value in settings.items()}
    return {field: value for field, value in given.items() if getattr(config, field) != getattr(published, field)}


def _checked(planned, place):
    """The Planned runs, each once; ValueError where a name is given to different runs, or two names to one."""
    planned, runs, called = list(dict.fromkeys(planned)), {}, {}
    for one in planned:
        if (other := runs.setdefault(one.run, one.name)) != one.name:
            raise ValueError(f"{place}: {other!r} and {one.name!r} are the same run")
        first = called.setdefault(one.name, one.run)
        differ = [field.name for field in dataclasses.fields(Run) if field.name not in REPLICATES
                  and getattr(first, field.name) != getattr(one.run, field.name)]
        if differ:
            raise ValueError(f"{place}: two runs are called {one.name!r} but differ in {', '.join(differ)}; put it "
                             f"into the name, as in \"... {{{differ[0]}}}\"")
    return planned
