"""Train the hypernetworks of a study: which tasks, instructions and examples each learns from.

    config = make_config(tasks=["recent", "counterfact"])   # InstructEdit; style="none": MEND
    path = train(config)                            # results/editors/<id>/network.safetensors
    editors = main_editors("pocket", seeds=[0, 1])  # [(name, config)]; other lists: see LISTS
    train_all([config for _, config in editors])
"""

import contextlib
import dataclasses
import itertools
import json
import random
import resource
import time
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
import torch
from filelock import FileLock
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

from editcore import processes, progress
from editcore.editors import EDITORS, configure, published
from editcore.files import read_json, sha256, sha256_text, write_json
from editcore.instructedit import instructions, mend, training
from editcore.instructedit.records import load_records, record_as_fact, records_folder
from editcore.instructedit.training import Training
from editcore.model import default_device, files_hash, load, peak_memory

FORMAT = 3      # raise it when the same config no longer gives the same network
TASKS = ("recent", "counterfact", "convsent")   # trained on by default; zsRE is held out

# Settings of the training: published for the large models; for pocket what learns in half a minute;
# for SmolLM2 the best of a sweep on the validation records (data/world/README.md).
POCKET = {"examples": 600, "lr": 1e-4, "edit_weight": 1.0, "accumulate": 4, "warmup": 60,
          "unlikely": "reply", "every": 200, "keep": True}
SMOLLM2 = POCKET | {"examples": 400, "lr": 2e-4, "alpha_lr": 1e-5, "accumulate": 16, "warmup": 100,
                    "unlikely": "contrast", "reply_weight": 10.0, "every": 80, "keep": False}
PAPER = {
    "mend": {"gpt2-xl": {"examples": 30_000}, "llama-2-7b": {"examples": 100_000},
             "pocket": POCKET, "smollm2": SMOLLM2},
    "ke": {"gpt2-xl": {"examples": 30_000, "lr": 1e-5},
           "llama-2-7b": {"examples": 100_000, "lr": 1e-5},
           "pocket": POCKET | {"lr": 3e-3, "warmup": 0},
           "smollm2": SMOLLM2 | {"lr": 3e-3, "warmup": 0}},
}


def _frozen(value):
    """Turn lists and dicts into tuples, so that a config can be hashed and compared."""
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    return value


Task = Literal[tuple(instructions.TITLES)]
Frozen = BeforeValidator(_frozen)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HypernetworkConfig:
    """What one trained editor learns from, and how; ValueError names a value that cannot be."""

    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = TASKS     # whose records are mixed
    style: Literal[tuple(instructions.STYLES)] = "full"     # "none": multi-task MEND
    n_descriptions: int = Field(9, ge=1, le=instructions.SEEN)      # 0 to n - 1 are trained with
    counts: Annotated[tuple[tuple[Task, PositiveInt], ...], Frozen] = ()    # most records of a task
    shares: Annotated[tuple[tuple[Task, PositiveFloat], ...], Frozen] = ()  # records in proportion
    editor: Literal["mend", "ke"] = "mend"
    loss_on: Literal["edit", "rephrase"] = "edit"   # what must be likely after an edit
    opposite: bool = True           # an edit of ConvSent makes one opposite reply less likely, too
    replies: PositiveInt = 2        # ConvSent: most replies per sentiment and of the other topic
    examples: NonNegativeInt = 0    # edits learned from in all; 0: as published for the model
    seed: int = 0                   # of order, descriptions, replies, weights and sentiments
    model: str = "pocket"           # short name, folder or Hugging Face name
    data: str = ""                  # folder of {task}_{split}.json; "": editing/ beside the model
    descriptions: Annotated[tuple[tuple[Task, tuple[str, ...]], ...], Frozen] = ()  # the study's
    settings: Annotated[tuple, Frozen] = ()     # (field, value) of the editor and its Training

    def __post_init__(self):
        limited = [task for task, _ in self.counts + self.shares]
        for tasks in (self.tasks, limited):
            if len(set(tasks)) < len(tasks) or set(tasks) - set(self.tasks):
                raise ValueError(f"{', '.join(tasks)}: each once, and only tasks trained on")
        for task, texts in self.descriptions:
            instructions.check_descriptions(task, texts)
        configured(self)


