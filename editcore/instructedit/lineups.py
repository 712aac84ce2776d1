"""A grid of data/systems.toml in; the named systems that it stands for, those that have records, out.

    named = read(FILE, "main", seed=[0, 1])
    paths = systems.train_all([one.system for one in named])
"""

import dataclasses
import itertools
from dataclasses import dataclass

from editcore import progress
from editcore.instructedit import instructions
from editcore.instructedit.records import records_folder
from editcore.instructedit.trained_editors import TASKS, HypernetworkConfig, make_config
from editcore.study.grid import tables

FILE = "data/systems.toml"


@dataclass(frozen=True)
class Named:
    """A HypernetworkConfig and what figures call it; several seeds share a name."""

    name: str
    system: HypernetworkConfig


def names(path=FILE):
    """Names of the grids in a file, in its order."""
    return [name for name in tables(path) if name not in ("common", "full")]


def read(path, grid, **words):
    """The Named systems of a grid of data/systems.toml: every case with every point of its axes, the first slowest.

    words replace parameters in all cases; "", None and 0 keep the file's, a list where one value is wanted
    makes an axis. Where some of TASKS have no training records, a case that names one of these is left out, others
    train on the rest, and a case that has become that of another is left out as well; the log says so. ValueError names
    file, grid and case.
    """
    written, place = tables(path), f"{path}: grid {grid!r}"
    if grid not in names(path):
        raise ValueError(f"{path}: no grid {grid!r}; it has {', '.join(names(path))}")
    shared, found = written.get("common", {}) | written[grid], []
    cases = shared.pop("cases", None)
    if not isinstance(cases, list) or not all(isinstance(case, dict) and case.get("name") for case in cases):
        raise ValueError(f"{place}: cases must be given, each with a name, as [[{grid}.cases]]")
    replaced = {name: value for name, value in words.items() if value not in ("", None, 0, (), [], {})}
    for case in cases:
        whole = shared | case | replaced
        here = present(whole.get("model", "pocket"), whole.get("data", ""))
        if missing := _needed(whole) - set(here):
            _left_out(place, case["name"], "no training records of " + ", ".join(sorted(missing)))
            continue
        rest = {} if set(TASKS) <= set(here) else {"tasks": tuple(task for task in TASKS if task in here)}
        try:
            several = _points(rest | shared | case, replaced)
        except ValueError as error:
            raise ValueError(f"{place}, case {case['name']!r}: {error}") from error
        found += _usable(several, set(here), {one.system: one.name for one in found} if rest else {}, place)
    if not found:
        raise ValueError(f"{place}: there are training records for none of its cases")
    return _distinct(found, place)


def _usable(several, here, known, place):
    """The Named systems whose tasks have records and that are not known, as {system: name}, already."""
    kept = []
    for one in several:
        if missing := set(one.system.tasks) - here:
            _left_out(place, one.name, "no training records of " + ", ".join(sorted(missing)))
        elif one.system in known:
            _left_out(place, one.name, f"on the tasks that have records it is {known[one.system]!r}")
        else:
            kept.append(one)
    return kept


def _left_out(place, name, why):
    progress.log.info("%s: %s is left out: %s", place, name, why)


def present(model="pocket", data=""):
    """The tasks that have training records; all, if none can be found: an error says later what is wrong."""
    every = tuple(instructions.TITLES)
    if not (isinstance(model, str) and isinstance(data, str)):
        return every
    folder = records_folder(model, data)
    return tuple(task for task in every if (folder / f"{task}_train.json").is_file()) or every


def _needed(case):
    """The tasks that a case names; what is not one is left for `make` to refuse."""
    named = [case[name] for name in ("tasks", "counts", "shares") if isinstance(case.get(name), (list, tuple, dict))]
    return {task for words in named for task in words if task in instructions.TITLES}


def _points(case, replaced):
    """The Named systems of one case: settings are joined, lists where one value is wanted are axes."""
    case = dict(case) | replaced | {"settings": dict(case.get("settings", {})) | dict(replaced.get("settings", {}))}
    name, axes = case.pop("name"), case.pop("axes", {})
    fields = {field.name: field for field in dataclasses.fields(HypernetworkConfig)}
    single = [key for key, value in case.items() if isinstance(value, (list, tuple)) and key in fields
              and fields[key].type is not tuple]
    axes, made = {**{key: values for key, values in axes.items() if key not in replaced},
                  **{key: case.pop(key) for key in single}}, []
    for point in itertools.product(*axes.values()):
        chosen = case | dict(zip(axes, point))
        try:
            made.append(Named(name.format(**chosen), make_config(**chosen)))
        except (KeyError, IndexError) as error:
            raise ValueError(f"its name asks for {error}, which is no parameter of it") from error
    return made


def _distinct(found, place):
    """The Named systems, each once; ValueError where two names are the same or one name stands for two."""
    found, called = list(dict.fromkeys(found)), {}
    for one in found:
        if (other := called.setdefault(one.system, one.name)) != one.name:
            raise ValueError(f"{place}: {other!r} and {one.name!r} are the same system")
        first = called.setdefault(one.name, one.system)
        if dataclasses.replace(first, seed=0) != dataclasses.replace(one.system, seed=0):
            raise ValueError(f"{place}: two systems are called {one.name!r} but differ in more than the seed")
    return found
