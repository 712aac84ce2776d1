"""Which tasks, instructions and examples a hypernetwork learns from in; its file, trained once and kept, out.

    system = make(tasks=["recent", "counterfact"], style="full")        # InstructEdit; style "none": multi-task MEND
    path = train(system)                                                # results/editors/<id>/network.safetensors
"""

import dataclasses
import json
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from editcore import progress
from editcore.editors import configure, published
from editcore.files import sha256, sha256_text, write_json
from editcore.instructedit import examples, instructions, ke, mend
from editcore.instructedit import training as hyper
from editcore.instructedit.records import read_records
from editcore.instructedit.training import Training
from editcore.model import default_device, load, peak_memory, resolve
from editcore.study.run import model_files_hash
from editcore.study.slots import held

PAIRS = ("counts", "shares", "settings", "descriptions")    # fields of a System that may be given as a dict
FORMAT = 1      # raise it when the same System no longer gives the same network
TASKS = ("recent", "counterfact", "convsent")   # of the training unless told; zsRE is held out
# kind -> ((model, config) -> the untrained Network, (model, tok, facts) -> ids that it reads beside each's gradients).
KINDS = {"mend": (mend.start, lambda model, tok, facts: [()] * len(facts)), "ke": (ke.start, ke.conditions)}

# How a hypernetwork is trained where System.settings say nothing: published for the large models; for the pocket model
# what learns within half a minute there.
POCKET = {"examples": 600, "lr": 1e-4, "edit_weight": 1.0, "accumulate": 4, "warmup": 60, "unlikely": "reply",
          "every": 200, "keep": True}
PAPER = {
    "mend": {"gpt2-xl": {"examples": 30_000}, "llama-2-7b": {"examples": 100_000}, "pocket": POCKET},
    "ke": {"gpt2-xl": {"examples": 30_000, "lr": 1e-5}, "llama-2-7b": {"examples": 100_000, "lr": 1e-5},
           "pocket": POCKET | {"lr": 3e-3, "warmup": 0}},
}


@dataclass(frozen=True)
class System:
    """One trained editor: what it learned from, and how."""

    tasks: tuple = TASKS            # whose training records are mixed
    style: str = "full"             # a key of instructions.STYLES; "none": multi-task MEND
    seen: int = 9                   # descriptions 0 to seen - 1 are trained with
    counts: tuple = ()              # (task, most records) pairs; tasks not named give all they have
    shares: tuple = ()              # (task, share) pairs: as many records as there are in this proportion
    kind: str = "mend"              # "mend" or "ke"
    after: str = "edit"             # what must be likely after an edit: the "edit" itself, or its "rephrase"
    replies: int = 2                # ConvSent: most replies of either sentiment, and of the other topic, an example
    examples: int = 0               # edits learned from in all; 0 = as published for the model
    seed: int = 0                   # of order, descriptions, replies, first weights and ConvSent's sentiments
    model: str = "pocket"           # "pocket", a model folder, or a Hugging Face name
    data: str = ""                  # folder of {task}_{split}.json; "" = editing/ beside the model
    descriptions: tuple = ()        # (task, ten texts) pairs that replace instructions.DESCRIPTIONS
    settings: tuple = ()            # (field, value) pairs of Mend or Ke and of hyper.Training


def make(**words):
    """A System of keyword words; ValueError names an unknown, mistyped or impossible value before any work."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(System)}
    for name, value in words.items():
        if name not in fields:
            raise ValueError(f"system: unknown parameter {name!r}; known are {', '.join(fields)}")
        pairs = name in PAIRS
        wanted = (tuple, list, *([dict] if pairs else [])) if fields[name] is tuple else fields[name]
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"system: {name} must be {fields[name].__name__}, found {value!r}")
    system = check(System(**{name: _frozen(value) for name, value in words.items()}))
    return dataclasses.replace(system, shares=tuple((task, float(share)) for task, share in system.shares))


def check(system):
    """The System itself if it can be trained; ValueError names what is wrong."""
    tasks = instructions.TITLES
    if not system.tasks or len(set(system.tasks)) < len(system.tasks) or set(system.tasks) - set(tasks):
        raise ValueError(f"system: tasks is {system.tasks!r}, but must name some of {', '.join(tasks)}, each once")
    for name, known in (("style", instructions.STYLES), ("kind", KINDS), ("after", examples.AFTER)):
        if getattr(system, name) not in known:
            raise ValueError(f"system: {name} is {getattr(system, name)!r}, but must be one of {', '.join(known)}")
    if not 1 <= system.seen <= instructions.SEEN:
        raise ValueError(f"system: seen is {system.seen}, but must be 1 to {instructions.SEEN}")
    if system.examples < 0 or system.replies < 1:
        raise ValueError(f"system: examples is {system.examples} and replies {system.replies}, too few")
    for task, count in system.counts:
        if task not in system.tasks or not isinstance(count, int) or count < 1:
            raise ValueError(f"system: counts asks for {count!r} records of {task!r}; it needs 1 or more of "
                             f"{', '.join(system.tasks)}")
    for task, share in system.shares:
        number = isinstance(share, (int, float)) and share > 0
        if not number or task not in system.tasks or task in dict(system.counts):
            raise ValueError(f"system: shares asks for {share!r} parts of {task!r}; it needs a positive number for one "
                             f"of {', '.join(system.tasks)} that counts does not name")
    for task, texts in system.descriptions:
        if task not in instructions.TITLES:
            raise ValueError(f"system: descriptions of {task!r}, which is no task")
        instructions.checked(task, texts)
    configured(system)
    return system


def configured(system):
    """(settings of the editor, Training) of a System; ValueError names a setting that neither has."""
    trained = {field.name: field for field in dataclasses.fields(Training)}
    paper = PAPER[system.kind]
    values = dict(paper.get(published(system.model, paper), {}))
    given = dict(system.settings)
    values |= {name: given.pop(name) for name in list(given) if name in trained}
    if {"seed", "examples"} & set(dict(system.settings)):
        raise ValueError("system: seed and examples are parameters of the system, not settings")
    values |= {"seed": system.seed} | ({"examples": system.examples} if system.examples else {})
    if "examples" not in values:
        raise ValueError(f"system: nothing is published for model {system.model!r}: give examples")
    config = configure(system.kind, {**given, "network": mend.UNTRAINED, "seed": system.seed}, system.model)
    return config, Training(**values)


def table(system):
    """{task: ten descriptions} that the System is trained and tested with."""
    return instructions.DESCRIPTIONS | dict(system.descriptions)


def folder_of(model="pocket", data=""):
    """The folder of a System's records."""
    return Path(data) if data else Path(resolve(model)) / "editing"