def make_config(**words):
    """Make a HypernetworkConfig; dicts and lists are accepted for tuples."""
    return HypernetworkConfig(**words)


def configured(config):
    """(settings of the editor, Training) of a config; ValueError names an unknown setting."""
    settings = dict(config.settings)
    if {"seed", "examples"} & set(settings):
        raise ValueError("config: seed and examples are parameters of the config, not settings")
    paper = PAPER[config.editor]
    values = dict(paper.get(published(config.model, paper), {}))
    fields = [field.name for field in dataclasses.fields(Training)]
    values |= {name: settings.pop(name) for name in fields if name in settings}
    if config.examples:
        values["examples"] = config.examples
    if "examples" not in values:
        raise ValueError(f"config: nothing is published for model {config.model!r}: give examples")
    settings |= {"network": mend.UNTRAINED, "seed": config.seed}
    editor = configure(config.editor, settings, config.model)
    return editor, Training(**values, seed=config.seed)


# Lists of editors: what each notebook compares -----------------------------------------------

def main_editors(model="pocket", **options):
    """InstructEdit, multi-task MEND and KE, trained on all tasks but zsRE (notebook 30).

    options, here and below: seeds, or parameters of HypernetworkConfig for all of the editors. A
    case that names a task without training records is left out, others learn from what there is.
    """
    return _editors(model, options, {"InstructEdit": {}, "MEND": {"style": "none"},
                                     "KE": {"editor": "ke", "style": "none"}})


def single_task(model="pocket", tasks=TASKS, **options):
    """One MEND per task, without instructions (notebooks 30 and 31)."""
    return _editors(model, options, {f"MEND on {instructions.TITLES[task]}":
                                     {"tasks": (task,), "style": "none"} for task in tasks})


def transfer(model="pocket", **options):
    """The editors of the table of transfer, one of them trained on zsRE (notebook 30)."""
    return single_task(model, ("recent", "counterfact", "zsre"), **options)


def subsets(model="pocket", **options):
    """All subsets of the three training tasks, with and without instructions (notebook 33)."""
    cases = {}
    for size in range(1, len(TASKS) + 1):
        for tasks in itertools.combinations(TASKS, size):
            title = " + ".join(instructions.TITLES[task] for task in tasks)
            cases |= {f"{title} ({style})": {"tasks": tasks, "style": style}
                      for style in ("full", "none")}
    return _editors(model, options, cases)


def styles(model="pocket", **options):
    """What stands before a prompt: one editor per style (notebook 32)."""
    names = ("none", "constant", "random", "task", "description", "full")
    return _editors(model, options, {style: {"style": style} for style in names})


def descriptions(model="pocket", **options):
    """InstructEdit trained with one, three or nine descriptions per task (notebook 32)."""
    return _editors(model, options, {f"{n} of 9": {"n_descriptions": n} for n in (1, 3, 9)})


def balance(model="pocket", counts=(25, 50, 100), **options):
    """How many ConvSent records are in the mixture: none, some, all (notebook 33)."""
    some = {f"ConvSent {count}": {"counts": {"convsent": count}} for count in counts}
    return _editors(model, options, {"ConvSent 0": {"tasks": ("recent", "counterfact")}, **some,
                                     "ConvSent all": {}})


