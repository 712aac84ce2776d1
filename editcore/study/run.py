"""A run's parameters in; its checked files, their hashes, and the facts, texts and task items read from them out."""

import dataclasses
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from editcore import facts as records
from editcore.fewshot import balanced, read_items
from editcore.fewshot_tasks import TASKS
from editcore.files import sha256, sha256_text
from editcore.model import resolve
from editcore.tokens import check_lengths, encode, target_ids

DTYPES = ("float32", "float64", "bfloat16", "float16")
FORMAT = 2      # raise it when the meaning of the rows changes: runs made before then get another id
# What lies beside a local model folder is taken when the run names no file of its own.
BESIDE = {"facts": "facts.json", "texts": "texts.txt", "held_out": "held_out.txt", "tasks": "tasks"}


@dataclass(frozen=True)
class Run:
    """One run of the study: which facts are edited into which model, how, and what is measured when.

    All intervals count edited facts (n), also when an update carries several; 0 switches the measurement off.
    """

    model: str = "pocket"           # "pocket", a model folder, or a Hugging Face name
    facts: str = ""                 # facts file; "" = facts.json beside the model
    editor: str = "rome"            # a key of EDITORS
    settings: tuple = ()            # (field, value) pairs that replace the editor's published settings
    batch_size: int = 1             # facts an update
    n_edits: int = 200              # facts edited in all; 0 = all there are
    order: int = 0                  # key of facts.order; -1 = the file's order
    leave_out: tuple = ()           # case ids that are never edited
    seed: int = 0                   # of context templates, few-shot examples, samples and sampled text
    measure: tuple = ("ES", "PS", "NS")     # metrics of the facts of an update, right after it
    before: tuple = ("ES",)         # metrics of the same facts just before it
    final: tuple = ()               # metrics of all edited facts, once after the last edit
    measure_every: int = 1          # edits between these measurements
    retest_every: int = 20          # edits between re-tests of all earlier edits
    downstream_every: int = 20      # edits between few-shot tasks, perplexity, untouched facts and spectra
    items: int = 100                # items a few-shot task, and held-out passages; 0 = all in the files
    shots: int = 2                  # solved examples before each item
    untouched: int = 100            # never-edited facts whose true answer is followed
    generation: int = 0             # newest edits whose sampled text's entropy is taken, with downstream
    checkpoint_every: int = 50      # edits between checkpoints (not part of the run's identity)
    texts: str = ""                 # text file, one passage a line, for C; "" = texts.txt beside the model
    stats: str = ""                 # safetensors file with ready C; "" = computed from texts
    contexts: str = ""              # JSON file of context templates; "" = sampled from the unedited model
    held_out: str = ""              # text file, one passage a line, for perplexity; "" = held_out.txt beside the model
    tasks: str = ""                 # folder of sst2.json … in GLUE's layout; "" = tasks beside the model
    dtype: str = "float32"          # of the weights
    device: str = ""                # "" = a GPU when there is one


def make(**words):
    """A Run of keyword words, type-checked; ValueError names an unknown or mistyped parameter and lists the known."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(Run)}
    for name, value in words.items():
        if name not in fields:
            raise ValueError(f"run: unknown parameter {name!r}; known are {', '.join(fields)}")
        wanted = (tuple, list, dict)[:3 if name == "settings" else 2] if fields[name] is tuple else fields[name]
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"run: {name} must be {fields[name].__name__}, found {value!r}")
    return check(Run(**{name: _frozen(value) for name, value in words.items()}))


def check(run):
    """The Run itself if its numbers make sense; else a ValueError that names the parameter."""
    for name in ("batch_size", "checkpoint_every"):
        if getattr(run, name) < 1:
            raise ValueError(f"run: {name} must be at least 1, found {getattr(run, name)}")
    for name in ("n_edits", "measure_every", "retest_every", "downstream_every", "untouched", "items", "shots",
                 "generation"):
        if getattr(run, name) < 0:
            raise ValueError(f"run: {name} must not be negative, found {getattr(run, name)}")
    dtype_of(run.dtype)
    if run.order < -1:
        raise ValueError(f"run: order must be -1 or more, found {run.order}")
    if any(not isinstance(pair, tuple) or len(pair) != 2 for pair in run.settings):
        raise ValueError(f"run: settings must be (name, value) pairs, found {run.settings!r}")
    return run


def data_name(path):
    """A facts file's name as it appears in rows: its stem, or its folder's name if it is called facts.json."""
    return path.resolve().parent.name if path.stem == "facts" else path.stem


def files(run):
    """{"facts", "texts", …: Path} of the run's input files, each checked to be there; left out where there is none.

    FileNotFoundError names the parameter and the file.
    """
    place, found = Path(resolve(run.model)), {}
    for name in ("facts", "texts", "stats", "contexts", "held_out", "tasks"):
        given = getattr(run, name)
        path = Path(given) if given else place / BESIDE.get(name, "none") if name in BESIDE else None
        if path is not None and path.exists():
            found[name] = path
        elif given or name == "facts":
            raise FileNotFoundError(f"run: {name}: {path}: no such file")
    return found


def check_editor(run, editor, paths):
    """ValueError if the Editor changes no weights, or needs second moments and there is nothing to take them from."""
    if editor.makes_patch:
        raise ValueError(f"run: {run.editor} edits beside the weights, but runs of many edits know weights only")
    if editor.needs_moments and not {"texts", "stats"} & set(paths):
        raise ValueError(f"run: {run.editor} needs second moments of the keys of {run.model}: give texts (a text file "
                         "to compute them from) or stats (a file of them)")


def hashes(paths):
    """{name: SHA-256} of files; of a folder, over its JSON files' names and contents."""
    return {name: sha256_text(*(part for file in sorted(path.glob("*.json")) for part in (file.name, sha256(file))))
            if path.is_dir() else sha256(path) for name, path in paths.items()}


