"""Score editors on test records: edit each record alone, ask its questions, undo; cache the result.

    rows = evaluate(cases([("InstructEdit", config)], tests), "pocket")

What comes out is what editing, asking and undoing record after record gives; see `questions` for
how many share a pass.
"""

import contextlib
import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from editcore import generate, progress
from editcore.editors import EDITORS, configure
from editcore.files import atomic, sha256_once, sha256_text
from editcore.instructedit import trained_editors
from editcore.instructedit.batched_edits import each_row, lowest_block
from editcore.instructedit.questions import OPPOSITE, SAME, enter, prepare, read
from editcore.instructedit.records import record_as_fact
from editcore.instructedit.trained_editors import HypernetworkConfig
from editcore.metrics import entropy
from editcore.model import files_hash, load, n_layers
from editcore.suffix import fused
from editcore.tokens import ROOM, batches, encode

FORMAT = 3          # raise it when the same case no longer gives the same scores
TOKEN_METRICS = ("Loc", "Port")     # which the paper counts by token; whole targets elsewhere
AT_ONCE = 64        # records whose edits are held at a time


def score(batch, before, after):
    """DataFrame with one row per record and metric: task, case_id, metric, exact, token (0 to 1).

    Rel, Gen, Port: whether all tokens of the target are the most likely ones, teacher-forced
    (exact), and the share of them that are (token); Port takes the best of a question's answers.
    Loc: whether the most likely tokens at all answer positions are those of the unedited model,
    and the share. ConvSent: Rel = z_sent z_topic with z_sent = sigmoid(mean log p wanted - mean
    log p unwanted) and z_topic = min(1, exp(mean log p wanted - the same before)), means over
    replies of the mean over tokens (arXiv:2206.06520); numbers that are not finite score 0.
    """
    table = question_scores(batch, before, after).drop(columns=["question", "pair"])
    table = table.groupby(["record", "metric"], sort=False).mean().reset_index()
    return _named(batch.records, table.sort_values("record", kind="stable"))


def question_scores(batch, before, after):
    """The scores of each question: record (its index), metric, exact, token, question, pair.

    question: its row in batch.questions, of ConvSent's sentiment that of the wanted replies; pair:
    the target, of several accepted answers the best one, else the first.
    """
    def mean(values):
        return np.add.reduceat(values.astype(float), batch.starts) / batch.sizes

    def every(values):
        return np.minimum.reduceat(values.astype(float), batch.starts)

    agrees = after.best == before.best
    hits = {"exact": every(after.right), "token": mean(after.right)}
    stays = {"exact": every(agrees), "token": mean(agrees)}
    now = mean(after.logp)
    then = mean(before.logp)
    rows = []
    replies = {}
    for question in batch.questions.itertuples():
        part = slice(question.first, question.first + question.count)
        where = (question.Index, question.first)
        if question.metric in (SAME, OPPOSITE):
            replies[question.record, question.metric] = (now[part].mean(), then[part].mean(), where)
        elif question.metric == "Loc":
            shares = [stays[name][part].mean() for name in stays]
            rows.append((question.record, "Loc", *shares, *where))
        else:
            best = question.first + int(hits["token"][part].argmax())
            right = [hits[name][best] for name in hits]
            rows.append((question.record, question.metric, *right, question.Index, best))
    for index in range(len(batch.records)):
        if (index, SAME) in replies:
            *wanted, where = replies[index, SAME]
            values = sentiment(*wanted, replies[index, OPPOSITE][0])
            rows += [(index, name, value, value, *where) for name, value in values.items()]
    return pd.DataFrame(rows, columns=["record", "metric", "exact", "token", "question", "pair"])


def sentiment(now, before, opposite):
    """{"Rel", "z_sent", "z_topic"} of mean log p of wanted replies now, before; unwanted now."""
    with np.errstate(over="ignore", invalid="ignore"):
        z_sent = 1 / (1 + np.exp(opposite - now))
        z_topic = min(1.0, np.exp(now - before))
    values = {"Rel": z_sent * z_topic, "z_sent": z_sent, "z_topic": z_topic}
    return {name: float(np.nan_to_num(value)) for name, value in values.items()}


