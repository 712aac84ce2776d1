"""data/manifest.toml in; a list of the real data sets, or one of them fetched or checked against what is known, out."""

import shutil
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass, fields
from pathlib import Path

from editcore.files import atomic, read_json, sha256

MANIFEST = Path(__file__).resolve().parents[1] / "data" / "manifest.toml"


@dataclass(frozen=True)
class Source:
    """One data set."""

    name: str
    about: str
    url: str        # of the file; "" if it has to be chosen by hand on `page`
    page: str       # where people read about it
    sha256: str     # of the file; "" unknown
    bytes: int      # of the file; 0 unknown
    rows: int       # records; 0 unknown
    licence: str


def manifest(path=MANIFEST):
    """{name: Source} of the manifest; FileNotFoundError or ValueError names the file and the entry."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; the data command runs in a checkout")
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from error
    wanted = {field.name: field.type for field in fields(Source) if field.name != "name"}
    for name, entry in table.items():
        if not isinstance(entry, dict) or {key: type(value) for key, value in entry.items()} != wanted:
            needed = ", ".join(f"{key} ({kind.__name__})" for key, kind in wanted.items())
            raise ValueError(f"{path}: {name} needs {needed}")
    return {name: Source(name, **entry) for name, entry in table.items()}


def known(sources, name):
    """The Source of a name; ValueError lists the names."""
    if name not in sources:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(sources)}")
    return sources[name]


def listing(sources):
    """One line a data set."""
    width = max(map(len, sources))
    return "".join(f"{one.name:{width}}  {one.rows or '?':>6} rows  {'fetch' if one.url else 'by hand':7}  "
                   f"{one.about}\n" for one in sources.values())


def describe(source):
    """All that is known of a data set, one line a field."""
    return "".join(f"{field.name:8}{getattr(source, field.name) or '?'}\n" for field in fields(source))


def check(source, path):
    """A line that says what a file is, compared with the manifest; ValueError names the file and what differs."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    found = {"sha256": sha256(path), "bytes": path.stat().st_size}
    if path.suffix == ".json":
        records = read_json(path)
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a list of records")
        found["rows"] = len(records)
    for name, value in found.items():
        wanted = getattr(source, name)
        if wanted and wanted != value:
            raise ValueError(f"{path}: {name} is {value}, but that of {source.name} is {wanted}")
    compared = [name for name in found if getattr(source, name)]
    said = ", ".join(f"{name} {value}" for name, value in found.items())
    return f"{path}: {said}; {'as known: ' + ', '.join(compared) if compared else 'nothing is known to compare with'}"


def fetch(source, path, timeout=60):
    """Download a data set to `path`, checked before it takes its place; the line of `check`.

    ValueError if it has no url or cannot be reached, with what to do instead.
    """
    path = Path(path)
    if not source.url:
        raise ValueError(f"{source.name} has to be chosen by hand on {source.page}; then: data {source.name} "
                         "--check FILE")
    with atomic(path) as tmp:
        try:
            with urllib.request.urlopen(source.url, timeout=timeout) as answer, open(tmp, "wb") as file:
                shutil.copyfileobj(answer, file)
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"{source.name}: {source.url} cannot be fetched ({reason}); fetch it where there is a "
                             f"network, then: data {source.name} --check FILE") from error
        said = check(source, tmp)
    return said.replace(str(tmp), str(path))
