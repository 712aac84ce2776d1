"""editcore.writers: the loop stops and keeps the best, the bank climbs, the endpoint is asked as a stand-in expects."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from editcore.instructedit import writers
from editcore.instructedit.instructions import TITLES, checked


def ten(word):
    return [f"{word} description number {i}" for i in range(10)]


@pytest.mark.parametrize("task", TITLES)
def test_the_bank_writes_and_changes_part_of_the_best(task):
    bank = writers.bank(task)
    first = writers.parsed(bank(writers.request(task, [])))
    assert checked(task, first) and bank(writers.request(task, [])) == writers.numbered(first)
    history = [{"round": 0, "descriptions": first, "scores": {"rel": 0.5}}]
    second = writers.parsed(bank(writers.request(task, history)))
    assert len(set(second) & set(first)) == 10 - bank.swap and checked(task, second)


def test_the_loop_goes_on_while_a_metric_rises_and_keeps_the_best(tmp_path):
    replies, asked = iter([ten("a"), ten("b"), ten("c"), ten("d")]), []

    def writer(prompt):
        asked.append(prompt)
        return writers.numbered(next(replies))

    scores = {"a": (1, 5), "b": (3, 4), "c": (2, 6), "d": (3, 6)}
    built = writers.build("recent", writer, lambda texts: dict(zip("xy", scores[texts[0][0]])), rounds=9,
                          log=writers.log_to(tmp_path / "log.json"))
    assert [row["rose"] for row in built.rounds] == [["x", "y"], ["x"], ["y"], []]
    assert built.descriptions == tuple(ten("d")), "9 in sum, the highest mean, though neither metric rose alone"
    assert json.loads((tmp_path / "log.json").read_text()) == list(built.rounds)
    assert asked[0] == writers.request("recent", []) and "x 1, y 5" in asked[1] and ten("a")[3] in asked[1]
    assert asked[2].rpartition("Best so far")[2].count("b description") == 10


def test_the_bank_climbs_to_better_words():
    good = {"what is new about the subject.", "the answer as it is today."}

    def score(texts):
        return {"reliability": sum(any(end in text for end in good) for text in texts)}

    built = writers.build("recent", writers.bank("recent"), score, rounds=8)
    first, *later = [row["scores"]["reliability"] for row in built.rounds]
    assert score(built.descriptions)["reliability"] == max([first, *later]) and len(built.rounds) >= 2
    assert writers.build("recent", writers.bank("recent"), score, rounds=1).descriptions == tuple(
        built.rounds[0]["descriptions"])


def test_unusable_replies_are_told_and_asked_for_again():
    replies, asked = iter(["none", writers.numbered(ten("a")[:9]), "\n".join(f"- “{t}”" for t in ten("a"))]), []

    def writer(prompt):
        asked.append(prompt)
        return next(replies)

    built = writers.build("zsre", writer, lambda texts: {"x": 0}, rounds=1)
    assert built.descriptions == tuple(ten("a"))
    assert "could not be used: zsre: 9 different descriptions" in asked[2]
    with pytest.raises(ValueError, match="no usable descriptions in 3 replies; the last: zsre: 0 different"):
        writers.build("zsre", lambda prompt: "no", lambda texts: {"x": 0})


def test_scores_keep_their_names():
    names = iter("xy")
    with pytest.raises(ValueError, match=r"round 1: the score has metrics \['y'\], before \['x'\]"):
        writers.build("zsre", writers.bank("zsre"), lambda texts: {next(names): 1})


@pytest.fixture
def server(monkeypatch):
    """(environment, requests, answers): a stand-in on this machine; answers are (status, body, headers)."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    requests, answers = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), body))
            status, text, headers = answers.pop(0)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as here:
        thread = threading.Thread(target=here.serve_forever, daemon=True)
        thread.start()
        yield {"EDITCORE_WRITER_URL": f"http://127.0.0.1:{here.server_port}/v1/", "EDITCORE_WRITER_MODEL": "m",
               "EDITCORE_WRITER_KEY": "secret-key"}, requests, answers
        here.shutdown()
        thread.join()


def said(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def test_the_endpoint_is_asked_and_its_text_used(server):
    environ, requests, answers = server
    answers.append((200, said(writers.numbered(ten("a"))), {}))
    built = writers.build("recent", writers.writer_for("recent", environ), lambda texts: {"x": 1}, rounds=1)
    assert built.descriptions == tuple(ten("a"))
    (path, key, body), = requests
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret-key", "m")
    assert body["messages"] == [{"role": "user", "content": writers.request("recent", [])}]


@pytest.mark.parametrize("answer, words", [
    ((401, "{}", {}), "answered 401"),
    ((302, "", {"Location": "/other"}), "answered 302"),
    ((200, "hello", {}), "no chat completion .JSONDecodeError"),
    ((200, "{}", {}), "no chat completion .KeyError"),
    ((200, said(""), {}), "gave no text"),
])
def test_what_the_endpoint_gives_instead_is_told_without_the_key(server, answer, words):
    environ, requests, answers = server
    answers.append(answer)
    with pytest.raises(ValueError, match=words) as told:
        writers.endpoint(environ)("hello")
    assert "secret" not in str(told.value) and len(requests) == 1, "no redirect is followed"


def test_no_endpoint_or_a_wrong_one():
    assert writers.endpoint({}) is None and writers.writer_for("zsre", {}) == writers.bank("zsre")
    with pytest.raises(ValueError, match="EDITCORE_WRITER_URL is not an http"):
        writers.endpoint({"EDITCORE_WRITER_URL": "file:///x", "EDITCORE_WRITER_MODEL": "m"})
    with pytest.raises(ValueError, match="EDITCORE_WRITER_MODEL has to name"):
        writers.endpoint({"EDITCORE_WRITER_URL": "http://x"})
    with pytest.raises(ValueError, match="cannot be reached"):
        writers.endpoint({"EDITCORE_WRITER_URL": "http://127.0.0.1:9", "EDITCORE_WRITER_MODEL": "m"}, timeout=5)("x")
