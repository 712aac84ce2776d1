"""Do jobs in processes that end with this one, and say which of them was killed."""

import contextlib
import os
import signal
import threading
from multiprocessing import connection, get_context, parent_process

from editcore import progress

DONE = None     # what a process sends at the end of a job


def free_threads(workers=1):
    """Return how many threads each worker may use: the idle cores' share, at least 1.

    The environment variable OMP_NUM_THREADS, where it is set, says it instead.
    """
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
    process, as a RuntimeError; the other jobs go on. Close the generator (contextlib.closing) to
    end the processes early.
    """
    waiting = list(jobs.items())
    busy = {}   # {pipe: [process, name of its job]}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                name, arguments = waiting.pop(0)
                pipe, process = _started(work)
                busy[pipe] = [process, name]
                pipe.send(arguments)
            for pipe in connection.wait(busy):
                process, name = busy[pipe]
                try:
                    item = pipe.recv()
                except (EOFError, OSError):
                    del busy[pipe]
                    process.join()
                    if process.exitcode == -signal.SIGTERM:     # the whole is to end
                        waiting.clear()
                    yield name, RuntimeError(_death(process.exitcode))
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


def _started(work):
    """Start a process that waits for jobs; returns (pipe to it, process)."""
    spawn = get_context("spawn")
    pipe, end = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(end, work))
    process.start()
    end.close()     # so that the pipe ends with the process
    return pipe, process


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


def _death(code):
    cause = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else "ended"
    return f"its process {cause}; the same command goes on from there"


def _end_with_parent():
    """A killed parent must not leave a worker that writes what the next start takes up."""
    parent_process().join()
    os._exit(1)
