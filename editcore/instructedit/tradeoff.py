"""Tell size from direction: what multiplied edits do to reliability and locality.

    rows = scores.evaluate(scores.at_sizes(cases, [0.5, 1, 2]), model)
    curves(rows)                    # mean Rel and Loc at every size
    best_sizes(validation_rows)     # the size that suits an editor
    at_locality(rows, 0.9)          # Rel where edits are as large as locality allows

Every function takes and returns DataFrames; rows are those of `scores.evaluate`, means of `value`.
"""

import numpy as np
import pandas as pd

EDITOR = ["editor", "seed"]     # one trained editor


def curves(rows, by=("editor", "seed", "task")):
    """Mean reliability and locality at each size: the columns `by`, size, Rel, Loc."""
    rows = rows[rows["metric"].isin(["Rel", "Loc"])]
    return rows.pivot_table(index=[*by, "size"], columns="metric", values="value",
                            sort=False).sort_index().reset_index().rename_axis(columns=None)


def best_sizes(rows, by=("editor", "seed")):
    """The size with the largest harmonic mean of Rel and Loc: the columns `by`, size, harmonic.

    The mean is taken in each task and averaged over the tasks of a group: give the rows of the
    tasks that an editor was trained on for one size in all of them, or "task" in `by` for each its
    own. Of equal sizes the smallest. Choose on other records than those that are compared.
    """
    table = curves(rows)
    table["harmonic"] = 2 * table["Rel"] * table["Loc"] / (table["Rel"] + table["Loc"])
    table = table.fillna({"harmonic": 0.0})     # where both are 0
    means = table.groupby([*by, "size"])["harmonic"].mean().reset_index()
    return means.loc[means.groupby(list(by))["harmonic"].idxmax()].reset_index(drop=True)


def at_locality(rows, level):
    """Rel of every record at the sizes where mean Loc is `level` or more and mean Rel is largest.

    A curve joins the means (Loc, Rel) of an editor, seed and task at neighbouring sizes by straight
    lines; the best of its points at or above the level is one of the sizes or lies between two,
    and a record's Rel there is interpolated alike. Columns: editor, seed, task, case_id, size,
    value. An editor that is below the level at all sizes is left out.
    """
    tables = []
    for (editor, seed, task), part in rows.groupby([*EDITOR, "task"], sort=False):
        table = curves(part)
        weights = _best_mixture(table["Loc"].to_numpy(), table["Rel"].to_numpy(), level)
        if weights is None:
            continue
        records = part[part["metric"] == "Rel"].pivot_table(index="case_id", columns="size",
                                                            values="value")
        values = records[table["size"]] @ weights
        tables.append(pd.DataFrame({"editor": editor, "seed": seed, "task": task,
                                    "size": weights @ table["size"], "value": values}))
    columns = [*EDITOR, "task", "case_id", "size", "value"]
    return pd.concat(tables).reset_index()[columns] if tables else pd.DataFrame(columns=columns)


def _best_mixture(loc, rel, level):
    """(k,) weights of the sizes whose mean (Loc, Rel) is the best at the level, or None."""
    points = [(rel[i], np.eye(len(loc))[i]) for i in np.flatnonzero(loc >= level)]
    for i in np.flatnonzero((loc[:-1] >= level) != (loc[1:] >= level)):
        share = (level - loc[i]) / (loc[i + 1] - loc[i])
        weights = np.zeros(len(loc))
        weights[i:i + 2] = (1 - share, share)
        points.append((weights @ rel, weights))
    return max(points, key=lambda point: point[0])[1] if points else None