def load_records(model="pocket", data="", split="train", seed=0):
    """{task: [EditRecord]} of every {task}_{split}.json in the folder; FileNotFoundError if there is none.

    seed draws the sentiment that each ConvSent record wants.
    """
    paths = {task: folder_of(model, data) / f"{task}_{split}.json" for task in instructions.TITLES}
    found = {task: read_records(path, task, seed=seed) for task, path in paths.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(f"{folder_of(model, data)}: no records of an editing task for the split {split!r}")
    return found


def chosen(system):
    """The training records of a System, task after task: the first of a random order where fewer are asked for."""
    every, made = load_records(system.model, system.data, "train", system.seed), []
    for task in system.tasks:
        if task not in every:
            raise FileNotFoundError(f"{folder_of(system.model, system.data)}: no {task}_train.json")
    whole = min((len(every[task]) / share for task, share in system.shares), default=0)
    limits = dict(system.counts) | {task: max(1, round(whole * share)) for task, share in system.shares}
    for task in system.tasks:
        shuffled = random.Random(f"{system.seed} records {task}").sample(every[task], len(every[task]))
        made += shuffled[:limits.get(task, len(shuffled))]
    return made


def examples_of(system, model, tok, records, number=None):
    """The Examples of records with the System's instructions; each description is drawn once, unless it is given."""
    puts, made = [], []
    for one in records:
        which = instructions.drawn(one, system.seed, system.seen) if number is None else number
        puts.append(instructions.prefix(one, which, system.style, table(system)))
        made.append(examples.of(tok, one, puts[-1], system.after, system.replies, system.seed))
    facts = [examples.asked(one, put, system.seed) for one, put in zip(records, puts)]
    read = KINDS[system.kind][1](model, tok, facts)
    return [dataclasses.replace(example, condition=tuple(ids)) for example, ids in zip(made, read, strict=True)]


def identifier(system):
    """"<kind>-<parameters>-<contents>": equal Systems of equal models and records give the same id on every machine."""
    known = {name: value for name, value in dataclasses.asdict(system).items()
             if name not in ("model", "data") and (name != "shares" or value)}      # ids are older than shares
    texts = {task: table(system)[task] for task in system.tasks}
    parameters = sha256_text(json.dumps([FORMAT, known, texts]), *configured(system))
    paths = [folder_of(system.model, system.data) / f"{task}_train.json" for task in system.tasks]
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such file")
    contents = sha256_text(model_files_hash(system.model), *map(sha256, paths))
    return f"{system.kind}-{parameters[:8]}-{contents[:8]}"


def train(system, out_dir="results/editors"):
    """Path of the System's network.safetensors; trained, or trained on from a checkpoint, if it is not there.

    Beside it lie losses.jsonl and train.json (the System, seconds, peak memory in MB, examples, parameters). Another
    process that trains the same System is waited for. Bad input is one ValueError before any work.
    """
    place = Path(out_dir) / identifier(check(system))
    path, about = place / hyper.RESULT, place / "train.json"
    if path.is_file() and about.is_file():
        return path
    with held(Path(out_dir) / ".locks", [place.name]):
        if not (path.is_file() and about.is_file()):
            write_json(about, _trained(system, place))
    return path


def _trained(system, place):
    """Train a System into its folder; what train.json says."""
    began, (config, training) = time.monotonic(), configured(system)
    records = chosen(system)
    model, tok = load(system.model, default_device())
    network = KINDS[system.kind][0](model, config)
    laid = examples_of(system, model, tok, records)
    network = hyper.train(model, network, laid, training, place)
    words = dataclasses.asdict(system) | {"model": Path(system.model).name, "data": Path(system.data).name}
    return {"system": words, "records": len(records), "examples": training.examples,
            "seconds": round(time.monotonic() - began, 2), "peak_mb": round(_peak(model)),
            "parameters": sum(weight.numel() for weight in network.weights.values())}


def _peak(model):
    """Largest memory held so far in MB: the GPU's, else the process's."""
    device = next(model.parameters()).device
    return (peak_memory(device) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2 ** 20


def train_all(systems, out_dir="results/editors", workers=1):
    """[path] of many Systems in their order; `workers` processes at a time, each with its share of the threads."""
    several = [one for one in dict.fromkeys(systems) if identifier(check(one))]
    if workers <= 1 or len(several) <= 1:
        found = {one: train(one, out_dir) for one in progress.bar(several, "editors", len(several))}
    else:
        threads = max(1, torch.get_num_threads() // workers)
        with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
            waiting = {pool.submit(train, one, out_dir): one for one in several}
            found = {waiting[done]: done.result() for done in progress.bar(as_completed(waiting), "editors",
                                                                           len(waiting))}
    return [found[one] for one in systems]


def _frozen(value):
    """Lists and dicts as tuples, so that a System can be hashed and compared."""
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in sorted(value.items()))
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
