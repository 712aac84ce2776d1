"""Score editors on test records: edit each record alone, ask its questions, undo; cache the result.

    rows = evaluate(cases([("InstructEdit", config)], tests), "pocket")

Many records go through each pass (`batched_edits`), and all that a record is asked is one row
(`token_tree`). What comes out is what editing, asking and undoing record after record gives.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from editcore import generate, progress
from editcore.editors import EDITORS, configure
from editcore.files import atomic, sha256, sha256_text
from editcore.instructedit import token_tree, trained_editors
from editcore.instructedit.batched_edits import each_row
from editcore.instructedit.records import record_as_fact
from editcore.instructedit.trained_editors import HypernetworkConfig
from editcore.likelihood import LOGITS, states
from editcore.metrics import entropy
from editcore.model import files_hash, load, max_length
from editcore.suffix import fused, head
from editcore.tokens import batches as length_batches
from editcore.tokens import encode, encode_pairs

FORMAT = 3          # raise it when the same case no longer gives the same scores
TOKEN_METRICS = ("Loc", "Port")     # which the paper counts by token; whole targets elsewhere
AT_ONCE = 64        # records whose edits are held at a time
SAME = "same"       # replies of ConvSent's wanted sentiment
OPPOSITE = "opposite"


# What a record is asked -----------------------------------------------------------------------

@dataclass(frozen=True)
class QuestionBatch:
    """All questions about some records and the passes that answer them."""

    records: tuple
    questions: pd.DataFrame     # record (index), metric, first and count of its pairs
    passes: tuple               # (records of the rows, TreeBatch, place of each prediction below)
    starts: np.ndarray          # (n,) first token of each pair among the tokens of all pairs
    sizes: np.ndarray           # (n,) target tokens of each pair


@dataclass(frozen=True)
class Answers:
    """What a model says at every target token of a QuestionBatch."""

    logp: np.ndarray        # (E,) float64, log P of the token, teacher-forced
    best: np.ndarray        # (E,) the most likely token
    right: np.ndarray       # (E,) bool, whether that is the target's


def questions_of(record):
    """[(metric, prompt, continuations)] of a record.

    Of a locality question one answer is read, of another topic's replies all; of a portability
    question all answers.
    """
    stays = [("Loc", ask.prompt, ask.answers if record.topic else ask.answers[:1])
             for ask in record.locality]
    if record.topic:
        return [(SAME, record.prompt, record.wanted), (OPPOSITE, record.prompt, record.unwanted),
                *stays]
    return [("Rel", record.prompt, record.wanted),
            *[("Gen", prompt, record.wanted) for prompt in record.rephrase], *stays,
            *[("Port", ask.prompt, ask.answers) for ask in record.portability]]


def prepare(model, tok, records, max_tokens=4096):
    """The QuestionBatch of records for a model; ValueError names a record that is too long."""
    pairs = []
    questions = []
    owner = []
    for index, record in enumerate(records):
        for metric, prompt, texts in questions_of(record):
            questions.append((index, metric, len(pairs), len(texts)))
            pairs += [(prompt, text) for text in texts]
            owner += [index] * len(texts)
    labels = [f"record {records[index].case_id}" for index in owner]
    pairs = encode_pairs(tok, pairs, labels)
    token_tree.check_pairs(model, pairs, labels)
    sizes = np.array([len(target) for _, target in pairs], dtype=np.int64)
    starts = np.concatenate([[0], sizes.cumsum()[:-1]]).astype(np.int64)
    first = np.searchsorted(owner, np.arange(len(records) + 1))
    trees = [token_tree.build(pairs[start:end], int(start))
             for start, end in zip(first, first[1:])]
    passes = []
    device = next(model.parameters()).device
    for group in length_batches([len(tree.ids) for tree in trees], max_tokens):
        batch = token_tree.pack([trees[index] for index in group], device)
        places = [starts[first[index]] + np.arange(len(trees[index].predictions))
                  for index in group]
        passes.append((tuple(group), batch, np.concatenate(places)))
    table = pd.DataFrame(questions, columns=["record", "metric", "first", "count"])
    return QuestionBatch(tuple(records), table, tuple(passes), starts, sizes)


@torch.no_grad()
def read(model, batch, edits=None):
    """The Answers to a QuestionBatch, with edits[i] (Delta, Patch or None) in place for record i.

    Codebooks are looked up at the prompt's last token, where published GRACE looks.
    """
    edits = edits or [None] * len(batch.records)
    if len(edits) != len(batch.records):
        raise ValueError(f"scores: {len(edits)} edits for {len(batch.records)} records")
    total = int(batch.sizes.sum())
    answers = Answers(np.empty(total), np.empty(total, dtype=np.int64), np.empty(total, dtype=bool))
    for owner, trees, entries in batch.passes:
        with fused(model), each_row(model, edits, owner, trees.ends_prompt):
            logp, best = _predictions(model, trees)
        answers.logp[entries] = logp.double().cpu().numpy()
        answers.best[entries] = best.cpu().numpy()
        answers.right[entries] = (best == trees.token).cpu().numpy()
    return answers


def _predictions(model, trees):
    """(log P of each target token (M,), most likely token there (M,)) of one pass."""
    hidden = states(model, trees.ids, position_ids=trees.positions,
                    attention_mask=trees.mask(next(model.parameters()).dtype)).flatten(0, 1)
    place, pick = trees.place.unique(return_inverse=True)
    logp = []
    best = []
    order = pick.argsort(stable=True)
    limit = max(1, LOGITS // model.config.vocab_size)
    for first in range(0, len(place), limit):
        logits = head(model, hidden[place[first:first + limit]])
        inside = order[(pick[order] >= first) & (pick[order] < first + limit)]
        rows = pick[inside] - first
        logp.append(logits[rows, trees.token[inside]] - logits.logsumexp(-1)[rows])
        best.append(logits.argmax(-1)[rows])
    back = order.argsort()
    return torch.cat(logp)[back], torch.cat(best)[back]


def score(batch, before, after):
    """DataFrame with one row per record and metric: task, case_id, metric, exact, token (0 to 1).

    Rel, Gen, Port: whether all tokens of the target are the most likely ones, teacher-forced
    (exact), and the share of them that are (token); Port takes the best of a question's answers.
    Loc: whether the most likely tokens at all answer positions are those of the unedited model,
    and the share. ConvSent: Rel = z_sent z_topic with z_sent = sigmoid(mean log p wanted - mean
    log p unwanted) and z_topic = min(1, exp(mean log p wanted - the same before)), means over
    replies of the mean over tokens (arXiv:2206.06520); numbers that are not finite score 0.
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
        if question.metric in (SAME, OPPOSITE):
            replies[question.record, question.metric] = (now[part].mean(), then[part].mean())
        elif question.metric == "Loc":
            rows.append((question.record, "Loc", *[stays[name][part].mean() for name in stays]))
        else:
            rows.append((question.record, question.metric,
                         *[hits[name][part].max() for name in hits]))
    for index in range(len(batch.records)):
        if (index, SAME) in replies:
            values = sentiment(*replies[index, SAME], replies[index, OPPOSITE][0])
            rows += [(index, name, value, value) for name, value in values.items()]
    table = pd.DataFrame(rows, columns=["record", "metric", "exact", "token"])
    table = table.groupby(["record", "metric"], sort=False).mean().reset_index()
    return _named(batch.records, table.sort_values("record", kind="stable"))


