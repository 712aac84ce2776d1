"""List the runs that answer the study's questions; notebooks, command and Snakefile call these.

    runs = orders("pocket", ["rome", "memit"], n_edits=300, orders=(0, 1, 2))
    folders = execute_all(runs)
    rows = table(folders)

All plans measure the same, so that a run which two of them ask for is made once. What is not
named in a signature is a parameter of Run: facts, seed, texts, retest_every, ...
"""

import dataclasses
import random
from itertools import product
from pathlib import Path

import pandas as pd

from editcore.editors import configure
from editcore.study import measure, results
from editcore.study.run import Run, input_files, input_hashes, make_run, run_id

# How a run of a plan differs from Run's defaults.
COMMON = {"n_edits": 120, "items": 40, "untouched": 200, "final": ("ES", "PS", "XS", "greedy")}
METHODS = ("rome", "r-rome", "p-rome", "nas", "emmet", "memit", "memit-past", "encore",
           "alphaedit", "rect", "prune", "ft")
# How a run on a real language model does: facts that it knows, few items at each of few tests.
REAL = {"known": True, "n_edits": 200, "items": 40, "shots": 8, "passages": 12, "untouched": 60,
        "retest_every": 50, "downstream_every": 100, "generation": 1, "answers": 0,
        "final": ("ES", "PS", "NS", "greedy")}
# How one does into which edits are put that are predicted to disable the model.
PLACED = {"n_edits": 120, "retest_every": 20, "downstream_every": 20, "answers": 6}
REAL_EDITORS = ("rome", "r-rome", "p-rome", "memit", "alphaedit", "ft")
LAYERS = {"rome": ({}, {"layer": 1}, {"layer": 2}),
          "memit": ({}, {"layers": (0,)}, {"layers": (1,)}, {"layers": (0, 1, 2)})}


def orders(model="pocket", editors=("rome", "memit", "ft"), *, orders=(0, 1), **options):
    """Edit the same facts in several orders. settings: {editor: {field: value}}."""
    return _grid(model, editors, orders, **options)


def methods(model="pocket", editors=METHODS, *, orders=(0, 1), **options):
    """Edit with every method on one schedule."""
    return _grid(model, editors, orders, **options)


def conventions(model="pocket", editors=("rome", "r-rome", "p-rome"), *, orders=(0, 1), **options):
    """Edit with each choice of the keys that ROME's update is built from."""
    return _grid(model, editors, orders, **options)


def batches(model="pocket", editors=("memit", "emmet"), *, sizes=(1, 10, 40, 120), orders=(0,),
            **options):
    """Edit equal numbers of facts in ever larger updates."""
    points = product(editors, orders, sizes)
    return [plan_run(model, editor, order=order, batch_size=size, **options)
            for editor, order, size in points]


def lambdas(model="pocket", editor="memit", *, factors=(0.01, 0.1, 1, 10, 100), orders=(0,),
            settings=None, **options):
    """Vary the weight of what is to be kept, by factors on the editor's published one."""
    editor_settings = (settings or {}).get(editor, {})
    published = configure(editor, editor_settings, model).lambda_
    choices = [{"lambda_": type(published)(published * factor)} for factor in factors]
    return _variants(model, {editor: choices}, orders=orders, settings=settings, **options)


def layers(model="pocket", choices=None, *, orders=(0,), **options):
    """Vary where it is written. choices: {editor: [settings, ...]}; {} are the published ones."""
    return _variants(model, choices or LAYERS, orders=orders, **options)


def tokens(model="pocket", editors=("rome", "memit"), *, counts=(0, 2500, 10000), orders=(0,),
           **options):
    """Vary how many tokens of text the second moments are counted on; 0: all."""
    choices = [{"n_tokens": count} for count in counts]
    return _variants(model, dict.fromkeys(editors, choices), orders=orders, **options)


