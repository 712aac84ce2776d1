"""An iterable in, the same items out, with a bar in a terminal or a notebook and a line per 10 % in a log."""

import logging
import sys
import time

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

log = logging.getLogger("editcore")


def bar(items, label, total=None, start=0):
    """Yield `items`, showing progress: tqdm on a terminal, else one log line per 10 % of `total` (first item: `start`).

    `total` counts the items from 0, so a resumed loop passes its first index as `start`.
    """
    total = total if total is not None else start + len(items)
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, initial=start, leave=False)
        return
    began, shown = time.monotonic(), 10 * start // max(total, 1)
    for done, item in enumerate(items, start + 1):
        yield item
        if (tenth := 10 * done // max(total, 1)) > shown:
            shown = tenth
            log.info("%s: %d of %d (%d %%), %.0f s", label, done, total, 10 * tenth, time.monotonic() - began)


def to_stderr():
    """Send the log lines to standard error; called by the command line and the notebooks, never at import."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()  # one bar of ours, not one per weight file
