"""Show how far a loop has come: a bar where somebody watches, else a plain line now and then."""

import logging
import os
import sys
import time

from tqdm.auto import tqdm

EVERY = 30      # seconds between plain lines


def bar(items, label, total=None, start=0):
    """Yield `items` and show progress; `total` counts from 0, a resumed loop begins at `start`.

    A terminal and an open notebook (JupyterLab) get a bar that goes away; pipes, log files and
    notebooks that papermill runs get a line every 30 seconds.
    """
    total = start + len(items) if total is None else total
    notebook = "ipykernel" in type(sys.stdout).__module__
    if sys.stderr.isatty() or (notebook and "JPY_SESSION_NAME" in os.environ):
        yield from tqdm(items, desc=label, total=total, initial=start, leave=False)
        return
    began = time.monotonic()
    shown = began
    for done, item in enumerate(items, start + 1):
        yield item
        seconds = time.monotonic() - began
        if began + seconds - shown >= EVERY:
            shown = began + seconds
            left = seconds / (done - start) * max(total - done, 0)
            say(f"{label}: {done} of {total}, about {left:.0f} s left")


def say(text):
    """Write a line for the reader: standard output in a notebook (no red ground), else errors."""
    stream = sys.stdout if "ipykernel" in type(sys.stdout).__module__ else sys.stderr
    stream.write(text + "\n")
    stream.flush()


log = logging.getLogger("editcore")


def to_stderr():
    """Send log lines to standard error."""
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
