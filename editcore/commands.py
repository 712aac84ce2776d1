"""Do the work behind the command line: read words, sum edits, plan runs, check data sets."""

import contextlib
import dataclasses
import inspect
import math
from pathlib import Path

# Imports that take seconds (torch) stand in the functions: --help needs none of them.
SEVERAL = ("--set", "--metrics", "--model", "--editors", "-p")   # options of many words
LARGEST = 2 ** 30   # bytes of a data set whose size is not known
STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
GROUP = 16      # independent single edits that are solved together


def spread(words):
    """Repeat an option before each of its words: --set a=1 b=2 becomes --set a=1 --set b=2.

    -p a 1 b 2 becomes -p a=1 -p b=2. --model has several words for `study` alone.
    """
    repeated = []
    option = ""
    name = ""
    for word in words:
        if word.startswith("-") and not word[1:2].isdigit() and not name:
            option = word if word in SEVERAL and (word != "--model" or words[0] == "study") else ""
            repeated += [] if option else [word]
        elif option == "-p" and not name and "=" not in word:
            name = word
        else:
            repeated += [option] if option else []
            repeated.append(f"{name}={word}" if name else word)
            name = ""
    return repeated + [option, name] if name else repeated


def pairs(words):
    """Return {name: text} of words NAME=VALUE."""
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word}: give NAME=VALUE, or after -p NAME VALUE")
    return dict(word.split("=", 1) for word in words)


def settings(words, editor):
    """Return {name: text or value} of words NAME=VALUE and @FILE, which `site` wrote."""
    from editcore.files import read_json

    values = {}
    for word in words:
        if not word.startswith("@"):
            values |= pairs([word])
            continue
        table = read_json(word[1:])
        if not isinstance(table, dict) or not isinstance(table.get(editor), dict):
            raise ValueError(f"{word[1:]}: no settings of {editor} in it")
        values |= table[editor]
    return values


def settings_lines():
    """Return a line per editor: its settings with their defaults; "?": published per model."""
    from editcore.editors import EDITORS

    lines = []
    for name, editor in EDITORS.items():
        values = {field.name: field.default for field in dataclasses.fields(editor.config)}
        values |= editor.variant
        values.pop("context_groups", None)      # which words cannot give
        words = [f"{key}={'?' if value is dataclasses.MISSING else value}".replace(", ", ",")
                 for key, value in values.items()]
        lines.append(f"{name}: {' '.join(words)}")
    return lines


def load_model(name, device, dtype, change=None, *, force=False):
    """Return (model, tokenizer); ValueError if an edit was made for other weights."""
    import torch

    from editcore.model import check_device, content_hash, default_device, load
    from editcore.processes import free_threads
    from editcore.study.run import dtype_of

    about = change.info if change is not None else {}
    first = about.get("dtype") or dtype or "float32"
    check_device(device)
    torch.set_num_threads(free_threads())
    net, tok = load(name, device or default_device(), dtype_of(first))
    if change is not None:
        change.check(net)
    if about.get("model_hash") and not force and about["model_hash"] != content_hash(net):
        raise ValueError(f"the edit was made for other weights than {name}'s; --force takes it all "
                         "the same")
    return net.to(dtype_of(dtype)) if dtype else net, tok


def numbers(text, option):
    """Return the whole numbers of a text like "1,2,3"; "" gives none."""
    try:
        return [int(word) for word in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"{option} is {text!r}, but must be numbers as in 0,1,2") from None


def count_moments(name, texts, layers, *, tokens, seed, dtype, device):
    """Return the Moments of a model's layers ("0,1" or "all") with the hashes of their model."""
    from editcore import generate, moments
    from editcore.files import read_lines
    from editcore.model import n_layers, name_of

    chosen = [] if layers == "all" else numbers(layers, "--layers")
    lines = read_lines(texts) if texts else None
    net, tok = load_model(name, device, dtype)
    for layer in chosen:
        name_of(net, "mlp_out", layer)
    lines = lines or generate.default_texts(net, tok, tokens, seed)
    counted = moments.second_moments(net, tok, lines, chosen or range(n_layers(net)),
                                     moments.CountSettings(tokens=tokens))
    return dataclasses.replace(counted, source=moments.source(net, tok))


