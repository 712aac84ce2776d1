"""What is fetched is whole, in time and small enough, and errors keep secrets."""

import io
import json
import threading
import time
import traceback
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from editcore import commands, web
from editcore.files import sha256
from editcore.instructedit import instructions

SECRET = "sk-very-secret"
ROWS = json.dumps([{"a": 1}] * 3).encode()


def archive():
    """Bytes of a zip of one table."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.tsv", "x" * 9000 + "".join(map(str, range(2000))))
    return buffer.getvalue()


ZIP = archive()


class Handler(BaseHTTPRequestHandler):
    """Answers rightly or wrongly by path."""

    def log_message(self, *_):
        """Be silent."""

    def answer(self, body, status=200, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        """Answer by path."""
        name = self.path.split("/")[-1]
        if name == "slow.json":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b" ")
                time.sleep(0.1)
        elif name == "plain.json":
            self.answer(b"", 302, Location="http://example.org/rows.json")
        else:
            bodies = {"rows.json": ROWS, "cut.json": ROWS, "half.json": ROWS[:-5], "a.zip": ZIP,
                      "half.zip": ZIP[:-30], "bad.zip": ZIP[:60] + b"?" + ZIP[61:],
                      "page.zip": b"<html>", "page.json": b"<html>", "empty.json": b"[]",
                      "number.json": b"3"}
            body = bodies.get(name, b"")
            length = len(body) + 9 if name == "cut.json" else None
            self.answer(body, 200 if name in bodies else 404, length)

    def do_POST(self):
        """Answer as a chat model does, rightly or wrongly."""
        self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.split("/")[1]
        key = self.headers["Authorization"].removeprefix("Bearer ")
        good = {"choices": [{"message": {"content": "- first text\n\n* second text"}}]}
        if kind == "redirected":
            self.answer(b"", 307, Location="https://example.org/")
        elif kind == "slow":
            self.do_GET_slow()
        else:
            texts = {"good": json.dumps(good), "echo": json.dumps(good).replace("first", key),
                     "refused": f"no such key: {key}", "html": f"<html>{key}", "list": "[]",
                     "none": '{"choices": [{"message": {"content": null}}]}', "long": " " * 2 ** 21}
            self.answer(texts[kind].encode(), 401 if kind == "refused" else 200)

    def do_GET_slow(self):
        """Send the head of an answer byte by byte."""
        for letter in b"HTTP/1.1 200 OK\r\nX: " + b"a" * 60:
            self.wfile.write(bytes([letter]))
            self.wfile.flush()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def place():
    """Address of a server on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("url, message", [
    ("http://example.org/a", "give an https"), ("ftp://example.org/a", "give an https"),
    ("file:///etc/passwd", "give an https"), ("example.org", "give an https"),
    ("", "give an https"),
    ("https://me:" + SECRET + "@example.org/a", "no password"), ("https:///a", "needs a host"),
    ("http://localhost.example.org/a", "give an https"), ("javascript:alert(1)", "give an https")])
def test_addresses_are_https_and_hold_no_password(url, message):
    with pytest.raises(ValueError, match=message) as error:
        web.check_address(url)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("name, known, message", [
    ("rows.json", {}, None), ("rows.json", {"rows": 3, "bytes": len(ROWS)}, None),
    ("rows.json", {"rows": 4}, "rows is 3, but that of toy is 4"),
    ("rows.json", {"bytes": len(ROWS) + 1}, "bytes is"), ("rows.json", {"bytes": 9}, "more than 9"),
    ("rows.json", {"sha256": "0" * 64}, "sha256 is"), ("cut.json", {}, "cannot be fetched"),
    ("half.json", {}, "not valid JSON"), ("page.json", {}, "not valid JSON"),
    ("empty.json", {}, "holds no records"), ("number.json", {}, "holds no records"),
    ("none.json", {}, "status 404"), ("plain.json", {}, "give an https address"),
    ("a.zip", {}, None), ("half.zip", {}, "not a whole zip"), ("page.zip", {}, "not a whole zip"),
    ("bad.zip", {}, "zip archive|is damaged")])
def test_a_fetched_file_takes_its_place_only_when_right(tmp_path, place, name, known, message):
    source = {"url": f"{place}/{name}", "page": "page", "sha256": "", "bytes": 0, "rows": 0} | known
    path = tmp_path / "got.data"
    path.write_text("earlier")
    if message is None:
        line = commands.fetch_data("toy", source, path)
        assert line.startswith(f"{path}: sha256 {sha256(path)}, bytes {path.stat().st_size}")
        assert ("not known, so not compared: sha256" in line) and path.read_bytes() in (ROWS, ZIP)
    else:
        with pytest.raises(ValueError, match=message) as error:
            commands.fetch_data("toy", source, path)
        assert path.read_text() == "earlier" and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_slow_answer_ends_in_time(tmp_path, place):
    began = time.monotonic()
    with pytest.raises(ValueError, match="not done within 0.5 seconds"):
        web.fetch(f"{place}/slow.json", tmp_path / "a", limit=99, seconds=0.5)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("kind, message", [
    ("good", None), ("echo", "repeats its key"), ("refused", "status 401"), ("html", "not JSON"),
    ("list", "not that of a chat model"), ("none", "not that of a chat model"),
    ("long", "sends more than"), ("redirected", "status 307"), ("slow", "not done within")])
def test_a_writer_writes_or_fails_without_its_key(place, monkeypatch, kind, message):
    monkeypatch.setenv("WRITER_KEY", f" {SECRET}\n")
    ends = ("", "/", "/v1", "/v1/chat/completions")
    for end in ends if message is None else ends[:1]:
        if message is None:
            lines = instructions.ask_writer(f"{place}/{kind}{end}", "w", "write")
            assert lines == ["first text", "second text"]
        else:
            with pytest.raises(ValueError, match=message) as error:
                instructions.ask_writer(f"{place}/{kind}{end}", "w", "write", seconds=1)
            shown = "".join(traceback.format_exception(error.value))
            assert SECRET not in shown and error.value.__cause__ is None


@pytest.mark.parametrize("key", [
    None, "", " \n", f"{SECRET}\nx", f"{SECRET}\r\nX-A: b", f"{SECRET} x", f"{SECRET}\u00e9",
    f"{SECRET}\ufeff"])
@pytest.mark.parametrize("endpoint", ["https://example.org/v1", "http://example.org"])
def test_a_key_that_is_no_word_is_never_shown_nor_sent(monkeypatch, key, endpoint):
    monkeypatch.setattr(web, "post", None)
    if key is None:
        monkeypatch.delenv("WRITER_KEY", raising=False)
    else:
        monkeypatch.setenv("WRITER_KEY", key)
    with pytest.raises(ValueError, match="WRITER_KEY: is not") as error:
        instructions.ask_writer(endpoint, "w", "write")
    assert SECRET not in str(error.value)


def test_a_key_is_not_sent_over_plain_http_nor_as_part_of_an_address(monkeypatch):
    monkeypatch.setenv("WRITER_KEY", SECRET)
    for endpoint, message in (("http://example.org", "give an https"), ("", "give an https"),
                              (f"https://example.org?key={SECRET}", "give the address alone"),
                              (f"https://a:{SECRET}@example.org", "no password")):
        with pytest.raises(ValueError, match=message) as error:
            instructions.ask_writer(endpoint, "w", "write")
        assert SECRET not in str(error.value)
