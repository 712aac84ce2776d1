"""Show how far a loop has come: a bar where somebody watches, else a plain line now and then."""

import logging
import os
import sys
import time

from tqdm.auto import tqdm

log = logging.getLogger("editcore")
EVERY = 30      # seconds between plain lines


def bar(items, label, total=None, start=0, *, delay=0):
    """Yield `items` and show progress; `total` counts from 0, a resumed loop begins at `start`.

    A terminal and an open notebook get a bar that goes away (after `delay` seconds: for inner
    loops, most of which are short), all else a line every 30 seconds.
    """
    total = start + len(items) if total is None else total
    if sys.stderr.isatty() or (_in_notebook() and "JPY_SESSION_NAME" in os.environ):
        yield from tqdm(items, desc=label, total=total, initial=start, leave=False, delay=delay)
        return
    began = time.monotonic()
    shown = 0       # seconds after `began`
    for done, item in enumerate(items, start + 1):
        yield item
        seconds = time.monotonic() - began
        if seconds - shown >= EVERY:
            shown = seconds
            left = seconds / (done - start) * max(total - done, 0)
            say(f"{label}: {done} of {total}, about {left:.0f} s left")


def say(text):
    """Write a line for the reader."""
    _stream().write(text + "\n")


def show_log():
    """Show the package's log lines; for command line, notebooks and workers, never on import."""
    if not log.handlers:
        handler = logging.StreamHandler(_stream())
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def _stream():
    """Standard output in a notebook, where errors have a red ground; else standard error."""
    return sys.stdout if _in_notebook() else sys.stderr


def _in_notebook():
    return "ipykernel" in type(sys.stdout).__module__
