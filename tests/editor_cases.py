"""Small settings of every editor, and what they need, for tests of all of them alike."""

import random
from dataclasses import replace

import torch
from conftest import corpus

from editcore.delta import Delta, dense
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.moments import CountSettings, second_moments

CONTEXTS = ("{}", "The first. {}", "Because I know you, we read. {}")
ROME = {"layer": 1, "steps": 4}
MEMIT = {"layers": (0, 2), "lambda": 5, "steps": 4}
NETWORK = {"network": "untrained", "layers": (2, 3)}
CASES = {   # a case for every editor: a new line of EDITORS fails the tests until it has one
    "rome": ROME,
    "r-rome": ROME,
    "p-rome": ROME,
    "nas": ROME | {"anchor": 2},
    "emmet": MEMIT | {"layers": 1},
    "memit": MEMIT,
    "memit-past": MEMIT,
    "encore": MEMIT | {"ridge": 0.1, "early_stop": 2},
    "alphaedit": MEMIT | {"null_space": 0.3},
    "rect": MEMIT,
    "prune": MEMIT,
    "mend": NETWORK | {"rank": 8, "alpha": 0.01},
    "ke": NETWORK | {"hidden": 8, "width": 8, "inner": 8},
    "ft": {"epsilon": 1e-2, "steps": 2},
    "random": {"layer": 1, "norms": tuple((case, 1.0) for case in range(12))},
    "grace": {"layer": 2, "part": "mlp_in", "steps": 2, "radius": 0.01},
    "calinet": {"layers": 3, "slots": 4, "steps": 2},
}


def shuffled(count=300):
    """Texts of words in random order, so that keys fill all dimensions."""
    draw = random.Random(0)
    words = " ".join(corpus()).split()
    return tuple(" ".join(draw.choices(words, k=12)) for _ in range(count))


def ridged_moments(model, tok, layers, ridge=0.01):
    """Second moments of a few texts, made definite."""
    moments = second_moments(model, tok, corpus() * 4, layers, CountSettings(length=32))
    return replace(moments, moments={name: moment + ridge * torch.eye(len(moment))
                                     for name, moment in moments.moments.items()})


def prepared_case(editor, model, tok, facts, **changes):
    """(config, prepared) of an editor's case."""
    config = configure(editor, CASES[editor] | changes)
    inputs = EditorInputs(texts=shuffled(), contexts=CONTEXTS, pilot=tuple(facts[-2:]))
    return config, EDITORS[editor].prepare(model, tok, config, inputs)


def tensors_of(edit):
    """{name: tensor} of a Delta or a Patch."""
    if isinstance(edit, Delta):
        return {name: dense(change) for name, change in edit.changes.items()}
    return {f"{name}/{key}": value for name, part in edit.parts.items()
            for key, value in vars(part).items() if torch.is_tensor(value)}
