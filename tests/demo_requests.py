"""Requests to the page of `tiue demo` without a browser."""

import http.client
import json
import urllib.request
from urllib.parse import urlsplit

SECONDS = 120  # to wait for an answer on a busy machine


def get(address: str, path: str) -> tuple[int, bytes]:
    """Asks for a path as it is written: no client puts it in order."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=SECONDS)
    connection.putrequest("GET", path, skip_accept_encoding=True)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content


def post(address: str, path: str, content: dict) -> dict:
    request = urllib.request.Request(address + path, json.dumps(content).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)


def ask(address: str, event: int, values: list, session: str) -> list[str]:
    """One request of the page by hand: what the server answers to this session, message by message."""
    join = {"data": values, "fn_index": event, "session_hash": session, "trigger_id": None}
    post(address, "gradio_api/queue/join", join)
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=SECONDS) as answer:
        return [line[6:].decode() for line in answer if line.startswith(b"data: ")]