def _named(records, table):
    """The table with each record's task and case_id in place of its index."""
    of = table["record"].map(dict(enumerate(records)))
    table.insert(0, "task", [record.task for record in of])
    table.insert(1, "case_id", [record.case_id for record in of])
    return table.drop(columns="record").reset_index(drop=True)


# Editors on test records ----------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """An editor tried on records: each is edited alone, asked its questions, and undone."""

    editor: str                     # its name in tables
    records: tuple                  # EditRecords without instruction
    network: HypernetworkConfig | None = None   # a trained editor, which brings its instructions
    key: str = ""                   # else a key of EDITORS; "": no edit
    settings: tuple = ()            # (field, value) pairs of that editor
    style: str = ""                 # of the instruction before the edit; "": the network's, or none
    question_style: str = ""        # of that before the questions; "": as before the edit
    description: int = -1           # its number; -1: drawn for each from those trained with
    seed: int = 0                   # of drawn descriptions, ConvSent's taught reply, sampled text
    together: tuple = ()            # records that a single edit teaches, in place of one edit each
    size: float = 1.0               # what the change of the weights is multiplied by


def cases(editors, tests, **words):
    """The Cases of (name, HypernetworkConfig) pairs on the records of every task.

    All trainings of an editor are asked the same, whatever their seed.
    """
    return [Case(name, tuple(records), network=config, **words)
            for (name, config), records in itertools.product(editors, tests.values())]


def main_cases(editors, tests, few=None, *, settings=None):
    """The Cases of the main table: trained `editors`, the base model, FT-L, CaliNet, GRACE.

    tests: {task: records}; few: the same for FT-L, CaliNet and GRACE, which are slow; default: all
    tests. settings: {key: {field: value}}. CaliNet learns all records of the trained tasks at once,
    the others each record alone. As published, all three are asked about a task that nobody was
    trained on (zsRE) after learning the other tasks; under the name "... (fair)" they learn its
    records.
    "Base model (instructed)" is a control: what the words of InstructEdit do without an edit.
    """
    trained = set().union(*[config.tasks for _, config in editors])
    few = few or tests
    learned = sum([tuple(few[task]) for task in few if task in trained], ())
    made = cases(editors, tests)
    for task, records in tests.items():
        made += [Case("Base model", tuple(records))]
        made += [Case("Base model (instructed)", tuple(records), style="full")]
        for key, name, joint in (("ft", "FT-L", False), ("calinet", "CaliNet", True),
                                 ("grace", "GRACE", False)):
            chosen = tuple((settings or {}).get(key, {}).items())
            case = Case(name, tuple(few[task]), key=key, settings=chosen)
            fair = replace(case, together=case.records if joint else ())
            published = replace(case, together=learned) if joint or task not in trained else case
            made += [published]
            if task not in trained:
                made += [replace(fair, editor=f"{name} (fair)")]
    return made


def at_sizes(cases, sizes=(0.25, 0.5, 1, 2, 3, 4)):
    """Every Case at every size of its edits."""
    return [replace(case, size=float(size)) for case in cases for size in sizes]


def evaluate(cases, model="pocket", *, out_dir="results/scores", editors="results/editors"):
    """Score Cases on a model: a DataFrame with one row per record, editor, size and metric.

    Columns: editor, seed (of its training, -1 without one), size, task, case_id, metric,
    exact, token, value. exact and token are means over the record's questions, see `score`; value
    is what the paper shows: token for Loc and Port, else exact. Missing hypernetworks are trained.
    Every case is cached as out_dir/<id>.parquet, whose id tells model, editor and records; a call
    that was stopped goes on after the last AT_ONCE records.
    """
    cases = list(cases)
    paths = [Path(out_dir) / f"{identifier(case, model, editors)}.parquet" for case in cases]
    groups = {}     # cases that ask the same: what no edit changes is computed once for them
    for path, case in dict(zip(paths, cases)).items():
        if not path.is_file():
            groups.setdefault(as_asked(case), {})[path] = case
    work = [(asked, start, group) for asked, group in groups.items()
            for start in range(0, len(asked), AT_ONCE)]
    net, tok = load(model) if work else (None, None)
    make = partial(_edits, of=partial(edits_of, net, tok, model_name=model, editors=editors),
                   joint={})
    for asked, start, group in progress.bar(work, "scores"):
        part = slice(start, start + AT_ONCE)
        parts = {_part(path, start): case for path, case in group.items()}
        _score_part(net, tok, asked[part], parts, partial(make, part=part))
        if start + AT_ONCE >= len(asked):
            for path in group:
                _join(path, [_part(path, first) for first in range(0, len(asked), AT_ONCE)])
    return _rows(cases, paths)