def sentiment(now, before, opposite):
    """{"Rel", "z_sent", "z_topic"} of mean log p of wanted replies now, before; unwanted now."""
    with np.errstate(over="ignore", invalid="ignore"):
        z_sent = 1 / (1 + np.exp(opposite - now))
        z_topic = min(1.0, np.exp(now - before))
    values = {"Rel": z_sent * z_topic, "z_sent": z_sent, "z_topic": z_topic}
    return {name: float(np.nan_to_num(value)) for name, value in values.items()}


def fluency(model, tok, records, edits, seed=0, n_new=48):
    """Rows of metric "Fluency": the entropy of tokens sampled (top-k 5) after each prompt.

    Of the continuation alone: an instruction before the prompt is no text of the model.
    """
    lengths = [len(ids) for ids in encode(tok, [record.prompt for record in records])]
    order = sorted(range(len(records)), key=lengths.__getitem__)
    # rows with different edits share no beginning, so a row more begins otherwise than all
    begin = tok.decode(tok("a")["input_ids"][:1])
    draw = torch.Generator().manual_seed(seed)
    at_once = max(1, 8192 // max_length(model) - 1)
    rows = []
    for start in range(0, len(order), at_once):
        part = order[start:start + at_once]
        owner = list(range(len(part) + 1))
        with fused(model), each_row(model, [None, *(edits[i] for i in part)], owner):
            prompts = [begin, *(records[i].prompt for i in part)]
            texts = generate.texts(model, tok, prompts, n_new, top_k=5, generator=draw)[1:]
        entropies = [entropy([text]) for text in texts]
        rows += [(i, "Fluency", value, value) for i, value in zip(part, entropies)]
    return _named(records, pd.DataFrame(sorted(rows),
                                        columns=["record", "metric", "exact", "token"]))


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
    fluency: int = 0                # tokens sampled after each prompt; 0: none
    together: tuple = ()            # records that a single edit teaches, in place of one edit each


def cases(editors, tests, **words):
    """The Cases of (name, HypernetworkConfig) pairs on the records of every task."""
    return [Case(name, tuple(records), network=config, seed=config.seed, **words)
            for (name, config), records in itertools.product(editors, tests.values())]


def main_cases(editors, tests, *, fluency=48, settings=None):
    """The Cases of the main table: trained `editors`, the base model, FT-L, CaliNet, GRACE.

    tests: {task: records}; settings: {key: {field: value}}. CaliNet learns all records of the
    trained tasks at once, the others each record alone. As published, FT-L, CaliNet and GRACE are
    asked about a task that nobody was trained on (zsRE) after learning the other tasks; under the
    name "... (fair)" they learn its records.
    "Base model (instructed)" is a control: what the words of InstructEdit do without an edit.
    """
    trained = set().union(*[config.tasks for _, config in editors])
    learned = sum([tuple(tests[task]) for task in tests if task in trained], ())
    seeds = [config.seed for name, config in editors if name == "InstructEdit"]
    made = cases(editors, tests)
    for task, records in tests.items():
        records = tuple(records)
        made += [Case("Base model", records)]
        made += [Case("Base model (instructed)", records, style="full", seed=seed)
                 for seed in seeds]
        for key, name, joint in (("ft", "FT-L", False), ("calinet", "CaliNet", True),
                                 ("grace", "GRACE", False)):
            chosen = tuple((settings or {}).get(key, {}).items())
            case = Case(name, records, key=key, settings=chosen)
            fair = replace(case, together=records if joint else ())
            published = replace(case, together=learned) if joint or task not in trained else case
            made += [published]
            if task not in trained:
                made += [replace(fair, editor=f"{name} (fair)")]
    return [replace(case, fluency=fluency if case.records[0].topic else 0) for case in made]


def evaluate(cases, model="pocket", *, out_dir="results/scores", editors="results/editors"):
    """Score Cases on a model: a DataFrame with one row per record, editor and metric.

    Columns: editor, seed (-1 where nothing is drawn or trained), task, case_id, metric, exact,
    token, value. exact and token are means over the record's questions, see `score`; value is what
    the paper shows: token for Loc and Port, else exact. Missing hypernetworks are trained.
    Every case is cached as out_dir/<id>.parquet, whose id tells model, editor and records.
    """
    cases = list(cases)
    paths = [Path(out_dir) / f"{identifier(case, model, editors)}.parquet" for case in cases]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    # cases with equal questions one after another, so that the unedited model answers them once
    missing.sort(key=lambda index: sha256_text(*_questions(cases[index])))
    net, tok = load(model) if missing else (None, None)
    joint = {}      # edits that several cases share
    asked = None
    for index in progress.bar(missing, "scores"):
        case = cases[index]
        if _questions(case) != asked:
            asked = _questions(case)
            batches = [prepare(net, tok, asked[start:start + AT_ONCE])
                       for start in range(0, len(asked), AT_ONCE)]
            before = [read(net, batch) for batch in batches]
        if case.together:
            key = replace(case, editor="", records=(), fluency=0)
            joint[key] = joint.get(key) or edits_of(net, tok, case, [0], model, editors)[0]
        tables = []
        for number, batch in enumerate(batches):
            records = case.records[number * AT_ONCE:(number + 1) * AT_ONCE]
            edits = [joint[key]] * len(records) if case.together else \
                edits_of(net, tok, case, records, model, editors)
            tables.append(score(batch, before[number], read(net, batch, edits)))
            if case.fluency:
                tables.append(fluency(net, tok, batch.records, edits, case.seed, case.fluency))
        with atomic(paths[index]) as tmp:
            pd.concat(tables).to_parquet(tmp, index=False)
    seeds = [case.seed if case.network or case.style else -1 for case in cases]
    tables = [pd.read_parquet(path).assign(editor=case.editor, seed=seed)
              for path, case, seed in zip(paths, cases, seeds)]
    rows = pd.concat(tables, ignore_index=True)
    rows["value"] = rows["token"].where(rows["metric"].isin(TOKEN_METRICS), rows["exact"])
    return rows[["editor", "seed", "task", "case_id", "metric", "exact", "token", "value"]]


def identifier(case, model="pocket", editors="results/editors"):
    """Give equal models, editors, records and instructions the same id, whatever their names."""
    if not case.records:
        raise ValueError(f"{case.editor}: there are no records")
    _, settings = _editor(case, model, "")
    network = sha256(trained_editors.train(case.network, editors)) if case.network else ""
    edited = _instructed(case, case.together or case.records)
    parts = (FORMAT, files_hash(model), network, case.key, settings, edited, _questions(case),
             case.seed, case.fluency, bool(case.together))
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
    facts = [record_as_fact(record, case.seed) for record in instructed]
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


def _questions(case):
    """The records of a Case as they are asked."""
    return _instructed(case, case.records, case.question_style)


def _instructed(case, records, style=""):
    """Records behind the case's instruction, in another style if one is named."""
    config = case.network or HypernetworkConfig(style="none")
    return trained_editors.instructed(config, records, style=style or case.style, seed=case.seed,
                                      description=case.description)
