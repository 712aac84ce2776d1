"""editcore.progress: every item once; silent, a plain line now and then, or a bar."""

import io
import sys

import pytest

from editcore import progress


@pytest.mark.parametrize("items, total, start", [
    (range(3), None, 0), (iter("ab"), 2, 0), ([], None, 0), (range(8, 10), 10, 8)])
def test_items_pass_and_short_loops_are_silent(items, total, start, capsys):
    expected = list(items) if not hasattr(items, "__next__") else ["a", "b"]
    assert list(progress.bar(items, "work", total, start)) == expected
    assert capsys.readouterr() == ("", "")


def test_long_loops_say_how_far_they_are(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    list(progress.bar(range(8, 10), "work", total=10, start=8))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["work: 9 of 10, about 0 s left", "work: 10 of 10, about 0 s left"]


def test_notebooks_have_no_red_ground(monkeypatch, capsys):
    kernel = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(progress, "EVERY", 0)
    monkeypatch.setattr(sys, "stdout", kernel)
    list(progress.bar(range(1), "work"))
    assert "work: 1 of 1" in kernel.getvalue() and capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.bar(range(3), "work")) == [0, 1, 2]
    assert "work" in capsys.readouterr().err
