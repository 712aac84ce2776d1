"""Say what a run of the study is: its parameters, their checks, its files and its id."""

import dataclasses
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from editcore import facts as records
from editcore.editors import EDITORS, configure
from editcore.fewshot import read_tasks
from editcore.files import read_lines, sha256, sha256_text
from editcore.metrics import check_names
from editcore.model import beside, check_device, files_hash, resolve
from editcore.tokens import check_lengths, encode, encode_pairs, with_subject

DTYPES = ("float32", "float64", "bfloat16", "float16")
FORMAT = 2      # raise it when the meaning of the rows changes: earlier runs get another id
# What lies beside a local model's folder is taken when the run names no file of its own.
BESIDE = {"facts": "facts.json", "texts": "texts.txt", "held_out": "held_out.txt", "tasks": "tasks"}
CHARACTERS = 20     # of a text per token that the model takes, at most
NOT_IN_ID = ("checkpoint_every",)


@dataclass(frozen=True)
class Run:
    """One run: which facts are edited into which model, how, and what is measured when.

    All intervals count edited facts (n), also when an update carries many; 0 switches the
    measurement off.
    """

    model: str = "pocket"           # "pocket", a model folder, or a Hugging Face name
    facts: str = ""                 # facts file; "" = facts.json beside the model
    editor: str = "rome"            # a key of EDITORS
    settings: tuple = ()            # (field, value) pairs that replace published settings
    batch_size: int = 1             # facts per update
    n_edits: int = 200              # facts edited in all; 0 = all there are
    order: int = 0                  # key of facts.order; -1 = the file's order
    leave_out: tuple = ()           # case ids that are never edited
    insert: tuple = ()              # (place, case id): edit number `place`, whatever is left out
    known: bool = False             # edit and follow only facts that the unedited model knows
    seed: int = 0                   # of context templates, few-shot examples, samples, texts
    measure: tuple = ("ES", "PS", "NS")     # metrics of an update's facts, right after it
    before: tuple = ("ES",)         # metrics of the same facts just before it
    final: tuple = ()               # metrics of all edited facts, once after the last edit
    measure_every: int = 1          # edits between these measurements
    retest_every: int = 20          # edits between re-tests of all earlier edits
    downstream_every: int = 20      # edits between tests of what else the model can do
    items: int = 100                # items per few-shot task; 0 = all
    passages: int = 0               # held-out passages; 0 = as many as items
    shots: int = 2                  # solved examples before each item
    untouched: int = 100            # never-edited facts whose true answer is followed
    generation: int = 0             # newest edits whose sampled text's entropy is taken
    checkpoint_every: int = 50      # edits between checkpoints (not part of the run's id)
    texts: str = ""                 # text file for second moments; "" = texts.txt beside the model
    stats: str = ""                 # file of second moments; "" = computed from texts
    contexts: str = ""              # JSON file of context templates; "" = sampled
    held_out: str = ""              # text file for perplexity; "" = held_out.txt beside the model
    tasks: str = ""                 # folder of sst2.json, ...; "" = tasks beside the model
    dtype: str = "float32"          # of the weights
    device: str = ""                # "" = a GPU when there is one
    answers: int = 6                # tokens of the answers kept in cases.parquet; 0 = no such file


@dataclass(frozen=True)
class RunInputs:
    """What is read from a run's files."""

    facts: list         # to edit, in order
    untouched: list     # facts that are never edited
    tasks: dict         # {task: few-shot items}
    held_out: list      # passages for perplexity
    n_known: int | None     # facts of the file that the model knows; None: it was not asked


def make_run(**words):
    """Return the Run of these parameters; ValueError names an unknown or mistyped one."""
    defaults = {field.name: field.default for field in dataclasses.fields(Run)}
    values = {}
    for name, value in words.items():
        if name not in defaults:
            raise ValueError(f"run: unknown parameter {name!r}; known are {', '.join(defaults)}")
        kind = type(defaults[name])
        kinds = {tuple: (tuple, list, dict) if name == "settings" else (tuple, list)}
        mistyped = isinstance(value, bool) and kind is not bool     # a bool is an int to Python
        if mistyped or not isinstance(value, kinds.get(kind, kind)):
            raise ValueError(f"run: {name} must be {kind.__name__}, found {value!r}")
        values[name] = _frozen(value)
    return check_run(Run(**values))


