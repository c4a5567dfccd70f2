"""The judge against a real HTTP server on loopback that speaks OpenAI's protocol."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from raykd.evaluation.judge import Case, Judge, Verdict, check_judge, judge_answers, score, summary, win_rate

Reply = Callable[[str], str]
"""What the served model says to a pair of answers."""

MODELS = {"object": "list", "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "test"}]}


@contextmanager
def served(
    reply: Reply, models: bytes = json.dumps(MODELS).encode(), kind: str = "application/json"
) -> Iterator[tuple[Judge, list[dict]]]:
    """A server with one model, and the requests it gets."""
    requests: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(models)

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            message = {"role": "assistant", "content": reply(request["messages"][-1]["content"])}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
            self.answer(json.dumps(body).encode())

        def answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Judge(url=f"http://127.0.0.1:{server.server_port}/v1", model="judge", concurrency=2), requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def by_quality(pair: str) -> str:
    """8 for an answer that says good, 2 for another, and two more for whatever comes first."""
    first, second = pair.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
    return json.dumps({"answer_a": (8 if "good" in first else 2) + 2, "answer_b": 8 if "good" in second else 2})


CASES = [Case("q1", "good", "bad"), Case("q2", "bad", "good"), Case("q3", "bad", "bad"), Case("q4", "good", "bad")]


def test_ratings_come_from_both_orders_so_that_favouring_the_first_cancels():
    with served(by_quality) as (judge, requests):
        check_judge(judge)
        verdicts = judge_answers(judge, CASES)
    assert verdicts == [Verdict(9, 3), Verdict(3, 9), Verdict(3, 3), Verdict(9, 3)]
    assert len(requests) == 8 and {request["temperature"] for request in requests} == {0.0}
    schema = requests[0]["response_format"]["json_schema"]["schema"]["properties"]
    assert schema["answer_a"]["enum"] == list(range(1, 11)), "the endpoint holds the judge to the form"


def test_score_and_win_rate_by_hand():
    verdicts = [Verdict(9, 3), Verdict(3, 9), Verdict(3, 3), Verdict(9, 3)]
    assert score(verdicts) == pytest.approx(100 * 24 / 18)
    assert win_rate(verdicts) == pytest.approx(100 * 2.5 / 4)
    assert summary([*verdicts, None]) == pytest.approx(
        {"judge_score": 100 * 24 / 18, "judge_win_rate": 62.5, "judge_unrated": 20.0}
    )
    assert summary([None]) == {"judge_unrated": 100.0}


@pytest.mark.parametrize("nonsense", ["I like the first one.", '{"answer_a": 11, "answer_b": 3}', '{"answer_a": 4}'])
def test_a_reply_that_is_no_rating_gives_no_verdict(nonsense: str):
    with served(lambda pair: nonsense if "q2" in pair else by_quality(pair)) as (judge, _):
        verdicts = judge_answers(judge, CASES)
    assert [verdict is None for verdict in verdicts] == [False, True, False, False]


def test_a_judge_that_is_not_there_is_named():
    with (
        served(by_quality) as (judge, _),
        pytest.raises(ValueError, match=r"judge.model other is not served at .*, which has judge"),
    ):
        check_judge(judge.model_copy(update={"model": "other"}))
    with pytest.raises(ValueError, match=r"judge.url http://127.0.0.1:.* cannot be reached; start the server"):
        check_judge(judge)


@pytest.mark.parametrize("kind", ["text/html", "application/json"])
def test_a_server_that_is_no_endpoint_is_named(kind: str):
    with (
        served(by_quality, models=b"<html>Welcome</html>", kind=kind) as (judge, _),
        pytest.raises(ValueError, match=r"judge.url http://127.0.0.1:.* gives no list of models; mend the address"),
    ):
        check_judge(judge)