def site_inputs(name, facts, texts, *, stats, held_out, seed, number, device, ordinary=False):
    """Return the Inputs of `site` from files; those not given are looked for beside the model.

    ordinary: only facts whose edit is predicted to disable the model are left out.
    """
    from editcore import site
    from editcore.facts import read_facts
    from editcore.files import read_lines
    from editcore.study import measure, plans
    from editcore.study.run import data_files

    given = {"facts": facts, "texts": texts, "stats": stats, "seed": seed, "device": device}
    rome = plans.plan_run(name, "rome", **plans.REAL | given) if ordinary else None
    paths = data_files(name)
    facts = facts or paths.get("facts")
    if not facts:
        raise ValueError(f"site: give facts; there is no facts.json beside model {name!r}")
    records = read_facts(facts)
    passages = held_out or paths.get("held_out")
    passages = read_lines(passages) if passages else ()
    lines = read_lines(texts) if texts else ()
    net, tok = load_model(name, device, "float32")
    return site.inputs(net, tok, records, held_out=passages, texts=lines, stats=stats,
                       number=number, leave_out=measure.predicted(rome) if rome else None,
                       seed=seed)


def compared(inputs, folder, editors):
    """Return `site.compare` as text; editors ["all"]: all with settings published for the model."""
    from editcore import site
    from editcore.editors import EDITORS, published
    from editcore.study.plans import METHODS

    name = inputs.model.config.name_or_path
    if editors == ["all"]:
        editors = [editor for editor in METHODS if published(name, EDITORS[editor].paper)]
    return site.compare(inputs, folder, editors).round(3).to_string(index=False)


def stored_dtype(name):
    """Return the dtype that most weights have in a model's files, such as "float16"."""
    from collections import Counter

    from safetensors import safe_open
    from transformers import AutoConfig

    from editcore.model import resolve
    from editcore.study.run import DTYPES

    sizes = Counter()
    for path in Path(resolve(name)).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():     # noqa: SIM118
                tensor = file.get_slice(key)
                sizes[STORED.get(tensor.get_dtype())] += math.prod(tensor.get_shape())
    dtype = sizes.most_common(1)[0][0] if sizes else str(
        AutoConfig.from_pretrained(name, trust_remote_code=False).dtype).removeprefix("torch.")
    return dtype if dtype in DTYPES else "float32"


def edit_all(net, tok, facts, editor, config, *, prepared, size, sequential):
    """Return the sum of all updates of `size` facts, and {"losses": [...], ...} as reported."""
    from editcore.editors import EDITORS
    from editcore.progress import bar

    method = EDITORS[editor]
    total = None
    reported = {}
    alone = size == 1 and not sequential
    step = GROUP if alone else size
    for start in bar(range(0, len(facts), step), f"{editor} edits"):
        group = facts[start:start + step]
        with total.applied(net) if sequential and total else contextlib.nullcontext():
            edit = method.edit_each if alone else method.edit
            updates = edit(net, tok, group, config, prepared)
        for update in updates if alone else [updates]:
            if not update.is_finite():
                raise ValueError(f"the update for record {group[0].case_id} and those with it is "
                                 "not finite")
            for name, values in update.info.items():
                if isinstance(values, list):
                    reported.setdefault(name, []).extend(values)
            total = update if total is None else total + update
            if sequential:
                prepared = method.remember(prepared, getattr(update, "keys", {}), config)
    weights = {name: net.get_parameter(name) for name in getattr(total, "changes", ())}
    return method.finish(total, weights, config), reported


def most_likely(net, tok, facts, change):
    """Return for each fact whether its new answer is what the edited model finds most likely."""
    from editcore.metrics import measure

    with change.applied(net):
        rows = measure(net, tok, facts, ("ES",))
    exact = {row["fact"]: row["value"] == 1 for row in rows if row["metric"] == "ES_exact"}
    return [exact.get(fact.case_id, False) for fact in facts]


def planned(names, words, models, *, full, notebooks):
    """Return the runs that plans, or with `full` notebooks, ask for, each once."""
    from editcore import report
    from editcore.study import plans

    known = report.full_study() if full else plans.BY_NAME
    chosen = report.chosen_parameters(notebooks, words, full=True) if full else {}
    runs = []
    for name in names or (known if full else plans.PLANS):
        if name not in known:
            raise ValueError(f"unknown plan {name!r}: choose one of {', '.join(known)}")
        for model in models:
            if full:
                path = Path(notebooks) / f"{name}.ipynb"
                values = report.check(path, chosen.get(name, {}) | {"model": model})
                runs += report.planned_runs(path, values)[1]
            else:
                plan = plans.BY_NAME[name]
                runs += plan(model, **plan_words(plan, words))
    return list(dict.fromkeys(runs))


