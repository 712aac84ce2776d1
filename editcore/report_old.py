"""Keep what notebooks called before `figures.show` and `report.provenance`; goes with the last."""

import os
import platform
from pathlib import Path

from editcore import figures
from editcore.pages import ROOT
from editcore.report import provenance


def home():
    """Return the repository's root."""
    return ROOT


def show(figure, caption, alt, name=None):
    """Show a figure as figures.show does."""
    figures.show(figure, caption, alt, name=name)


def declare(*paths):
    """FileNotFoundError for a file that was not made."""
    missing = [str(path) for path in paths if not Path(path).exists()]
    if missing:
        raise FileNotFoundError(f"declared but not made: {', '.join(missing)}")


def stamp(root):
    """Return {what: text} of where results come from."""
    lines = provenance()["made from"].to_dict()
    return {"commit": lines["code"], "versions": f"Python {platform.python_version()}, "
            f"{lines['versions']}", "device": f"{os.cpu_count()} cores"}
