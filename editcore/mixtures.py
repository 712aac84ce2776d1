"""Mixtures of tasks in; their names, the paper's values, and what mixtures are said to do, as claims, out.

    named = lineups.read(lineups.FILE, "subsets")       # names "RCS, full": tasks by LETTERS, then the style
    rows = contenders.evaluate_all(given, contenders.cases_of(named, records))
    found = orderings.verdicts(rows, claims())
"""

import itertools

from editcore import orderings
from editcore.orderings import Claim
from editcore.parting import PAPER as GROWTH

TASKS = {"R": "recent", "C": "counterfact", "S": "convsent"}
LETTERS = {letter: orderings.TASKS[task] for letter, task in TASKS.items()}
SUBSETS = tuple("".join(part) for size in (1, 2, 3) for part in itertools.combinations(LETTERS, size))
GROWN = ("R", "RC", "RCS")      # of the paper's figure 4 c, which trains with instructions


def words_of(subset):
    """ "Recent + CounterFact" of "RC"."""
    return " + ".join(LETTERS[letter] for letter in subset)


def paper(subset, task, metric):
    """The paper's value of figure 4 c, %, or None where it shows none."""
    return GROWTH[metric, task][GROWN.index(subset)] if (metric, task) in GROWTH and subset in GROWN else None


def claims(full="full", none="none"):
    """What is said of mixtures: a task that is trained on is done better, more tasks help a held-out one, and so do

    instructions.
    """
    made = []
    for letter, task in TASKS.items():
        metrics = ("Rel",) if letter == "S" else ("Rel", "Gen")
        for subset in (one for one in SUBSETS if letter in one and len(one) > 1):
            rest = subset.replace(letter, "")
            made += [Claim(f"{LETTERS[letter]}, {metric}: {subset} > {rest}", "Training on a task helps it", task,
                           metric, f"{subset}, {full}", f"{rest}, {full}", paper=_gain(rest, subset, task, metric))
                     for metric in metrics]
    for fewer, more in itertools.permutations(SUBSETS, 2):
        if set(fewer) < set(more) and len(more) == len(fewer) + 1:
            made += [Claim(f"ZsRE, {metric}: {more} > {fewer}", "One more task helps the held-out one", "zsre", metric,
                           f"{more}, {full}", f"{fewer}, {full}", paper=_gain(fewer, more, "zsre", metric))
                     for metric in ("Rel", "Gen")]
    made += [Claim(f"ZsRE, {metric}: {subset} with > without", "Instructions help the held-out one", "zsre", metric,
                   f"{subset}, {full}", f"{subset}, {none}") for subset in SUBSETS for metric in ("Rel", "Gen")]
    return made


def _gain(fewer, more, task, metric):
    """The paper's gain in points from one subset to another; NaN where it shows one of them only."""
    low, high = (paper(subset, task, metric) for subset in (fewer, more))
    return float("nan") if None in (low, high) else high - low