def direction_editors(model="pocket", **options):
    """The editors of the paper's figure of gradient directions, and a control (notebook 31).

    The shares are how many times more ConvSent than Recent records the published data have, and
    their balanced version.
    """
    mixed = ("recent", "convsent")
    singles = {name: {"tasks": config.tasks, "style": "none"}
               for name, config in transfer(model, **options)}
    return _editors(model, options, {
        "InstructEdit": {}, "MEND": {"style": "none"}, **singles,
        "on Recent": {"tasks": ("recent",)},
        "on Recent + CounterFact": {"tasks": ("recent", "counterfact")},
        "on Recent + 25 × ConvSent": {"tasks": mixed, "shares": {"recent": 1, "convsent": 25}},
        "on Recent + 2.5 × ConvSent": {"tasks": mixed, "shares": {"recent": 1, "convsent": 2.5}},
        "random words": {"style": "random"},
    })


LISTS = {"main": main_editors, "single": single_task, "transfer": transfer, "subsets": subsets,
         "styles": styles, "descriptions": descriptions, "balance": balance,
         "directions": direction_editors}


def _editors(model, options, cases):
    """[(name, config)] of {name: parameters}, seed after seed of a case; see main_editors."""
    options = dict(options)
    seeds = options.pop("seeds", (0,))
    folder = records_folder(model, options.get("data", ""))
    tasks = [task for task in instructions.TITLES if (folder / f"{task}_train.json").is_file()]
    if not tasks:
        raise ValueError(f"{folder}: there are no training records")
    editors = []
    for name, words in cases.items():
        words = {"tasks": tuple(task for task in TASKS if task in tasks)} | words | options
        missing = {*words["tasks"], *dict(words.get("counts", ()))} - set(tasks)
        configs = [make_config(model=model, seed=seed, **words) for seed in seeds if not missing]
        if missing or set(configs) & {config for _, config in editors}:
            progress.log.info("%s: left out: %s", name, "no training records of "
                              + ", ".join(sorted(missing)) if missing else "the same as another")
            continue
        editors += [(name, config) for config in configs]
    if not editors:
        raise ValueError(f"{folder}: there are training records for none of {', '.join(cases)}")
    return editors


def descriptions_of(config):
    """{task: ten descriptions} that the config is trained and tested with."""
    return instructions.descriptions() | dict(config.descriptions)


def instructed(config, records, *, style="", description=-1, seed=None):
    """The records behind the instructions of a config, in its style or another one.

    description: its number; -1: drawn for each record from those that the config is trained with.
    """
    seed = config.seed if seed is None else seed
    numbers = [instructions.draw(record, seed, config.n_descriptions) if description < 0
               else description for record in records]
    return tuple(instructions.add_instruction(record, number, style or config.style,
                                              descriptions_of(config))
                 for record, number in zip(records, numbers))


def training_records(config):
    """The records that a config learns from, task after task, each task's in a random order."""
    records = load_records(config.model, config.data, "train", config.seed)
    if missing := [task for task in config.tasks if task not in records]:
        raise FileNotFoundError(f"{records_folder(config.model, config.data)}: "
                                f"no {missing[0]}_train.json")
    whole = min((len(records[task]) / share for task, share in config.shares), default=0)
    limits = {task: max(1, round(whole * share)) for task, share in config.shares}
    limits |= dict(config.counts)
    chosen = []
    for task in config.tasks:
        draw = random.Random(f"{config.seed} records {task}")
        chosen += draw.sample(records[task], len(records[task]))[:limits.get(task)]
    return chosen


def examples_of(config, network, model, tok, records):
    """The Examples of records, each behind its instruction with a drawn description."""
    records = instructed(config, records)
    facts = [record_as_fact(record, config.seed, config.opposite) for record in records]
    conditions = network.conditions(model, tok, facts)
    return [training.training_example(tok, record, loss_on=config.loss_on, opposite=config.opposite,
                                      replies=config.replies, seed=config.seed,
                                      condition=tuple(ids))
            for record, ids in zip(records, conditions)]


# Training ------------------------------------------------------------------------------------