def check_facts(runs):
    """ValueError if the facts of a run are not those that it is to edit."""
    from editcore.study.run import input_files, schedule

    names = ("model", "facts", "n_edits", "leave_out", "insert")
    runs = [run for run in runs if not run.known]       # else the model has to be asked first
    for run in {tuple(getattr(run, name) for name in names): run for run in runs}.values():
        schedule(run, input_files(run)["facts"])


def plan_words(plan, words):
    """Return {name: text} as values for a plan; those with a tuple as default get one."""
    import yaml

    from editcore.study.run import Run

    known = dataclasses.asdict(Run())
    known |= {name: item.default for name, item in inspect.signature(plan).parameters.items()}
    values = {}
    for word, text in words.items():
        name = {"order": "orders", "editor": "editors"}.get(word, word)
        try:
            items = yaml.safe_load(f"[{text}]") or [""]
        except yaml.YAMLError:
            raise ValueError(f"-p {word}: {text!r} cannot be read") from None
        first = items[0]
        if name == "settings" and not (isinstance(first, dict)
                                       and all(isinstance(part, dict) for part in first.values())):
            raise ValueError(f"-p settings: give {{EDITOR: {{NAME: VALUE}}}}, not {text!r}")
        several = isinstance(known.get(name), tuple) and not isinstance(first, dict)
        values[name] = tuple(items) if several else first
    return values


def run_line(run, status):
    """Return a run as one line: id, state, and the parameters that are not at their defaults."""
    shown = [f"{field.name}={getattr(run, field.name)}".replace(" ", "")
             for field in dataclasses.fields(run)
             if getattr(run, field.name) != field.default
             or field.name in ("model", "n_edits", "order")]
    return f"{status['run']:<32} {status['status']:<8} {' '.join(shown)}"


def check_data(name, source, path, shown=None):
    """Return what a file is; ValueError if not as known. shown: its name, if it is still beside."""
    import zipfile

    from editcore.files import read_json, sha256

    path = Path(path)
    shown = shown or path
    if not path.is_file():
        raise FileNotFoundError(f"{shown}: no such file")
    here = {"sha256": sha256(path), "bytes": path.stat().st_size}
    kinds = {path.suffix, Path(source["url"]).suffix}
    if ".zip" in kinds:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except Exception as error:      # zlib and others have errors of their own
            raise ValueError(f"{shown}: not a whole zip archive ({error})") from error
        if damaged:
            raise ValueError(f"{shown}: {damaged} in it is damaged")
    elif ".json" in kinds:
        rows = read_json(path)
        if not isinstance(rows, (list, dict)) or not rows:
            raise ValueError(f"{shown}: holds no records")
        here["rows"] = len(rows)
    known = {key: source[key] for key in here if source[key]}
    for key, value in known.items():
        if here[key] != value:
            raise ValueError(f"{shown}: {key} is {here[key]}, but that of {name} is {value}")
    text = ", ".join(f"{key} {value}" for key, value in here.items())
    unknown = [key for key in ("sha256", "bytes") if key not in known]
    more = f"; not known, so not compared: {', '.join(unknown)}" if unknown else ""
    return f"{shown}: {text}; as known: {', '.join(known) or 'nothing'}{more}"


def fetch_data(name, source, path):
    """Download a data set, checked before it takes its place; return the line of check_data."""
    from editcore import web
    from editcore.files import atomic

    by_hand = f"then: data {name} --check FILE"
    if not source["url"]:
        raise ValueError(f"{name} has to be chosen by hand on {source['page']}; {by_hand}")
    with atomic(path) as file:
        try:
            web.fetch(source["url"], file, limit=source["bytes"] or LARGEST)
        except ValueError as error:
            raise ValueError(f"{source['url']} cannot be fetched ({error}); fetch it where there "
                             f"is a network, {by_hand}") from error
        return check_data(name, source, file, path)
