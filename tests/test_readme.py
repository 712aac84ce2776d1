"""README.md: its commands are understood, its example of an editor edits."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
import typer

import editcore
from editcore import cli, commands
from editcore.editors import EDITORS, Editor, configure
from editcore.metrics import means, measure

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


def test_readmes_editor_edits(gpt2, facts, tmp_path, monkeypatch):
    _, block = EXAMPLES
    (line,) = re.findall(r'`"nudge": (Editor\(.*\)),`', TEXT)
    assert line == 'Editor("editcore.editors.nudge")'
    (tmp_path / "nudge.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    nudge = Editor("nudge")
    monkeypatch.setitem(EDITORS, "nudge", nudge)
    model, tok = gpt2
    config = configure("nudge")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    deltas = nudge.edit_each(model, tok, facts, config, nudge.prepare(model, tok, config))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    plain, edited = [], []
    for fact, delta in zip(facts, deltas, strict=True):
        plain += measure(model, tok, [fact], ("ES",))
        with delta.applied(model):
            edited += measure(model, tok, [fact], ("ES",))
    assert means(edited)["ES"] > means(plain)["ES"]
