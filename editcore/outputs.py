"""Check where results are to go before any work, and know which files of a folder are ours."""

import os
import uuid
from pathlib import Path

from editcore import progress
from editcore.files import read_json, write_json

MANIFEST = ".editcore.json"     # in a folder of results: the names of the files that we wrote
DEEPEST = 100   # folders that are made for an output


def check_file(output, *inputs):
    """Return where a file really lies; ValueError if it cannot be written, or is an input."""
    path = _resolved(output)
    if path.is_dir() or str(output).endswith(("/", os.sep)):
        raise ValueError(f"-o {output}: is a folder; give a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"-o {output}: is no ordinary file")
    _refuse_inputs(output, path, inputs)
    _try_to_write(output, path.parent, path.name)
    if path.is_file():
        progress.say(f"-o {output}: already there; it will be replaced")
    return path


def check_folder(output, *inputs, new=False):
    """Return where a folder really lies; new: it must not be there yet, or be empty."""
    path = _resolved(output)
    if path.exists() and not path.is_dir():
        raise ValueError(f"-o {output}: is a file; give a folder")
    if new and path.is_dir() and any(path.iterdir()):
        raise ValueError(f"-o {output}: already there; give a new folder")
    _refuse_inputs(output, path, inputs)
    _try_to_write(output, path, "x")
    return path


def claim(folder, names):
    """Note, before they are written, which files are ours; ValueError if one there is not."""
    known = claimed(folder)
    foreign = [name for name in names if name not in known and os.path.lexists(folder / name)]
    if foreign:
        raise ValueError(f"{folder / foreign[0]}: is there already and was not written by a "
                         "report; move it away, or give another folder")
    if not known.issuperset(names):
        write_json(folder / MANIFEST, {"files": sorted(known | set(names))})


def claimed(folder):
    """Return the names of the files that are ours in a folder."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return set()
    try:
        paths = [Path(str(name)) for name in read_json(path)["files"]]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: damaged; remove it if all in its folder may go") from error
    return {str(name) for name in paths if not name.is_absolute() and ".." not in name.parts}


def _resolved(output):
    try:
        return Path(output).resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"-o {output}: cannot be followed ({error})") from error


def _refuse_inputs(output, path, inputs):
    for name in filter(None, map(str, inputs)):
        if not os.path.exists(name):
            continue
        parts = Path(name).iterdir() if os.path.isdir(name) else ()
        same = path.exists() and any(map(path.samefile, (name, *filter(Path.is_file, parts))))
        if same or os.path.isdir(name) and Path(name).resolve() in path.parents:
            raise ValueError(f"-o {output}: {name} is read as an input; give another place")


def _try_to_write(output, folder, name):
    """Write an empty file as `files.atomic` would, and remove it; folders are made later."""
    try:
        missing = 0
        while not os.path.lexists(folder):
            name = max(name, folder.name, key=len)
            folder = folder.parent
            missing += 1
        if missing > DEEPEST:
            raise OSError(0, f"{missing} folders of it are not there")
        probe = folder / f".{name}-{uuid.uuid4().hex}"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise ValueError(f"-o {output}: cannot be written ({error.strerror})") from error