def model_files_hash(name):
    """SHA-256 over a local model's configuration, tokenizer and weight files; of the name itself for a remote one.

    It tells two models apart without loading them; `model.content_hash` of the loaded weights is checked as well.
    """
    place = Path(resolve(name))
    kept = [path for pattern in ("config.json", "tokenizer*", "vocab.json", "merges.txt", "*.safetensors")
            for path in sorted(place.glob(pattern))]
    return sha256_text(*(part for path in kept for part in (path.name, sha256(path)))) if kept else sha256_text(name)


def dtype_of(name):
    """The torch dtype of a name; ValueError lists those that models are loaded in."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def run_id(run, contents):
    """"<editor>-<parameters>-<contents>": equal parameters and inputs give the same short id on every machine.

    Only parameters that are not at their default count, so that a new parameter leaves finished runs valid.
    contents: {name: hash} of the model's files and of the input files.
    """
    known = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)
             if field.name != "checkpoint_every" and getattr(run, field.name) != field.default}
    parameters = hashlib.sha256(json.dumps([FORMAT, known], sort_keys=True).encode()).hexdigest()
    return f"{run.editor}-{parameters[:8]}-{sha256_text(json.dumps(contents, sort_keys=True))[:8]}"


def schedule(run, path):
    """(facts to edit in order, facts never to be edited) of a facts file: one fact a subject, the run's order.

    The untouched facts are drawn from those left over with the run's seed; they have a true answer.
    """
    every = records.read_facts(path)
    ordered = records.one_per_subject(every) if run.order < 0 else records.order(every, run.order)
    out = {str(case_id) for case_id in run.leave_out}
    if missing := out - {str(one.case_id) for one in every}:
        raise ValueError(f"run: leave_out names {sorted(missing)[0]!r}, which is not in {path}")
    ordered = [one for one in ordered if str(one.case_id) not in out]
    if run.n_edits > len(ordered):
        raise ValueError(f"run: n_edits is {run.n_edits}, but {path} has {len(ordered)} facts with different subjects")
    edited = ordered[:run.n_edits or len(ordered)]
    rest = [one for one in ordered[len(edited):] if one.target_true]
    return edited, random.Random(run.seed).sample(rest, min(run.untouched, len(rest)))


def check_prompts(model_limit, tok, facts, templates=("{}",)):
    """ValueError naming the record if a prompt with its target is longer than the model, or has no tokens for it.

    templates: contexts put around the rewriting prompt by the editor.
    """
    longest = max(templates, key=lambda template: len(tok(template)["input_ids"]))
    for one in facts:
        try:
            room = max(len(target_ids(tok, target)) for target in (one.target_new, one.target_true or one.target_new))
        except ValueError as error:
            raise ValueError(f"record {one.case_id}: {error}") from error
        prompts = [longest.replace("{}", one.text), *one.paraphrases, *one.neighbours]
        check_lengths(encode(tok, prompts), [f"record {one.case_id}: prompt {p[:60]!r}" for p in prompts],
                      model_limit - room)


def read_tasks(folder, limit=0):
    """{task: items} of the known tasks' JSON files in a folder; with a limit, so many items, as many of each label."""
    paths = {name: Path(folder) / f"{name}.json" for name in TASKS}
    found = {name: read_items(path, name) for name, path in paths.items() if path.is_file()}
    if not found:
        raise ValueError(f"{folder}: none of {', '.join(path.name for path in paths.values())} is in it")
    return {name: balanced(items, limit) if 0 < limit < len(items) else items for name, items in found.items()}


def _frozen(value):
    """Lists and dicts as tuples, so that a Run can be hashed and compared."""
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


# The new names; the old ones go with their last users.
make_run, check_run, input_files = make, check, files


def input_hashes(run, paths):
    """{name: SHA-256} of the model's files and of the run's input files."""
    return {"the model's files": model_files_hash(run.model)} | hashes(paths)
