"""A manifest and files in; what is said of them compared with their real hashes, sizes and numbers of records."""

import json
from pathlib import Path

import pytest

from editcore import data
from editcore.files import sha256


@pytest.fixture
def source(tmp_path):
    """A data set whose url is a local file with three records."""
    (tmp_path / "there.json").write_text(json.dumps([{"a": 1}] * 3))
    url = (tmp_path / "there.json").as_uri()
    return data.Source("toy", "three records", url, "page", sha256(tmp_path / "there.json"), 30, 3, "MIT")


def changed(source, **values):
    return data.Source(**{**source.__dict__, **values})


def test_manifest_of_the_project():
    known = data.manifest()
    assert known["counterfact"].rows == 21919 and known["counterfact"].url.endswith("counterfact.json")
    assert known["zsre-portability"].rows == 1037 and known["recent-train"].rows == 570
    for one in known.values():
        assert one.licence and one.page and len(one.sha256) in (0, 64), one.name
    listed = data.listing(known)
    assert len(listed.splitlines()) == len(known) and all(name in listed for name in known)
    assert "21919" in data.describe(known["counterfact"])


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="unknown data set 'imagenet': choose one of counterfact"):
        data.known(data.manifest(), "imagenet")


@pytest.mark.parametrize("text, message", [("[a", "not valid TOML"), ("[a]\nurl = 'x'\n", "a needs about"),
                                           ("a = 1", "a needs about")])
def test_damaged_manifest(tmp_path, text, message):
    (tmp_path / "manifest.toml").write_text(text)
    with pytest.raises(ValueError, match=f"manifest.toml: {message}"):
        data.manifest(tmp_path / "manifest.toml")


def test_check_compares_what_is_known(tmp_path, source):
    path = tmp_path / "there.json"
    assert data.check(source, path).endswith("rows 3; as known: sha256, bytes, rows")
    assert "nothing is known" in data.check(changed(source, sha256="", bytes=0, rows=0), path)
    for name, value in (("sha256", "0" * 64), ("bytes", 26), ("rows", 4)):
        with pytest.raises(ValueError, match=f"there.json: {name} is .*, but that of toy is {value}"):
            data.check(changed(source, **({"sha256": "", "bytes": 0, "rows": 0} | {name: value})), path)


def test_fetch_takes_its_place_only_when_it_is_right(tmp_path, source):
    said = data.fetch(source, tmp_path / "got.json")
    assert said.startswith(str(tmp_path / "got.json")) and len(json.loads((tmp_path / "got.json").read_text())) == 3
    with pytest.raises(ValueError, match="rows is 3, but that of toy is 4"):
        data.fetch(changed(source, rows=4), tmp_path / "other.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got.json", "there.json"]


def test_fetch_without_a_network_or_an_address(tmp_path, source):
    missing = changed(source, url=(tmp_path / "nowhere.json").as_uri())
    with pytest.raises(ValueError, match="cannot be fetched .*data toy --check FILE"):
        data.fetch(missing, tmp_path / "got.json")
    with pytest.raises(ValueError, match="has to be chosen by hand on page"):
        data.fetch(changed(source, url=""), tmp_path / "got.json")
    assert not (tmp_path / "got.json").exists()


def test_no_sample_passes_for_the_whole():
    sample = Path(__file__).parents[2] / "shared" / "data" / "counterfact_sample.json"
    if not sample.is_file():
        pytest.skip("the samples are not beside this checkout")
    with pytest.raises(ValueError, match="rows is 299, but that of counterfact is 21919"):
        data.check(data.manifest()["counterfact"], sample)
