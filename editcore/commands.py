"""The parsed words of one command in; its files, and what it says on standard output, out."""

import dataclasses
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from editcore import data, progress, runners
from editcore import templates as contexts
from editcore.delta import Delta
from editcore.delta import load as load_delta
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.facts import read_facts
from editcore.files import atomic, read_lines, sha256
from editcore.metrics import measure, score
from editcore.model import content_hash, default_device, load, resolve, short_name, synchronize
from editcore.study import run as inputs

GROUP = 16      # independent single edits that are solved together


def edit(given):
    """Facts into a delta file: the total change of every edited parameter, and how it was made."""
    facts, config = read_facts(given.facts), configure(given.editor, pairs(given.set), given.model)
    size = given.batch_size if given.batch_size is not None else 1 if given.sequential else len(facts)
    if EDITORS[given.editor].makes_patch:
        raise ValueError(f"{given.editor} edits beside the weights, a delta file holds weights only")
    if size < 1:
        raise ValueError(f"--batch-size must be at least 1, found {size}")
    sources = _sources(given)
    model, tok = _load(given.model, given)
    prepared = EDITORS[given.editor].prepare(model, tok, config, sources)
    began = time.monotonic()
    total = _edited(given, (model, tok, config, prepared), facts, size)
    synchronize(next(model.parameters()).device)
    seconds = time.monotonic() - began
    info = {"editor": given.editor, "settings": dataclasses.asdict(config), "model": given.model,
            "model_hash": content_hash(model), "dtype": given.dtype, "facts": Path(given.facts).name,
            "facts_hash": sha256(given.facts), "edits": len(facts), "batch_size": size,
            "sequential": given.sequential, "seed": given.seed, "contexts": list(getattr(prepared, "contexts", ())),
            "seconds": seconds, "seconds_per_edit": seconds / len(facts)}
    total = Delta({name: total.changes[name] for name in sorted(total.changes)}, info).dense()
    total.save(given.output)
    norms = "".join(f"  {name}  norm {total.norm(name):.4f}\n" for name in total.changes)
    sys.stdout.write(f"{given.output}: {len(facts)} facts, {seconds / len(facts):.3f} s an edit\n{norms}")


def _edited(given, bench, facts, size):
    """The sum of all updates; each on the unedited model, or (sequential) on the model with the sum so far."""
    (model, tok, config, prepared), total = bench, Delta({})
    alone = size == 1 and not given.sequential
    groups = [facts[i:i + (GROUP if alone else size)] for i in range(0, len(facts), GROUP if alone else size)]
    for group in progress.bar(groups, f"{given.editor} edits"):
        if alone:
            updates = EDITORS[given.editor].edit_each(model, tok, group, config, prepared)
        else:
            with (total if given.sequential else Delta({})).applied(model):
                updates = [EDITORS[given.editor].edit(model, tok, group, config, prepared)]
        for update in updates:
            if not update.is_finite():
                raise ValueError(f"the update for record {group[0].case_id} and those with it is not finite")
            total = total + update
    return total


def _sources(given):
    """Where the editor takes contexts and second moments from; ValueError if it needs moments and none is given."""
    beside = Path(resolve(given.model)) / inputs.BESIDE["texts"]
    texts = given.texts or (str(beside) if beside.is_file() and not given.stats else None)
    if EDITORS[given.editor].needs_moments and not texts and not given.stats:
        raise ValueError(f"{given.editor} needs second moments of {given.model}'s keys: give --texts FILE.txt to "
                         "compute them from, or --stats FILE.safetensors")
    for path in (given.texts, given.stats):
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
    templates = contexts.read(given.contexts) if given.contexts else ()
    return EditorInputs(tuple(read_lines(texts)) if texts else (), given.stats, templates, given.seed)


