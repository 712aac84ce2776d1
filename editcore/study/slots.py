"""Names of things that one process at a time may use (GPUs, runs) in; a lock on a free one, held in a `with`, out.

    with held("results/.locks", ["gpu0", "gpu1"]) as index:     # waits until one of the two is free
        ...
The locks are the operating system's (flock): those of a process that is killed are free at once.
"""

import contextlib
import getpass
import logging
import os
import tempfile
import time
from pathlib import Path


@contextlib.contextmanager
def held(folder, names, shared=False, poll=0.2):
    """Hold the first free of `names` (file names in `folder`) and yield its index; waits as long as none is free.

    shared: several processes may hold it at a time, none while another holds it alone. poll: seconds between tries.
    Raises ValueError without names and OSError where the file system knows no locks.
    """
    if not names:
        raise ValueError(f"{folder}: nothing to lock")
    Path(folder).mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        for index, name in enumerate(names):
            handle = os.open(Path(folder) / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if _lock(handle, shared):
                    yield index
                    return
            finally:
                os.close(handle)    # and with it the lock
        if not waited:
            logging.getLogger("editcore").info("waiting for another process that uses %s", ", ".join(map(str, names)))
        waited = True
        time.sleep(poll)


def machine_folder():
    """Folder of this user's locks on this machine: never on a disk that machines share."""
    return Path(tempfile.gettempdir()) / f"editcore-slots-{getpass.getuser()}"


def _lock(handle, shared):
    """Whether the open file could be locked at once."""
    import fcntl  # not everywhere; without it only what asks for locks fails

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
