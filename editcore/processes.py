"""Do jobs in processes that end with this one, and say which of them was killed."""

import contextlib
import os
import signal
import threading
from multiprocessing import connection, get_context, parent_process

from editcore import progress

DONE = None     # what a process sends at the end of a job


def free_threads(workers=1):
    """Return each worker's threads: its share of idle cores, at least 1, or OMP_NUM_THREADS."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted):
        return int(wanted)
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    return max(1, int(cores - busy + 0.5) // workers)


def in_processes(work, jobs, workers=2):
    """Do jobs, `workers` at a time; yields (name, item) for all that work(*arguments) yields.

    jobs: {name: arguments}. An exception that ends a job is an item too, and so is the death of its
    process, as a RuntimeError. Close the generator (contextlib.closing) to end the processes early.
    """
    spawn = get_context("spawn")
    waiting = list(jobs.items())
    busy = {}   # {pipe: [process, name of its job]}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                name, arguments = waiting.pop(0)
                pipe, end = spawn.Pipe()
                process = spawn.Process(target=_serve, args=(end, work))
                process.start()
                end.close()     # so that the pipe ends with the process
                busy[pipe] = [process, name]
                pipe.send(arguments)
            for pipe in connection.wait(busy):
                process, name = busy[pipe]
                try:
                    item = pipe.recv()
                except (EOFError, OSError):
                    del busy[pipe]
                    process.join()
                    code = process.exitcode
                    if code == -signal.SIGTERM:     # the whole is to end
                        waiting.clear()
                    cause = f" by signal {signal.Signals(-code).name}" if code < 0 else ""
                    yield name, RuntimeError(f"its process was ended{cause}; the same command "
                                             "goes on from there")
                    continue
                if item is not DONE:
                    yield name, item
                elif waiting:
                    busy[pipe][1], arguments = waiting.pop(0)
                    pipe.send(arguments)
                else:
                    pipe.send(DONE)
                    del busy[pipe]
                    process.join()
    finally:
        for process, _ in busy.values():
            process.terminate()
        for process, _ in busy.values():
            process.join()


def _serve(pipe, work):
    """Do the jobs that come through the pipe, until DONE comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the parent's, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    progress.show_log()
    with contextlib.suppress(EOFError):
        while (arguments := pipe.recv()) is not DONE:
            try:
                for item in work(*arguments):
                    pipe.send(item)
            except Exception as error:
                pipe.send(_plain(error))
            pipe.send(DONE)


def _plain(error):
    """Return an exception that surely passes a pipe."""
    if type(error) in (ValueError, FileNotFoundError, OSError, RuntimeError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent():
    """A killed parent must not leave a worker that writes what the next start takes up."""
    parent_process().join()
    os._exit(1)