def real(model="smollm2", editors=REAL_EDITORS, *, orders=(0, 1, 2), disabling=None,
         placed=("rome", "r-rome", "p-rome", "memit"), places=(40, 60, 80, 100, 120),
         long=("rome", "memit"), once=("alphaedit",), n_long=500, n_longest=1000, **options):
    """Edit facts that a real model knows, without and with edits that are predicted to disable it.

    disabling: their case ids; None asks the unedited model (`measure.predicted`, minutes, kept).
    Every editor edits ordinary facts only (REAL says how many, and what is measured); those in
    `long` n_long facts, and n_longest in one more run of the first order, unless it is 0; those in
    `once` n_long in one more run of the first order. Those in `placed` make runs with predicted
    edits at `places`, too (PLACED), drawn with the order as seed.
    """
    if disabling is None:
        disabling = measure.predicted(plan_run(model, "rome", **REAL | options))
    options = options | {"leave_out": tuple(disabling)}
    with_predicted = REAL | PLACED | options
    places = [place for place in places if place <= with_predicted["n_edits"]][:len(disabling)]
    runs = []
    for editor, order in product([name for name in placed if name in editors], orders):
        cases = random.Random(order).sample(sorted(disabling), len(places))
        runs.append(plan_run(model, editor, order=order, insert=tuple(zip(places, cases)),
                             **with_predicted))
    options = REAL | options
    longer = [name for name in long if name in editors]
    runs += _grid(model, longer, orders, **options | {"n_edits": n_long})
    runs += _grid(model, [name for name in editors if name not in longer], orders, **options)
    more = [name for name in once if name in editors]
    runs += _grid(model, more, orders[:1], **options | {"n_edits": n_long})
    if n_longest:
        runs += _grid(model, longer, orders[:1], **options | {"n_edits": n_longest})
    return runs


PLANS = {"orders": orders, "methods": methods, "conventions": conventions, "batches": batches,
         "lambdas": lambdas, "layers": layers, "tokens": tokens}
BY_NAME = PLANS | {"real": real}    # those made only when they are named, too


def plan_run(model, editor, *, settings=None, **options):
    """Return the Run of an editor in the plans' way. settings: {editor: {field: value}}.

    Settings that are published for the model anyway are left out: equal runs have equal ids.
    """
    special = _unpublished(model, editor, (settings or {}).get(editor, {}))
    return make_run(model=model, editor=editor, settings=special, **COMMON | options)


def status(runs, out_dir="results/runs"):
    """Return a DataFrame of planned runs, each once: run (its id), status, and its parameters.

    status: "finished", "stopped", "begun" (there is a checkpoint) or "missing".
    """
    rows = []
    hashes = {}
    for run in dict.fromkeys(runs):
        paths = input_files(run)
        key = (run.model, *paths.items())
        if key not in hashes:      # many runs, few files
            hashes[key] = input_hashes(run, paths)
        folder = Path(out_dir) / run_id(run, hashes[key])
        begun = (folder / "checkpoint" / "checkpoint.json").is_file()
        state = results.status(folder) or ("begun" if begun else "missing")
        rows.append({"run": folder.name, "status": state} | dataclasses.asdict(run))
    columns = ["run", "status", *(field.name for field in dataclasses.fields(Run))]
    return pd.DataFrame(rows, columns=columns)


def _grid(model, editors, orders, **options):
    """Return a run for every editor and order."""
    pairs = product(editors, orders)
    return [plan_run(model, editor, order=order, **options) for editor, order in pairs]


def _variants(model, choices, *, orders, settings=None, **options):
    """Return a run for every editor, choice of its settings and order."""
    runs = []
    for editor, variants in choices.items():
        for variant, order in product(variants, orders):
            editor_settings = (settings or {}).get(editor, {}) | variant
            run = plan_run(model, editor, order=order, settings={editor: editor_settings},
                           **options)
            runs.append(run)
    return runs


def _unpublished(model, editor, settings):
    """Return the settings that differ from those published for the model, sorted by name."""
    settings = {"lambda_" if name == "lambda" else name: settings[name] for name in settings}
    config = configure(editor, settings, model)
    try:
        published = configure(editor, {}, model)
    except ValueError:      # nothing is published for this model
        return dict(sorted(settings.items()))
    differs = [name for name in settings if getattr(config, name) != getattr(published, name)]
    return {name: settings[name] for name in sorted(differs)}
