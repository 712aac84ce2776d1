"""editcore.mixtures: all subsets, the paper's steps with their signs, and claims that name systems of the grid."""

import math

import pytest

from editcore import mixtures
from editcore.instructedit import contenders, lineups
from editcore.instructedit.records import EditRecord


def test_subsets_and_words():
    assert mixtures.SUBSETS == ("R", "C", "S", "RC", "RS", "CS", "RCS")
    assert mixtures.words_of("RS") == "Recent + ConvSent"
    named = lineups.read(lineups.FILE, "subsets")
    assert {one.name for one in named} == {f"{subset}, {style}" for subset in mixtures.SUBSETS
                                           for style in ("full", "none")}
    for one in named:
        subset, style = one.name.split(", ")
        assert one.system.tasks == tuple(mixtures.TASKS[letter] for letter in subset) and one.system.style == style


def test_the_papers_steps():
    found = {one.text: one for one in mixtures.claims()}
    assert found["ZsRE, Rel: RC > R"].paper == pytest.approx(50.0 - 6.2)
    assert found["ZsRE, Rel: RCS > RC"].paper == pytest.approx(82.8 - 50.0)
    assert math.isnan(found["ZsRE, Rel: CS > C"].paper) and math.isnan(found["Recent, Rel: RC > C"].paper)
    assert mixtures.paper("RC", "counterfact", "Gen") == 56.2 and mixtures.paper("RS", "recent", "Rel") is None


def test_claims_compare_systems_of_the_grid_on_tasks_they_differ_in():
    named = {one.name: one.system for one in lineups.read(lineups.FILE, "subsets")}
    every = mixtures.claims()
    assert len({one.text for one in every}) == len(every) == 15 + 18 + 14
    for one in every:
        more, less = named[one.more], named[one.less]
        if one.family == "Training on a task helps it":
            assert set(more.tasks) - set(less.tasks) == {one.task} and (one.task, one.metric) != ("convsent", "Gen")
        else:
            assert one.task == "zsre" and one.task not in more.tasks
            assert len(more.tasks) - len(less.tasks) == (0 if one.family.startswith("Instr") else 1)


def test_cases_ask_every_task_of_every_system():
    named = lineups.read(lineups.FILE, "balance", seed=[0, 2])
    records = {task: [EditRecord(0, task, "Orla", "Orla is", "Rome")] for task in ("recent", "zsre")}
    found = contenders.cases_of(named, records)
    assert len(found) == 2 * len(named) and {one.trial.seed for one in found} == {0, 2}
