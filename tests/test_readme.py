"""README.md: its commands are understood, its example of an editor edits."""

import re
import shlex
import textwrap
from pathlib import Path

import pandas as pd
import pytest
import typer

import editcore
from editcore import cli, commands
from editcore.editors import EDITORS, Editor, edit
from editcore.model import content_hash, load
from editcore.study import loop
from editcore.study.run import make_run

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)
COMMANDS = re.findall(r"^python -m editcore (.+?)(?:\s+#.*)?$", TEXT, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_readmes_commands_are_understood(command):
    words = commands.spread(shlex.split(command))
    known = typer.main.get_command(cli.app).commands
    assert known[words[0]].make_context("editcore", words[1:]).params


def test_readmes_five_lines_are_the_packages():
    five, _ = EXAMPLES
    assert textwrap.indent(five, "    ") in editcore.__doc__      # test_face runs them


def test_readmes_editor_is_one_file_and_one_line(place, facts, tmp_path, monkeypatch):
    _, block = EXAMPLES
    (line,) = re.findall(r'`"nudge": (Editor\(.*\)),`', TEXT)
    assert line == 'Editor("editcore.editors.nudge")'
    (tmp_path / "nudge.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EDITORS, "nudge", Editor("nudge"))
    run = make_run(model=str(place), editor="nudge", n_edits=6, retest_every=2, downstream_every=0,
                   untouched=0, measure=["ES"])
    rows = pd.read_parquet(loop.execute(run, tmp_path / "runs") / "rows.parquet")
    values = rows.groupby("metric")["value"].mean()
    assert values["ES_prob"] > values["before_ES_prob"] and set(rows["editor"]) == {"nudge"}
    model, tok = load(place, "cpu")
    before = content_hash(model)
    delta = edit(model, tok, facts[:1], "nudge", layer=2)
    assert list(delta.changes) == ["transformer.h.2.mlp.c_proj.bias"]
    assert content_hash(model) == before