def _rows(cases, paths):
    """The scores of Cases at their paths in one DataFrame, see `evaluate`."""
    seeds = [case.network.seed if case.network else -1 for case in cases]
    tables = [pd.read_parquet(path).assign(editor=case.editor, seed=seed, size=case.size)
              for path, case, seed in zip(paths, cases, seeds)]
    rows = pd.concat(tables, ignore_index=True)
    rows["value"] = rows["token"].where(rows["metric"].isin(TOKEN_METRICS), rows["exact"])
    return rows[["editor", "seed", "size", "task", "case_id", "metric", "exact", "token", "value"]]


def fluency(cases, model="pocket", *, n_new=48, out_dir="results/scores",
            editors="results/editors"):
    """Score what edited models write: rows as `evaluate` gives them, of metric "Fluency".

    n_new tokens are sampled (top-k 5) after each edited prompt; their entropy is the score, of the
    continuation alone: an instruction before the prompt is no text of the model. It grows with
    n_new. Every case is cached in out_dir.
    """
    cases = list(cases)
    paths = [Path(out_dir) / f"{identifier(case, model, editors)}-{n_new}.parquet"
             for case in cases]
    todo = {path: case for path, case in zip(paths, cases) if not path.is_file()}
    net, tok = load(model) if todo else (None, None)
    make = partial(_edits, of=partial(edits_of, net, tok, model_name=model, editors=editors),
                   joint={})
    for path, case in progress.bar(todo.items(), "texts", len(todo)):
        asked = as_asked(case)
        values = []
        for start in range(0, len(asked), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            edits = at_size(case, make(case, part))
            values += entropies(net, tok, [record.prompt for record in asked[part]], edits, n_new,
                                case.seed + start)
        table = pd.DataFrame({"record": range(len(asked)), "metric": "Fluency", "exact": values,
                              "token": values})
        with atomic(path) as tmp:
            _named(asked, table).to_parquet(tmp, index=False)
    return _rows(cases, paths)


def entropies(model, tok, prompts, edits, n_new, seed=0):
    """The entropy of a text sampled after prompt i on the model with edits[i]."""
    lengths = [len(ids) + n_new for ids in encode(tok, prompts)]
    # rows with different edits share no beginning, so a row more begins otherwise than all
    begin = tok.decode(tok("a")["input_ids"][:1])
    draw = torch.Generator().manual_seed(seed)
    values = {}
    for part in batches(lengths, ROOM - max(lengths)):      # ordered as in a pass
        owner = list(range(len(part) + 1))
        with fused(model), each_row(model, [None, *(edits[i] for i in part)], owner):
            texts = generate.texts(model, tok, [begin, *(prompts[i] for i in part)], n_new,
                                   top_k=5, generator=draw)
        values |= {i: entropy([text]) for i, text in zip(part, texts[1:])}
    return [values[i] for i in range(len(prompts))]


def _score_part(net, tok, asked, cases, make):
    """Write the scores of {path: Case} that ask the same few records; make(case) gives its edits.

    Trained editors come first: the passes of all others begin, if they can, at their lowest block.
    """
    todo = {}       # Cases whose edits differ in size alone
    for path, case in cases.items():
        if not path.is_file():
            todo.setdefault(replace(case, editor="", size=1.0), {})[path] = case
    batch = prepare(net, tok, asked) if todo else None
    entered = None
    for key in sorted(todo, key=lambda case: case.network is None):
        edits = make(key)
        lowest = lowest_block(net, edits)
        if entered is None:
            entered = enter(net, batch, min(lowest, n_layers(net) - 1))
            before = read(net, batch, entered=entered)
        begin = entered if lowest >= entered[0].layer else None
        for path, case in todo[key].items():
            sized = at_size(case, edits)
            with atomic(path) as tmp:
                score(batch, before, read(net, batch, sized, begin)).to_parquet(tmp, index=False)


def at_size(case, edits):
    """The edits of a Case multiplied by its size; only changes of weights have one."""
    return edits if case.size == 1 else [edit * case.size for edit in edits]


def _edits(case, part, *, of, joint):
    """The edits of some of a Case's records; one that teaches all together is made once."""
    if not case.together:
        return of(case, case.records[part])
    key = replace(case, records=())
    joint[key] = joint.get(key) or of(case, [0])[0]
    return [joint[key]] * len(case.records[part])


def _part(path, start):
    """Where the scores of a case's records from `start` on lie until all are there."""
    return path.with_name(f"{path.stem}.{start}-{AT_ONCE}.part")


def _join(path, parts):
    """Put the parts of a case's scores together at its path."""
    with contextlib.suppress(FileNotFoundError):    # another process has just done it
        table = pd.concat([pd.read_parquet(part) for part in parts])
        with atomic(path) as tmp:
            table.to_parquet(tmp, index=False)
    for part in parts:
        part.unlink(missing_ok=True)


def identifier(case, model="pocket", editors="results/editors"):
    """Give equal models, editors, records and instructions the same id, whatever their names."""
    if not case.records:
        raise ValueError(f"{case.editor}: there are no records")
    editor, settings = _editor(case, model, "")
    network = sha256_once(trained_editors.train(case.network, editors)) if case.network else ""
    edited = _instructed(case, case.together or case.records)
    sizes = (case.size,) if case.size != 1 else ()
    if sizes and (editor is None or editor.makes_patch or case.size < 0):
        raise ValueError(f"{case.editor}: size is {case.size}, but must be 1 for edits that are "
                         "not changes of weights, and else not negative")
    parts = (FORMAT, files_hash(model), network, case.key, settings, edited, as_asked(case),
             case.seed, bool(case.together), *sizes)
    name = case.network.editor if case.network else case.key or "base"
    return f"{name}-{sha256_text(*parts)[:16]}"


def edits_of(model, tok, case, records, model_name="pocket", editors="results/editors"):
    """One Delta or Patch per record, each made alone on the model; None without an editor.

    With case.together one edit that teaches all of those records, for each record.
    """
    editor, config = _editor(case, model_name, editors)
    if editor is None:
        return [None] * len(records)
    instructed = _instructed(case, case.together or records)
    opposite = case.network is not None and case.network.opposite
    facts = [record_as_fact(record, case.seed, opposite) for record in instructed]
    prepared = editor.prepare(model, tok, config)
    if case.together:
        return [editor.edit(model, tok, facts, config, prepared)] * len(records)
    return editor.edit_each(model, tok, facts, config, prepared)


def _editor(case, model_name, editors):
    """(Editor, its settings) of a case, (None, None) without; editors "": before its training."""
    if case.network is None:
        if not case.key:
            return None, None
        return EDITORS.get(case.key), configure(case.key, dict(case.settings), model_name)
    if case.key:
        raise ValueError(f"{case.editor}: key {case.key!r} and a network; give one of them")
    config, _ = trained_editors.configured(case.network)
    if editors:
        config = replace(config, network=str(trained_editors.train(case.network, editors)))
    return EDITORS[case.network.editor], config


def as_asked(case):
    """The records of a Case as they are asked."""
    return _instructed(case, case.records, case.question_style)


def _instructed(case, records, style=""):
    """Records behind the case's instruction, in another style if one is named."""
    config = case.network or HypernetworkConfig(style="none")
    return trained_editors.instructed(config, records, style=style or case.style, seed=case.seed,
                                      description=case.description)
