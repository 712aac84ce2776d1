"""Show single test records: what an editor's model answers to each question, before and after.

    rows = table(scores.cases([("InstructEdit", config)], tests), "pocket", 30)
"""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pandas as pd

from editcore import progress
from editcore.files import atomic
from editcore.instructedit import scores
from editcore.instructedit.questions import SAME, kinds_of, prepare, questions_of, read
from editcore.model import load

FORMAT = 1      # raise it when the same Case no longer gives the same rows
PARTS = {"Loc": "locality: ", "Port": "portability: "}      # before the kind of such a question


def table(cases, model="pocket", first=30, *, out_dir="results/records",
          editors="results/editors"):
    """Tabulate the answers to the first so many records of Cases, one row per question.

    Columns: task, case_id, editor, seed and those of `answers`; sorted by record, question and
    editor. Each Case is cached as a file in out_dir. Missing hypernetworks are trained.
    """
    loaded = ()
    tables = []
    for case in progress.bar(list(cases), "single records"):
        case = replace(case, records=case.records[:first])
        path = Path(out_dir) / f"{scores.identifier(case, model, editors)}-{FORMAT}.parquet"
        if not path.is_file():
            loaded = loaded or load(model)
            edits = scores.edits_of(*loaded, case, case.records, model, editors)
            with atomic(path) as tmp:
                answers(*loaded, case, scores.at_size(case, edits)).to_parquet(tmp, index=False)
        tables.append(pd.read_parquet(path))
        tables[-1].insert(2, "editor", case.editor)
        tables[-1].insert(3, "seed", case.network.seed if case.network else -1)
    rows = pd.concat(tables).rename_axis("row")     # counts the questions of a Case
    rows["place"] = rows.groupby("task", sort=False).ngroup()
    rows = rows.sort_values(["case_id", "place", "row"]).drop(columns="place")
    return rows.reset_index(drop=True)


def answers(model, tok, case, edits):
    """Read what a Case's model says to every question before and after edits[i] of record i.

    Columns: task, case_id, kind, prompt (without instruction), wanted, before, after, right. before
    and after: the most likely token at each place of the wanted answer, behind the right ones; of
    a ConvSent edit how far replies lean to the wanted sentiment (z_sent of `scores.score`). right:
    the question's score as the main table counts it, 0 to 1.
    """
    batch = prepare(model, tok, scores.as_asked(case))
    before = read(model, batch)
    after = read(model, batch, edits)
    questions = [*chain.from_iterable(map(questions_of, case.records))]
    kinds = [*chain.from_iterable(map(kinds_of, case.records))]
    scored = scores.question_scores(batch, before, after)
    leans = [part[part["metric"] == "z_sent"].set_index("question")["exact"]
             for part in (scores.question_scores(batch, before, before), scored)]
    rows = []
    shown = scored[~scored["metric"].isin(["z_sent", "z_topic"])]
    for row in shown.sort_values("question").itertuples():
        record = case.records[row.record]
        metric, prompt, texts = questions[row.question]
        kind = PARTS.get(metric, "") + kinds[row.question].replace("_", " ").lower()
        if metric == SAME:
            wanted = record.sentiment
            said = [f"{100 * lean[row.question]:.0f} % {wanted}" for lean in leans]
        else:
            wanted = texts[row.pair - batch.questions["first"][row.question]]
            place = slice(batch.starts[row.pair], batch.starts[row.pair] + batch.sizes[row.pair])
            said = [tok.decode(part.best[place], clean_up_tokenization_spaces=False).strip()
                    for part in (before, after)]
        right = row.token if metric in scores.TOKEN_METRICS else row.exact
        rows.append((record.task, record.case_id, kind, prompt, wanted, *said, right))
    return pd.DataFrame(rows, columns=["task", "case_id", "kind", "prompt", "wanted", "before",
                                       "after", "right"])
