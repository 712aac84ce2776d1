"""A model, records of the editing tasks and an edit for each in; reliability, generality, locality, portability out.

    sheet = prepare(model, tok, records)            # once: records with their instructions, see `instructions`
    before = read(model, sheet)                     # the unedited model
    rows = score(sheet, before, read(model, sheet, edits))      # edits[i] in place for the questions of records[i]

Every record is asked with its own edit alone in the model, but many records go through each pass (`rowwise`), and all
that one record is asked is one row: a tree of its prompts and their continuations, of which every token sees those that
lead to it. What comes out is what editing, asking and undoing record after record gives, up to rounding.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from editcore import generate
from editcore.instructedit.batched_edits import each_row
from editcore.likelihood import LOGITS
from editcore.metrics import entropy
from editcore.model import max_length
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