def identifier(config):
    """"<editor>-<parameters>-<contents>": equal configs, models and records give the same id."""
    parameters = dataclasses.asdict(config)
    texts = {task: descriptions_of(config)[task] for task in config.tasks}
    for place in ("model", "data"):
        parameters.pop(place)
    parameters = sha256_text(json.dumps([FORMAT, parameters, texts]), *configured(config))
    folder = records_folder(config.model, config.data)
    paths = [folder / f"{task}_train.json" for task in config.tasks]
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such file")
    contents = sha256_text(files_hash(config.model), *map(sha256, paths))
    return f"{config.editor}-{parameters[:8]}-{contents[:8]}"


def train(config, out_dir="results/editors"):
    """Train a config unless it is trained; return the path of its network.safetensors.

    A stopped training goes on from its checkpoint; another process with the same is waited for.
    Beside the network lie losses.jsonl and train.json (parameters, seconds, peak memory in MB).
    """
    folder = Path(out_dir) / identifier(config)
    path = folder / training.RESULT
    about = folder / "train.json"
    if path.is_file() and about.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if not (path.is_file() and about.is_file()):
            write_json(about, _train(config, folder))
    return path


def _train(config, folder):
    """Train a config into its folder; return what train.json says."""
    began = time.monotonic()
    settings, plan = configured(config)
    records = training_records(config)
    model, tok = load(config.model, default_device())
    network = EDITORS[config.editor].prepare(model, tok, settings)
    examples = examples_of(config, network, model, tok, records)
    network = training.train(model, network, examples, plan, folder)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = peak_memory(default_device()) or resident
    parameters = dataclasses.asdict(config)
    parameters |= {"model": Path(config.model).name, "data": Path(config.data).name}
    return {"config": parameters, "records": len(records), "examples": plan.examples,
            "seconds": round(time.monotonic() - began, 2), "peak_mb": round(memory / 2 ** 20),
            "parameters": sum(weight.numel() for weight in network.parameters())}


def _trained(config, out_dir, workers):
    """Train a config in a process that shares the cores with others; yields its path."""
    torch.set_num_threads(processes.free_threads(workers))
    yield train(config, out_dir)


def train_all(configs, out_dir="results/editors", workers=1):
    """Train configs, `workers` processes at a time with a share of the threads; return paths."""
    unique = list(dict.fromkeys(configs))
    if workers <= 1 or len(unique) <= 1:
        paths = [train(config, out_dir) for config in progress.bar(unique, "editors")]
    else:
        jobs = {identifier(config): (config, out_dir, workers) for config in unique}
        paths = dict.fromkeys(jobs)
        with contextlib.closing(processes.in_processes(_trained, jobs, workers)) as ends:
            for name, end in progress.bar(ends, "editors", len(jobs)):
                paths[name] = end
        if failed := {name: end for name, end in paths.items() if isinstance(end, Exception)}:
            name, error = failed.popitem()
            raise RuntimeError(f"{name}: {error}")
        paths = paths.values()
    path_of = dict(zip(unique, paths))
    return [path_of[config] for config in configs]


def table(editors, out_dir="results/editors"):
    """DataFrame of (name, config) pairs, trained if need be: one row per editor and seed.

    Columns: editor, tasks (titles joined by " + "), n_tasks, style, n_descriptions, seed, records,
    examples, seconds, peak_mb, parameters, network (the id of its folder).
    """
    costs = ("records", "examples", "seconds", "peak_mb", "parameters")
    rows = []
    for name, config in editors:
        path = train(config, out_dir)
        about = read_json(path.parent / "train.json")
        rows.append({
            "editor": name, "tasks": " + ".join(instructions.TITLES[task] for task in config.tasks),
            "n_tasks": len(config.tasks), "style": config.style,
            "n_descriptions": config.n_descriptions, "seed": config.seed,
            **{key: about[key] for key in costs}, "network": path.parent.name})
    return pd.DataFrame(rows)