def check_run(run):
    """Return the Run if its numbers make sense; else ValueError names the parameter."""
    for field in dataclasses.fields(Run):
        value = getattr(run, field.name)
        least = {"batch_size": 1, "checkpoint_every": 1, "order": -1}.get(field.name, 0)
        if isinstance(field.default, int) and value < least:
            sense = f"at least {least}" if least else "not negative"
            raise ValueError(f"run: {field.name} must be {sense}, found {value}")
    for name, most in (("seed", 2 ** 32 - 1), ("order", 10_000)):
        if getattr(run, name) > most:
            raise ValueError(f"run: {name} must be at most {most}, found {getattr(run, name)}")
    dtype_of(run.dtype)
    check_device(run.device)
    for name in ("measure", "before", "final"):
        check_names(getattr(run, name))
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in run.settings):
        raise ValueError(f"run: settings must be (name, value) pairs, found {run.settings!r}")
    _check_insert(run.insert)
    return run


def _check_insert(insert):
    """ValueError unless these are (place, case id) pairs, every place and fact once."""
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], int)
               for pair in insert):
        raise ValueError(f"run: insert must be (place, case id) pairs, found {insert!r}")
    places = {place for place, _ in insert}
    cases = {str(case_id) for _, case_id in insert}
    if min(places, default=1) < 1 or not len(places) == len(cases) == len(insert):
        raise ValueError("run: insert must name different places from 1 on and different facts, "
                         f"found {insert!r}")


def dtype_of(name):
    """Return the torch dtype of a name; ValueError lists those that models are loaded in."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def data_files(model):
    """Return {"facts", "texts", ...: Path} of what lies beside a model, or in data/ for it."""
    paths = {name: beside(model, file) for name, file in BESIDE.items()}
    return {name: path for name, path in paths.items() if _there(name, path)}


def _there(name, path):
    return path.is_dir() if name == "tasks" else path.is_file()


def input_files(run):
    """Check a run and return {"facts", "texts", ...: Path} of its files, without those it lacks.

    FileNotFoundError or ValueError names the parameter and what is wrong with it.
    """
    check_run(run)
    _check_layers(configure(run.editor, dict(run.settings), run.model), run.model)
    if EDITORS[run.editor].makes_patch:
        raise ValueError(f"run: {run.editor} edits beside the weights, but runs of many edits "
                         "know weights only")
    paths = data_files(run.model)
    for name in ("facts", "texts", "stats", "contexts", "held_out", "tasks"):
        wanted = getattr(run, name)
        if wanted and not _there(name, Path(wanted)):
            kind = "folder" if name == "tasks" else "file"
            raise FileNotFoundError(f"run: {name}: {wanted}: no such {kind}")
        paths |= {name: Path(wanted)} if wanted else {}
    if "facts" not in paths:
        raise FileNotFoundError(f"run: facts: give a facts file; there is no {BESIDE['facts']} "
                                f"beside model {run.model!r}, or no such model")
    return paths


def _check_layers(config, model):
    """ValueError if an editor's layers are not among those of a local model."""
    folder = Path(resolve(model))
    layers = getattr(config, "layers", None) or (getattr(config, "layer", 0),)
    if (folder / "config.json").is_file() and all(isinstance(layer, int) for layer in layers):
        count = AutoConfig.from_pretrained(folder, trust_remote_code=False).num_hidden_layers
        if wrong := [layer for layer in layers if not -count <= layer < count]:
            raise ValueError(f"run: layer {wrong[0]}: {model} has layers 0 to {count - 1}")


def input_hashes(run, paths):
    """Return {name: SHA-256} of the model's files and of a run's `input_files`."""
    hashes = {"the model's files": files_hash(run.model)}
    for name, path in paths.items():
        files = sorted(path.glob("*.json")) if path.is_dir() else []
        parts = [part for file in files for part in (file.name, sha256(file))]
        hashes[name] = sha256_text(*parts) if path.is_dir() else sha256(path)
    return hashes


def run_id(run, hashes):
    """Return "<editor>-<parameters>-<contents>", the same on every machine for equal inputs.

    Only parameters that are not at their default count, so that a new parameter leaves finished
    runs valid; so does the editor's version, if it is above 1. hashes: `input_hashes`.
    """
    special = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)
               if getattr(run, field.name) != field.default and field.name not in NOT_IN_ID}
    version = EDITORS[run.editor].version
    special |= {"version": version} if version > 1 else {}
    parameters = json.dumps([FORMAT, special], sort_keys=True).encode()
    contents = sha256_text(json.dumps(hashes, sort_keys=True))
    return f"{run.editor}-{hashlib.sha256(parameters).hexdigest()[:8]}-{contents[:8]}"


def data_name(path):
    """Return a facts file's name in rows: its stem, or its folder's if it is facts.json."""
    return path.resolve().parent.name if path.stem == "facts" else path.stem