def apply(given):
    """A model folder with the delta in its weights; it appears whole or not at all."""
    folder, delta = Path(given.output), load_delta(given.delta)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ValueError(f"{folder}: already there; give a new folder")
    model, tok = _load(given.model, given, delta)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with delta.applied(model):
            model.save_pretrained(made)
        tok.save_pretrained(made)
        for path in (made, *made.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        made.replace(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    sys.stdout.write(f"{folder}\n")


def evaluate(given):
    """A parquet file with a row for every fact and metric; the means on standard output."""
    facts, delta = read_facts(given.facts), load_delta(given.delta) if given.delta else Delta({})
    model, tok = _load(given.model, given, delta)
    with delta.applied(model):
        rows = pd.DataFrame(measure(model, tok, facts, tuple(given.metrics)))
    rows = rows.assign(run="", model=short_name(given.model), editor=delta.info.get("editor", ""), seed=0,
                       data=inputs.data_name(Path(given.facts)), step=delta.info.get("edits", 0))
    rows["fact"] = rows["fact"].astype(str)
    with atomic(given.output) as tmp:
        rows[["run", "model", "editor", "data", "seed", "step", "fact", "metric", "value"]].to_parquet(tmp, index=False)
    table = rows.groupby("metric", sort=False)["value"].agg(["mean", "size"]).rename(columns={"size": "facts"})
    if {"ES", "PS", "NS"} <= set(table.index):
        table.loc["S"] = [score(rows.to_dict("records")), len(facts)]
    sys.stdout.write(table.astype({"facts": int}).to_string(float_format="%.4f") + "\n")


def predicted(given):
    """The predicted disabling edits of a facts file; with a model, their denominators too."""
    from editcore import disabling

    bad = []
    facts = read_facts(given.facts, bad)
    if not given.tokenizer and not given.model:
        raise ValueError("give --tokenizer NAME or FOLDER, or --model")
    tok, table = disabling.tokenizer(given.tokenizer or given.model), None
    if given.model:
        words = {name: getattr(given, name) or "" for name in ("texts", "stats", "contexts", "device")}
        run = inputs.make(model=given.model, facts=given.facts, editor="rome", settings=pairs(given.set),
                          seed=given.seed, dtype=given.dtype, **words)
        table = disabling.tabulated(run, facts)
    sys.stdout.write(disabling.listing(tok, facts, table, len(bad)))


def sets(given):
    """The list of data sets, or one of them fetched or checked."""
    known = data.manifest()
    if given.name is None:
        if given.output or given.check:
            raise ValueError(f"name the data set, one of {', '.join(known)}")
        sys.stdout.write(data.listing(known))
    elif given.check:
        sys.stdout.write(data.check(data.known(known, given.name), given.check) + "\n")
    elif given.output:
        sys.stdout.write(data.fetch(data.known(known, given.name), given.output) + "\n")
    else:
        sys.stdout.write(data.describe(data.known(known, given.name)))


COMMANDS = {"edit": edit, "apply": apply, "evaluate": evaluate, "run": runners.run, "study": runners.study,
            "hyper": runners.hyper, "report": runners.build, "disabling": predicted, "data": sets}


def pairs(words):
    """{name: value} of words "name=value"; ValueError for another form."""
    for word in words:
        if "=" not in word:
            raise ValueError(f"--set {word}: give NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


def _load(name, given, delta=None):
    """(model, tok) with the weights in the wanted dtype; ValueError if a delta was made for other weights."""
    edited = delta is not None and bool(delta.changes)
    made_in = delta.info.get("dtype", "float32") if edited else given.dtype or "float32"
    model, tok = load(name, given.device or default_device(), inputs.dtype_of(made_in))
    if edited:
        delta.check(model)
        found = content_hash(model)
        if delta.info.get("model_hash") != found and not given.force:
            raise ValueError(f"the delta was made for other weights than {name}'s (hash "
                             f"{delta.info.get('model_hash', 'unknown')[:12]}, here {found[:12]}); --force applies it")
    return (model.to(inputs.dtype_of(given.dtype)) if given.dtype else model), tok
