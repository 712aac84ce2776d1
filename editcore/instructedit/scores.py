"""A model, records of the editing tasks and an edit for each in; reliability, generality, locality, portability out.

    sheet = prepare(model, tok, records)            # once: records with their instructions, see `instructions`
    before = read(model, sheet)                     # the unedited model
    rows = score(sheet, before, read(model, sheet, edits))      # edits[i] in place for the questions of records[i]

Every record is asked with its own edit alone in the model, but many records go through each pass (`rowwise`), and all
that one record is asked is one row: a tree of its prompts and their continuations, of which every token sees those that
lead to it. What comes out is what editing, asking and undoing record after record gives, up to rounding.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from editcore import generate, progress
from editcore.editors import EDITORS, configure
from editcore.files import atomic, sha256, sha256_text
from editcore.instructedit import examples, instructions, trained_editors
from editcore.instructedit.batched_edits import each_row
from editcore.instructedit.trained_editors import HypernetworkConfig
from editcore.likelihood import LOGITS
from editcore.metrics import entropy
from editcore.model import load, max_length
from editcore.study.run import model_files_hash
from editcore.suffix import fused
from editcore.tokens import batches, check_lengths, encode, pad, target_ids

METRICS = ("Rel", "Gen", "Loc", "Port", "Fluency")
SAME, OPPOSITE = "same", "opposite"     # replies of the wanted sentiment and of the other


@dataclass(frozen=True)
class Question:
    """One prompt of one record and the continuations that are read after it."""

    record: int         # index of the record
    metric: str         # of METRICS, or SAME or OPPOSITE
    kind: str           # of a locality or portability question; "" for others
    first: int          # its first (prompt, continuation) pair
    count: int          # and how many it has


@dataclass(frozen=True)
class Tree:
    """All that one record is asked: a token a node, each behind its parent."""

    ids: list           # (T,) tokens
    parents: list       # (T,) nodes that they follow; -1 begins a text
    asked: list         # (T,) bool, whether a prompt ends here
    wanted: list        # (node that predicts, token, place among the tokens of all pairs)


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    owner: tuple            # (B,) the record of each row
    ids: torch.Tensor       # (B, T) right-padded
    depth: torch.Tensor     # (B, T) tokens before each one: its position
    sees: torch.Tensor      # (B, T, T) bool, whether token t (dim 1) sees token s (dim 2)
    asked: torch.Tensor     # (B, T) bool, the last token of each prompt
    place: torch.Tensor     # (P,) positions b * T + t that predict wanted tokens
    pick: torch.Tensor      # (E,) which of them predicts the token
    token: torch.Tensor     # (E,) the wanted token
    entry: np.ndarray       # (E,) its place among the tokens of all pairs


@dataclass(frozen=True)
class Sheet:
    """All questions about some records and the passes that answer them."""

    records: tuple
    questions: tuple        # of Question, in the records' order
    batches: tuple          # of Batch
    starts: np.ndarray      # (n,) first token of each pair
    sizes: np.ndarray       # (n,) tokens of each pair


@dataclass(frozen=True)
class Read:
    """What a model says at every wanted token of a Sheet."""

    logp: np.ndarray        # (E,) float64, log P of the wanted token, teacher-forced
    best: np.ndarray        # (E,) the most likely token
    right: np.ndarray       # (E,) bool, whether that is the wanted one


def texts_of(record):
    """[(metric, kind, prompt, continuations)] of a record.

    Of a locality question one answer is read, of another topic's replies all; of a portability question all answers.
    """
    follows = [("Port", ask.kind, ask.prompt, ask.answers) for ask in record.portability]
    stays = [("Loc", ask.kind, ask.prompt, ask.answers if record.topic else ask.answers[:1])
             for ask in record.locality]
    if record.topic:
        return [(SAME, "", record.prompt, record.wanted), (OPPOSITE, "", record.prompt, record.unwanted), *stays]
    again = [("Gen", "", prompt, record.wanted) for prompt in record.rephrase]
    return [("Rel", "", record.prompt, record.wanted), *again, *stays, *follows]


def prepare(model, tok, records, max_tokens=4096):
    """The Sheet of records, valid for this model; ValueError names a record with a row longer than the model."""
    found = [(index, *one) for index, record in enumerate(records) for one in texts_of(record)]
    prompts = {text: None for *_, text, _ in found}
    prompts = dict(zip(prompts, map(tuple, encode(tok, list(prompts)))))
    targets = {answer: None for *_, answers in found for answer in answers}
    targets = {text: tuple(target_ids(tok, text)) for text in targets}
    questions, pairs = [], []
    for index, metric, kind, text, answers in found:
        questions.append(Question(index, metric, kind, len(pairs), len(answers)))
        pairs += [(index, prompts[text], targets[answer]) for answer in answers]
    check_lengths([prompt + target[:-1] for _, prompt, target in pairs],
                  [f"record {records[index].case_id}" for index, *_ in pairs], max_length(model))
    sizes = np.array([len(target) for *_, target in pairs], dtype=np.int64)
    starts = np.concatenate([[0], sizes.cumsum()[:-1]]).astype(np.int64)
    trees = [tree([(*pairs[i][1:], starts[i]) for one in questions if one.record == index
                   for i in range(one.first, one.first + one.count)]) for index in range(len(records))]
    device = next(model.parameters()).device
    made = tuple(_laid(trees, group, device) for group in batches([len(one.ids) for one in trees], max_tokens))
    return Sheet(tuple(records), tuple(questions), made, starts, sizes)


def tree(pairs):
    """The Tree of (prompt ids, target ids, place of the target's first token) triples; what they share is there once.

    A token that ends a prompt is another node than the same token on the way to a longer one, as it is looked up in
    codebooks.
    """
    nodes, made = {}, Tree([], [], [], [])
    for prompt, target, place in pairs:
        node = -1
        for t, token in enumerate(prompt + target[:-1]):
            key = node, token, t == len(prompt) - 1
            if key not in nodes:
                nodes[key] = len(made.ids)
                made.ids.append(token)
                made.parents.append(node)
                made.asked.append(key[2])
            node = nodes[key]
            if t >= len(prompt) - 1:
                made.wanted.append((node, target[t - len(prompt) + 1], place + t - len(prompt) + 1))
    return made


def _laid(trees, group, device):
    """The Batch of the trees of the records in `group`."""
    ids, mask = pad([trees[index].ids for index in group])
    sees, depth = torch.eye(ids.shape[1], dtype=torch.bool).repeat(len(group), 1, 1), torch.zeros_like(ids)
    asked, wanted = torch.zeros_like(mask, dtype=torch.bool), []
    for b, one in enumerate(trees[index] for index in group):
        for node, parent in enumerate(one.parents):
            if parent >= 0:
                sees[b, node] |= sees[b, parent]
        depth[b] = sees[b].sum(1) - 1
        asked[b, :len(one.asked)] = torch.tensor(one.asked)
        wanted += [(b * ids.shape[1] + node, token, place) for node, token, place in one.wanted]
    nodes, tokens, entry = map(np.array, zip(*wanted))
    place, pick = np.unique(nodes, return_inverse=True)
    tensors = ids, depth, sees, asked, *map(torch.from_numpy, (place, pick, tokens))
    return Batch(tuple(group), *(one.to(device) for one in tensors), entry)


@torch.no_grad()
def read(model, sheet, edits=None):
    """The Read of a Sheet, with edits[i] (a Delta, a Patch or None) in place for the questions of record i.

    Codebooks are looked up at the prompt's last token, where published GRACE looks. None: the model as it is.
    """
    edits = edits or [None] * len(sheet.records)
    if len(edits) != len(sheet.records):
        raise ValueError(f"taskscores: {len(edits)} edits for {len(sheet.records)} records")
    total = int(sheet.sizes.sum())
    found = Read(np.empty(total), np.empty(total, dtype=np.int64), np.empty(total, dtype=bool))
    for batch in sheet.batches:
        with fused(model), each_row(model, edits, batch.owner, batch.asked):
            logp, best = _said(model, batch)
        found.logp[batch.entry] = logp.double().cpu().numpy()
        found.best[batch.entry] = best.cpu().numpy()
        found.right[batch.entry] = (best == batch.token).cpu().numpy()
    return found


def _said(model, batch):
    """(log P of each wanted token (E,), most likely token there (E,)) of one pass."""
    inputs = model.get_input_embeddings()(batch.ids)
    least = torch.finfo(inputs.dtype).min
    mask = torch.zeros(batch.sees.shape, dtype=inputs.dtype, device=inputs.device).masked_fill(~batch.sees, least)
    hidden = model.base_model(inputs_embeds=inputs, attention_mask=mask[:, None], position_ids=batch.depth,
                              use_cache=False).last_hidden_state.flatten(0, 1)[batch.place]
    head, wide = model.get_output_embeddings(), torch.promote_types(inputs.dtype, torch.float32)
    logp, best = torch.empty(len(batch.pick), dtype=wide, device=hidden.device), torch.empty_like(batch.token)
    limit = max(1, LOGITS // model.config.vocab_size)
    for first in range(0, len(hidden), limit):
        logits = head(hidden[first:first + limit]).to(wide)
        inside = (batch.pick >= first) & (batch.pick < first + limit)
        rows = batch.pick[inside] - first
        logp[inside] = logits[rows, batch.token[inside]] - logits.logsumexp(-1)[rows]
        best[inside] = logits.argmax(-1)[rows]
    return logp, best


def score(sheet, before, after):
    """DataFrame with a row a question: task, case_id, metric, kind, value_exact, value_token; shares from 0 to 1.

    Rel, Gen, Port: whether all tokens of the target are the most likely ones, teacher-forced (exact), and the share
    of them that are (token); Port takes the best of a question's answers. Loc: whether the most likely tokens at all
    answer positions are those of the unedited model `before`, and the share; several replies are averaged. ConvSent:
    Rel = z_sent z_topic with z_sent = σ(mean log p wanted − mean log p unwanted) and z_topic = min(1, exp(mean log p
    wanted − the same before)), means over replies of the mean over tokens (arXiv:2206.06520); z_sent and z_topic have
    rows too, the same value in both columns. Numbers that are not finite score 0.
    """
    mean, nll = _per_pair(sheet), {}
    hits = {"exact": _all(sheet, after.right), "token": mean(after.right)}
    stays = {"exact": _all(sheet, after.best == before.best), "token": mean(after.best == before.best)}
    then, now = mean(before.logp), mean(after.logp)
    rows = []
    for one in sheet.questions:
        part, record = slice(one.first, one.first + one.count), sheet.records[one.record]
        if one.metric in (SAME, OPPOSITE):
            nll[one.record, one.metric] = now[part].mean(), then[part].mean()
            continue
        pick, source = (np.mean, stays) if one.metric == "Loc" else (np.max, hits)
        rows.append({"record": one.record, "task": record.task, "case_id": record.case_id, "metric": one.metric,
                     "kind": one.kind, **{f"value_{name}": float(pick(value[part])) for name, value in source.items()}})
    for index, record in enumerate(sheet.records):
        if (index, SAME) in nll:
            rows += [{"record": index, "task": record.task, "case_id": record.case_id, "metric": name, "kind": "",
                      "value_exact": value, "value_token": value}
                     for name, value in sentiment(*nll[index, SAME], nll[index, OPPOSITE][0]).items()]
    rows = pd.DataFrame(rows).sort_values("record", kind="stable", ignore_index=True)
    return rows.drop(columns="record")


def sentiment(now, before, opposite):
    """{"Rel", "z_sent", "z_topic"} of the mean log p of the wanted replies now and before, and of the opposite now."""
    with np.errstate(over="ignore", invalid="ignore"):
        z_sent, z_topic = 1 / (1 + np.exp(opposite - now)), min(1.0, np.exp(now - before))
    return {name: float(np.nan_to_num(value)) for name, value in
            (("Rel", z_sent * z_topic), ("z_sent", z_sent), ("z_topic", z_topic))}


def fluency(model, tok, records, edits, seed=0, n_new=48):
    """Rows of metric "Fluency": the generation entropy of `n_new` tokens sampled (top-k 5) after each record's prompt.

    Of the continuation alone, so that an instruction before the prompt does not count as text of the model.
    """
    order = sorted(range(len(records)), key=lambda i: len(encode(tok, [records[i].prompt])[0]))     # as rows are run
    # rows with different edits share no beginning, so one more row begins otherwise than all
    begin, draw = tok.decode(tok("a")["input_ids"][:1]), torch.Generator().manual_seed(seed)
    at_once, rows = max(1, 8192 // max_length(model) - 1), []
    for start in range(0, len(order), at_once):
        part = order[start:start + at_once]
        with fused(model), each_row(model, [None, *(edits[i] for i in part)], list(range(len(part) + 1))):
            made = generate.texts(model, tok, [begin, *(records[i].prompt for i in part)], n_new, 5, draw)
        rows += [(i, entropy([text])) for i, text in zip(part, made[1:])]
    return pd.DataFrame([{"task": records[i].task, "case_id": records[i].case_id, "metric": "Fluency", "kind": "",
                          "value_exact": value, "value_token": value} for i, value in sorted(rows)])


def _per_pair(sheet):
    """The function that averages values of tokens over each pair."""
    return lambda values: np.add.reduceat(values.astype(float), sheet.starts) / sheet.sizes


def _all(sheet, values):
    """(n,) 1.0 where the values of all tokens of a pair are true."""
    return np.minimum.reduceat(values.astype(float), sheet.starts)


# Editors on test records ---------------------------------------------------------------------

FORMAT = 1          # raise it when the same case no longer gives the same scores
TOKEN_METRICS = ("Loc", "Port")     # which the paper counts by token; whole targets elsewhere
AT_ONCE = 64        # records whose edits are held at a time


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
            for name, config in editors for records in tests.values()]


def main_cases(editors, tests, *, fluency=48, settings=None):
    """The Cases of the main table: trained `editors`, the base model, FT-L, CaliNet, GRACE.

    tests: {task: records}; settings: {key: {field: value}}. CaliNet learns all records of the
    trained tasks at once, the others each record alone. As published, FT-L, CaliNet and GRACE are
    asked about a task that nobody was trained on (zsRE) after learning the other tasks; under the
    name "... (fair)" they learn its records.
    "Base model (instructed)" is a control: what the words of InstructEdit do without an edit.
    """
    trained = {task for _, config in editors for task in config.tasks}
    learned = tuple(record for task in tests if task in trained for record in tests[task])
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

    Columns: editor, seed (-1 where nothing is drawn or trained), task, case_id, metric, exact, token,
    value. exact and token are means over the record's questions; value is the one that the paper shows:
    token for Loc and Port, else exact. See `score` for the metrics. Hypernetworks that are not there are
    trained. Every case is cached as out_dir/<id>.parquet, whose id tells model, editor and records.
    """
    cases = list(cases)
    paths = [Path(out_dir) / f"{identifier(case, model, editors)}.parquet" for case in cases]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    # cases with equal questions one after another, so that the unedited model answers them once
    missing.sort(key=lambda index: sha256_text(*_questions(cases[index])))
    net, tok = load(model) if missing else (None, None)
    joint, asked, sheets = {}, None, []
    for index in progress.bar(missing, "scores"):
        case = cases[index]
        if _questions(case) != asked:
            asked = _questions(case)
            sheets = [prepare(net, tok, asked[start:start + AT_ONCE])
                      for start in range(0, len(asked), AT_ONCE)]
            sheets = [(sheet, read(net, sheet)) for sheet in sheets]
        rows = _score_case(net, tok, case, sheets, joint, (model, editors))
        with atomic(paths[index]) as tmp:
            rows.to_parquet(tmp, index=False)
    seeds = [case.seed if case.network or case.style else -1 for case in cases]
    tables = [pd.read_parquet(path).assign(editor=case.editor, seed=seed)
              for path, case, seed in zip(paths, cases, seeds)]
    rows = pd.concat(tables, ignore_index=True)
    return rows[["editor", "seed", "task", "case_id", "metric", "exact", "token", "value"]]


def identifier(case, model="pocket", editors="results/editors"):
    """Give equal models, editors, records and instructions the same id, whatever their names are."""
    if not case.records:
        raise ValueError(f"{case.editor}: there are no records")
    network = sha256(trained_editors.train(case.network, editors)) if case.network else ""
    settings = _editor(case, model, "")[1]
    edited = _instructed(case, case.together or case.records, case.style)
    plain = replace(case, editor="", records=(), network=None, settings=(), together=())
    parts = (FORMAT, model_files_hash(model), network, settings, edited, _questions(case), plain,
             bool(case.together))
    name = case.network.editor if case.network else case.key or "base"
    return f"{name}-{sha256_text(*parts)[:16]}"


def edits_of(model, tok, case, records, model_name="pocket", editors="results/editors"):
    """One Delta or Patch per record, each made alone on the model; None where the case has no editor."""
    editor, config = _editor(case, model_name, editors)
    if editor is None:
        return [None] * len(records)
    facts = [examples.asked(record, str, case.seed)
             for record in _instructed(case, records, case.style)]
    return editor.edit_each(model, tok, facts, config, editor.prepare(model, tok, config, None))


def _joint_edit(model, tok, case, model_name, editors):
    """The edit that teaches all records of case.together at once."""
    editor, config = _editor(case, model_name, editors)
    facts = [examples.asked(record, str, case.seed)
             for record in _instructed(case, case.together, case.style)]
    return editor.edit(model, tok, facts, config, editor.prepare(model, tok, config, None))


def _score_case(model, tok, case, sheets, joint, names):
    """Rows of one Case: task, case_id, metric, exact, token, value; joint keeps edits for later ones."""
    tables = []
    key = (case.key, case.network, case.settings, case.style, case.seed, case.together)
    if case.together and key not in joint:
        joint[key] = _joint_edit(model, tok, case, *names)
    for number, (sheet, before) in enumerate(sheets):
        records = case.records[number * AT_ONCE:(number + 1) * AT_ONCE]
        edits = [joint[key]] * len(records) if case.together else \
            edits_of(model, tok, case, records, *names)
        unedited = all(edit is None for edit in edits)
        tables.append(score(sheet, before, before if unedited else read(model, sheet, edits)))
        if case.fluency:
            tables.append(fluency(model, tok, sheet.records, edits, case.seed, case.fluency))
    rows = pd.concat(tables).rename(columns={"value_exact": "exact", "value_token": "token"})
    rows = rows.groupby(["task", "case_id", "metric"], sort=False)[["exact", "token"]].mean()
    rows = rows.reset_index()
    return rows.assign(value=rows["token"].where(rows["metric"].isin(TOKEN_METRICS), rows["exact"]))


def _editor(case, model_name, editors):
    """(Editor, its settings) of a case, (None, None) without one; editors "": before its training."""
    if case.network is None:
        if not case.key:
            return None, None
        return EDITORS.get(case.key), configure(case.key, dict(case.settings), model_name)
    if case.key:
        raise ValueError(f"{case.editor}: key {case.key!r} and a network; give one of them")
    config, _ = trained_editors.configured(trained_editors.check(case.network))
    if editors:
        config = replace(config, network=str(trained_editors.train(case.network, editors)))
    return EDITORS[case.network.editor], config


def _questions(case):
    """The records of a Case as they are asked."""
    return _instructed(case, case.records, case.question_style or case.style)


def _instructed(case, records, style):
    """Records behind the case's instruction in the frame of `style` ("": its network's own, or none)."""
    network = case.network
    style = style or (network.style if network else "none")
    texts = trained_editors.descriptions_of(network) if network else instructions.DESCRIPTIONS
    n_seen = network.n_descriptions if network else instructions.SEEN
    numbers = [instructions.drawn(record, case.seed, n_seen) if case.description < 0
               else case.description for record in records]
    return tuple(instructions.instructed(record, number, style, texts)
                 for record, number in zip(records, numbers))