def read_inputs(run, paths, knows=None):
    """Read a run's files into RunInputs; ValueError names what is damaged. knows: `schedule`'s."""
    facts, untouched = schedule(run, paths["facts"], knows)
    downstream = run.downstream_every > 0
    tasks = read_tasks(paths["tasks"], run.items) if downstream and "tasks" in paths else {}
    wanted = downstream and "held_out" in paths
    held_out = read_lines(paths["held_out"], run.passages or run.items) if wanted else []
    return RunInputs(facts, untouched, tasks, held_out, sum(knows) if run.known else None)


def schedule(run, path, knows=None):
    """Return (facts to edit in order, facts never to be edited) of a facts file.

    One fact per subject, in the run's order, those of run.insert at their places. The untouched
    facts have a true answer and are drawn from those that are left over, with the run's seed; they
    are the same without run.insert. knows: whether the model knows each fact of the file, for
    run.known. ValueError names a case id that is not there, or says how many facts there are.
    """
    facts = records.read_facts(path)
    inserted = _inserted(run, path, facts)
    if run.known:
        facts = [fact for fact, hit in zip(facts, _required(knows), strict=True) if hit]
        if unknown := set(inserted.values()) - set(facts):
            case_id = min(str(fact.case_id) for fact in unknown)
            raise ValueError(f"run: insert names {case_id!r}, which the model does not know")
    ordered = records.one_per_subject(facts) if run.order < 0 else records.order(facts, run.order)
    subjects = {fact.subject.lower() for fact in inserted.values()}
    left_out = set(map(str, run.leave_out))
    ordered = [fact for fact in ordered
               if str(fact.case_id) not in left_out and fact.subject.lower() not in subjects]
    total = len(ordered) + len(inserted)
    n_edits = run.n_edits or total
    if n_edits > total:
        kind = " that the model knows" if run.known else ""
        raise ValueError(f"run: n_edits is {n_edits}, but {path} has {total} facts with "
                         f"different subjects{kind}")
    if max(inserted, default=0) > n_edits:
        raise ValueError(f"run: insert has place {max(inserted)}, but n_edits is {n_edits}")
    others = [fact for fact in ordered[n_edits:] if fact.target_true]
    untouched = random.Random(run.seed).sample(others, min(run.untouched, len(others)))
    ordinary = iter(ordered)
    edited = [inserted[place] if place in inserted else next(ordinary)
              for place in range(1, n_edits + 1)]
    return edited, untouched


def _inserted(run, path, facts):
    """{place: Fact} of run.insert; ValueError if it or run.leave_out names a fact not in the file.
    """
    by_id = {str(fact.case_id): fact for fact in facts}
    inserted = [case_id for _, case_id in run.insert]
    for name, cases in (("leave_out", run.leave_out), ("insert", inserted)):
        if unknown := set(map(str, cases)) - by_id.keys():
            raise ValueError(f"run: {name} names {min(unknown)!r}, which is not in {path}")
    return {place: by_id[str(case_id)] for place, case_id in run.insert}


def _required(knows):
    if knows is None:
        raise ValueError("run: known: the model must be asked what it knows (`knowledge.known`)")
    return knows


def check_prompts(tok, facts, limit, *, templates=("{}",)):
    """ValueError naming the record that cannot be edited, or is longer than `limit` tokens.

    Characters are counted before anything is tokenised. templates: contexts that the editor puts
    around the rewriting prompt.
    """
    longest = max(templates, key=lambda template: len(encode(tok, [template])[0]))
    for fact in facts:
        label = f"record {fact.case_id}"
        records.check(fact)
        targets = (fact.target_new, fact.target_true or fact.target_new)
        texts = (fact.text, *targets, *fact.paraphrases, *fact.neighbours, *fact.attributes,
                 *fact.generation)
        if (size := max(map(len, texts))) > CHARACTERS * limit:
            raise ValueError(f"{label}: a text of {size:,} characters, but the model takes at most "
                             f"{limit} tokens")
        pairs = encode_pairs(tok, [(fact.text, target) for target in targets], [label] * 2)
        room = max(len(target) for _, target in pairs)
        try:
            with_subject(tok, fact.prompt, fact.subject)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
        prompts = [longest.replace("{}", fact.text), *fact.paraphrases, *fact.neighbours]
        labels = [f"{label}: prompt {prompt[:60]!r}" for prompt in prompts]
        check_lengths(encode(tok, prompts), labels, limit - room)


def _frozen(value):
    """Lists and dicts as tuples, so that a Run can be hashed and compared."""
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
