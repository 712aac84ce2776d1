"""A model and test records in; seconds a record to score its edit in one pass beside record after record, out.

The plain way is that of public code: a forward pass a question, before the edit and after it was added to the weights.
"""

import contextlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from editcore import bench
from editcore.editors import EDITORS, configure
from editcore.instructedit import examples, instructions
from editcore.instructedit import scores as taskscores
from editcore.instructedit.records import Ask, EditRecord, read_records
from editcore.tokens import encode, target_ids


def table(model, tok, n, name=""):
    """The bench of scoring n records with InstructEdit's prompts as text: those of the tests beside the model's folder,
    else invented ones."""
    tasks = [task for task in instructions.TITLES if (Path(name) / "editing" / f"{task}_test.json").is_file()]
    made = [scoring(model, tok, read_records(Path(name) / "editing" / f"{task}_test.json", task)[:n]) for task in tasks]
    made = made or [scoring(model, tok, [_record(fact) for fact in bench.invented(n)])]
    return pd.concat(made).to_string(index=False, float_format="{:.3g}".format)


def scoring(model, tok, records, threads=1):
    """DataFrame row: seconds a record to score an edit of each, in one pass and one after another, and the gain.

    One after another: a forward pass a prompt and continuation, before the edit and with its change added to the
    weights, which is then taken away. The edits are an untrained hypernetwork's; making them is not timed, nor is
    tokenising. difference: largest one of a score.
    """
    records = [instructions.instructed(one, instructions.drawn(one)) for one in records]
    config = configure("mend", {"network": "untrained", "rank": 8, "alpha": 1e-3})
    editor, facts = EDITORS["mend"], [examples.asked(one) for one in records]
    edits = editor.edit_each(model, tok, facts, config, editor.prepare(model, tok, config, None))
    sheet = taskscores.prepare(model, tok, records)
    pairs = [[(*encode(tok, [prompt]), target_ids(tok, answer)) for *_, prompt, answers in taskscores.texts_of(one)
              for answer in answers] for one in records]
    with bench.with_threads(threads):
        together, found = bench.timed(
            lambda: (taskscores.read(model, sheet), taskscores.read(model, sheet, edits)), model)
        apart, plain = bench.timed(lambda: _in_turn(model, pairs, edits), model)
    ways = [taskscores.score(sheet, *one)[["value_exact", "value_token"]] for one in (found, plain)]
    return pd.DataFrame([{"task": records[0].task, "records": len(records), "questions": sum(map(len, pairs)),
                          "one by one": apart / len(records), "together": together / len(records),
                          "gain": apart / together, "difference": (ways[0] - ways[1]).abs().to_numpy().max(),
                          "threads": threads}])


@torch.no_grad()
def _in_turn(model, pairs, edits):
    """(before, after): the `taskscores.Read` of the pairs of each record without and with its edit."""
    found = [], []
    for several, edit in zip(pairs, edits, strict=True):
        for place, changed in zip(found, (contextlib.nullcontext(), edit.applied(model))):
            with changed:
                for prompt, target in several:
                    logits = model(input_ids=torch.tensor([prompt + target[:-1]], device=model.device)).logits[0]
                    logits, wanted = logits[len(prompt) - 1:], torch.tensor(target, device=model.device)
                    logp, best = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0], logits.argmax(-1)
                    place.append([part.cpu().numpy() for part in (logp.double(), best, best == wanted)])
    return [taskscores.Read(*(np.concatenate(part) for part in zip(*one))) for one in found]


def _record(fact):
    """An invented EditRecord of a Fact."""
    asks = [Ask("", f"It is known that {fact.text}", (fact.target_new,))]
    far = [Ask("", bench.PROMPTS[fact.case_id % 3].replace("{}", "Bel Dar"), ("Gol",))]
    return EditRecord(fact.case_id, "recent", fact.subject, fact.text, fact.target_new, rephrase=(asks[0].prompt,),
                      locality=tuple(far), portability=tuple(asks))
