"""The server, as clients meet it: OpenAI's own, and plain HTTP."""

import collections
import contextlib
import itertools
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import openai
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from pplug_jax.serve.__main__ import main
from pplug_jax.serve.app import LARGEST_BODY
from pplug_jax.serve.build import load_plug, make_service
from pplug_jax.serve.engine import Busy
from pplug_jax.serve.engine.torch_file import prompt_embeds
from pplug_jax.serve.store import Store, StoreUnavailable
from pplug_jax.serve.text import TextStream
from tests.support.forks import Fork
from tests.support.server import Running, until

INPUT = "Generate a title for the following abstract of a paper: Rivers are measured."
ITEMS = [
    {"id": str(i), "title": f"On rivers {i}", "abstract": f"River {i} is long.", "date": f"200{i}"}
    for i in range(6)
]


@pytest.fixture
def ann(server: Running) -> Iterator[str]:
    """A persona with a history."""
    assert server.ask("POST", "/v1/personas/ann/items", json={"items": ITEMS}).status_code == 200
    yield "ann"
    server.ask("DELETE", "/v1/personas/ann")


def chat(client: openai.OpenAI, **more: Any) -> Any:
    messages = [{"role": "user", "content": INPUT}]
    return client.chat.completions.create(model="any", messages=messages, **more)


def alone(server: Running, history: list[dict[str, Any]]) -> str:
    return server.service.people.personalizer.generate(INPUT, history)


pytestmark = pytest.mark.slow


def test_openais_client_gets_what_a_personalizer_answers(server: Running, ann: str) -> None:
    client = server.openai()
    expected = alone(server, ITEMS)
    assert expected != alone(server, [])
    answer = chat(client, user=ann)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert chat(client, metadata={"persona": ann}).choices[0].message.content == expected
    whole = client.completions.create(model="any", prompt=INPUT, user=ann)
    assert whole.choices[0].text == expected

    stream = list(chat(client, user=ann, stream=True, stream_options={"include_usage": True}))
    parts = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    assert "".join(parts) == expected
    assert sum(part != "" for part in parts) > 1
    assert stream[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    assert stream[-1].usage == answer.usage
    stream = client.completions.create(model="any", prompt=INPUT, user=ann, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    assert [model.id for model in client.models.list()] == [server.service.name]


def test_an_unknown_person_gets_the_null_persona_and_a_header(server: Running, ann: str) -> None:
    ask = server.openai().chat.completions.with_raw_response.create
    messages = [{"role": "user", "content": [{"type": "text", "text": INPUT}]}]
    for name, known, items in ((None, "none", 0), ("nobody", "unknown", 0), (ann, "known", 6)):
        told = ask(model="any", messages=messages, user=name or openai.NOT_GIVEN)
        assert told.headers["x-pplug-persona"] == known
        assert told.headers["x-pplug-items"] == str(items)
        expected = alone(server, ITEMS if items else [])
        assert told.parse().choices[0].message.content == expected


def test_the_weights_of_the_items_are_told(server: Running, ann: str) -> None:
    answer = chat(server.openai(), user=ann, extra_body={"persona": {"explain": True}})
    told = answer.model_extra["persona"]["items"]
    assert [each["id"] for each in told] == [item["id"] for item in ITEMS]
    assert sum(each["weight"] for each in told) == pytest.approx(1, abs=1e-5)
    assert len({each["weight"] for each in told}) > 1


def test_choices_seeds_and_log_probabilities(server: Running, ann: str) -> None:
    client = server.openai()

    def drawn(**more: Any) -> list[str]:
        answer = chat(client, user=ann, temperature=2.0, n=4, **more)
        return [choice.message.content for choice in answer.choices]

    first = drawn(seed=5)
    assert drawn(seed=5) == first
    assert len(set(first)) > 1
    assert drawn(seed=6)[:3] == first[1:]
    answer = chat(client, user=ann, logprobs=True)
    values = [each.logprob for each in answer.choices[0].logprobs.content]
    assert len(values) == answer.usage.completion_tokens
    assert all(value <= 0 for value in values)
    few = chat(client, user=ann, max_tokens=2)
    assert (few.usage.completion_tokens, few.choices[0].finish_reason) == (2, "length")
    assert alone(server, ITEMS).startswith(few.choices[0].message.content)
    stop = alone(server, ITEMS)[3:5]
    stopped = chat(client, user=ann, stop=[stop])
    assert stopped.choices[0].message.content == alone(server, ITEMS).partition(stop)[0].strip()
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": [{"type": "function"}]}, "the field 'tools' is not supported; leave it out"),
        ({"presence_penalty": 0.5}, "'presence_penalty' is not supported"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
        ({"top_logprobs": 3}, "'top_logprobs' is not supported"),
        ({"max_tokens": 9999}, "max_tokens must be from 1 to 8, not 9999"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"n": 99}, "n: Input should be less than or equal to 16"),
        ({"messages": [{"role": "system", "content": "x"}]}, "must be one message of the user"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "of type 'text'"),
        ({"metadata": {"persona": 7}}, "'metadata.persona' must be a text"),
        ({"persona": {"explian": True}}, "persona.explian: Extra inputs are not permitted"),
        ({"user": "\n"}, "a persona's name must be a text of 1 to 256 printable characters"),
    ],
)
def test_what_is_not_supported_is_said(server: Running, more: dict, message: str) -> None:
    body = {"model": "any", "messages": [{"role": "user", "content": INPUT}]} | more
    answer = server.ask("POST", "/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_openais_client_knows_the_errors(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported"):
        chat(server.openai(), tools=[{"type": "function", "function": {"name": "f"}}])
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="pplug-1-no", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="no API key of this server's is given"):
        chat(wrong)
    with pytest.raises(openai.NotFoundError):
        server.openai().models.retrieve("x/y")


def test_items_are_added_listed_corrected_and_erased(server: Running, ann: str) -> None:
    path = f"/v1/personas/{ann}"
    assert server.ask("GET", path).json() == {"id": ann, "items": 6}
    again = server.ask("POST", f"{path}/items", json={"items": ITEMS[:2]}).json()
    assert again == {"added": [], "known": 2}
    page = server.ask("GET", f"{path}/items", params={"limit": 4}).json()
    assert page["items"] == ITEMS[:4]
    rest = server.ask("GET", f"{path}/items", params={"after": page["next"]}).json()
    assert rest == {"items": ITEMS[4:], "next": None}
    other = {"title": "Other", "abstract": "Other."}
    assert server.ask("PUT", f"{path}/items/3", json=other).json() == other | {"id": "3"}
    assert server.ask("GET", f"{path}/items/3").json() == other | {"id": "3"}
    assert server.ask("DELETE", f"{path}/items/2").json() == {"id": "2", "erased": 1}
    exported = server.ask("GET", f"{path}/export").text
    lines = {"content-type": "application/x-ndjson"}
    copied = server.ask("POST", "/v1/personas/copy/items", content=exported, headers=lines)
    assert copied.json() == {"added": ["0", "1", "3", "4", "5"], "known": 0}
    assert server.ask("GET", "/v1/personas/copy/export").text == exported
    assert server.ask("GET", "/v1/personas").json() == {"personas": [ann, "copy"], "next": None}
    assert server.ask("PUT", "/v1/personas/new").status_code == 201
    assert server.ask("PUT", "/v1/personas/new").status_code == 200
    for name, count in (("copy", 5), ("new", 0), ("new", 0)):
        gone = server.ask("DELETE", f"/v1/personas/{name}")
        assert gone.json() == {"id": name, "erased": count}
    assert server.ask("GET", "/v1/personas/copy").status_code == 404


def test_names_and_ids_may_have_slashes(server: Running) -> None:
    path, item = "/v1/personas/acme%2Fann%2Fx", ITEMS[0] | {"id": "doc/1"}
    assert server.ask("PUT", path).json() == {"id": "acme/ann/x", "items": 0}
    assert server.ask("POST", f"{path}/items", json={"items": [item]}).json()["added"] == ["doc/1"]
    assert server.ask("GET", f"{path}/items").json()["items"] == [item]
    assert server.ask("GET", f"{path}/items/doc%2F1").json() == item
    assert server.ask("DELETE", f"{path}/items/doc/1").json()["erased"] == 1
    assert server.ask("GET", f"{path}/export").text == ""
    assert server.ask("DELETE", path).json() == {"id": "acme/ann/x", "erased": 0}


@pytest.mark.parametrize("name", ["team/items/1", "team/items", "team/export", "100%2F"])
def test_a_name_is_no_route(server: Running, name: str) -> None:
    for persona in ("team", name):
        path = f"/v1/personas/{quote(persona, safe='')}"
        assert server.ask("POST", f"{path}/items", json={"items": ITEMS[:1]}).status_code == 200
    assert server.ask("DELETE", path).json() == {"id": name, "erased": 1}
    assert server.ask("GET", path).status_code == 404
    assert server.ask("DELETE", "/v1/personas/team").json() == {"id": "team", "erased": 1}


@pytest.mark.parametrize("field", ["echo", "presence_penalty", "top_logprobs", "foo"])
def test_what_is_not_supported_is_refused_whatever_it_says(server: Running, field: str) -> None:
    for value in (True, 1, 1.0, 2):
        body = {"prompt": "x", "max_tokens": 1, field: value}
        answer = server.ask("POST", "/v1/completions", json=body)
        assert answer.status_code == 400, answer.text
        assert field in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/personalize"),
        ("PUT", "/v1/personas/ann/items/1"),
        ("POST", "/v1/personas/ann/soft_prompt"),
    ],
)
def test_a_body_that_is_too_large(server: Running, method: str, path: str) -> None:
    answer = server.ask(method, path, json={"prompt": "x" * (5 << 20)})
    assert answer.status_code == 413
    assert "the body is larger than" in answer.json()["error"]["message"]


def test_one_bad_name_of_many_is_refused_before_any_answer(server: Running) -> None:
    body = {"input": "x", "users": ["ann", "bad\u0001"]}
    answer = server.ask("POST", "/v1/personalize", json=body)
    assert answer.status_code == 400
    assert "a persona's name must be" in answer.json()["error"]["message"]


def test_what_is_no_item(server: Running, ann: str) -> None:
    path = f"/v1/personas/{ann}/items"

    def refused(status: int, message: str, **request: Any) -> None:
        answer = server.ask("POST", path, **request)
        assert answer.status_code == status, answer.text
        assert message in answer.json()["error"]["message"]

    refused(
        400,
        "history item 1: the field 'abstract' is missing",
        json={"items": [ITEMS[0], {"title": "t"}]},
    )
    refused(409, "'1' is there with other content", json={"items": [ITEMS[1] | {"title": "t"}]})
    refused(400, "the body must be {'items': [..]}", json=[ITEMS[0]])
    refused(400, "the body must be {'items': [..]}", json={"items": [ITEMS[0]] * 1001})
    refused(400, "line 2: not JSON", content='{"a": 1}\n{')
    refused(400, "the body is not UTF-8", content=b"\xff")
    refused(413, "the body is larger than", content=b" " * (LARGEST_BODY + 1))
    assert server.ask("PUT", f"{path}/0", json={"title": 7}).status_code == 400
    assert server.ask("GET", f"{path}/77").status_code == 404


def test_no_request_reaches_another_tenants(server: Running, ann: str) -> None:
    for method, path, body in (
        ("GET", "", None),
        ("GET", "/items", None),
        ("GET", "/items/1", None),
        ("PUT", "/items/1", ITEMS[1]),
        ("DELETE", "/items/1", None),
        ("GET", "/export", None),
        ("POST", "/soft_prompt", {"input": INPUT}),
    ):
        answer = server.ask(method, f"/v1/personas/{ann}{path}", key=1, json=body)
        assert answer.status_code == 404, (method, path)
        assert answer.json()["error"]["message"].startswith("there is no persona 'ann'")
    assert server.ask("GET", "/v1/personas", key=1).json()["personas"] == []
    assert server.ask("DELETE", f"/v1/personas/{ann}", key=1).json()["erased"] == 0
    assert chat(server.openai(1), user=ann).choices[0].message.content == alone(server, [])
    for path in ("/v1/personas", "/v1/models", f"/v1/personas/{ann}/export"):
        assert server.http.get(path).status_code == 401


def test_a_soft_prompt_can_be_taken_elsewhere(server: Running, ann: str) -> None:
    personalizer = server.service.people.personalizer
    expected = personalizer.soft_prompt(INPUT, ITEMS)
    path = f"/v1/personas/{ann}/soft_prompt"
    answer = server.ask("POST", path, json={"input": INPUT})
    soft = safetensors.numpy.load(answer.content)["inputs_embeds"]
    np.testing.assert_allclose(soft, expected, rtol=1e-5, atol=1e-5)
    assert answer.headers["x-pplug-place"] == "front"
    assert answer.headers["x-pplug-dtype"] == "float32"
    whole = server.ask("POST", path, json={"input": INPUT, "rows": "all"})
    rows = safetensors.numpy.load(whole.content)["inputs_embeds"]
    np.testing.assert_array_equal(rows, personalizer.inputs_embeds(INPUT, soft))
    start = int(whole.headers["x-pplug-prefix-tokens"])
    np.testing.assert_array_equal(rows[start : start + len(soft)], soft)
    text = server.ask("POST", path, json={"input": INPUT, "format": "vllm"}).text
    assert text == prompt_embeds(soft)  # which test_vllm.py has PyTorch read


def test_one_input_for_many_people(server: Running, ann: str) -> None:
    users = [ann, *(f"nobody {i}" for i in range(20))]
    answer = server.ask("POST", "/v1/personalize", json={"input": INPUT, "users": users})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert {line["user"] for line in lines} == set(users)
    for line in lines:
        known = line["user"] == ann
        assert (line["known"], line["items"]) == (known, 6 if known else 0)
        assert line["answer"] == alone(server, ITEMS if known else [])


def test_many_at_once_are_answered_as_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    persons = {f"person {i}": ITEMS[: i % 5] for i in range(12)}
    for name, items in persons.items():
        assert server.ask("POST", f"/v1/personas/{name}/items", json={"items": items}).is_success
    client, people = server.openai(), server.service.people
    batcher, encode, calls = people._encode_inputs, people._encode_inputs._encode, []

    def counted(inputs: Sequence[str]) -> np.ndarray:
        calls.append(list(inputs))
        return encode(inputs)

    monkeypatch.setattr(batcher, "_encode", counted)
    with ThreadPoolExecutor(12) as pool:
        with batcher._turn:  # as while others are encoded
            asked = [pool.submit(chat, client, user=name) for name in persons]
            until(lambda: len(batcher._waiting) == 12)
        answers = [each.result() for each in asked]
    assert calls == [[INPUT] * 12]
    for answer, (name, items) in zip(answers, persons.items(), strict=True):
        assert answer.choices[0].message.content == alone(server, items)
        server.ask("DELETE", f"/v1/personas/{name}")
    inputs = [INPUT, "Generate a title: it is short."]
    for input, vector in zip(inputs, encode(inputs), strict=True):
        np.testing.assert_allclose(vector, encode([input])[0], rtol=1e-5, atol=1e-6)


def test_new_items_are_encoded_in_the_background(server: Running, ann: str) -> None:
    people = server.service.people
    until(lambda: server.service.store.lacking(people.encoder, 1) == [])


def test_health_and_metrics(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.http.get("/health").status_code == 200
    chat(server.openai())
    text = server.http.get("/metrics").text
    for name in (
        "num_requests_running",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_bucket",
        "persona_seconds_count",
        "history_items_sum",
        "store_seconds_count",
        "encode_items_total",
    ):
        assert f"\npplug:{name}" in text, name
    assert 'pplug:request_success_total{finished_reason="' in text

    def gone() -> bool:
        raise StoreUnavailable("the store is not available; try again")

    monkeypatch.setattr(server.service.store, "has_keys", gone)
    answer = server.http.get("/health")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_full_queue_is_429_and_openais_client_tries_again(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = server.service.engine
    monkeypatch.setattr(engine, "max_waiting", 0)
    with pytest.raises(openai.RateLimitError, match="wait already; try again later") as caught:
        chat(server.openai())
    assert caught.value.response.headers["retry-after"] == "1"
    threading.Timer(0.2, lambda: monkeypatch.setattr(engine, "max_waiting", 99)).start()
    assert chat(server.openai(max_retries=5)).choices[0].message.content == alone(server, [])


def test_choices_that_find_no_room_leave_none_of_them_running(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, begun = server.service.engine, []

    def submit(*arguments: Any) -> Any:
        if len(begun) == 2:
            raise Busy("3 wait already; try again later")
        request = submit_one(*arguments)
        monkeypatch.setattr(request, "cancel", lambda: cancelled.append(request))
        begun.append(request)
        return request

    submit_one, cancelled = engine.submit, []
    monkeypatch.setattr(engine, "submit", submit)
    with pytest.raises(openai.RateLimitError):
        chat(server.openai(), n=3)
    assert len(begun) == len(cancelled) == 2


def test_a_client_that_goes_away_frees_its_place(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = server.service.engine
    step = engine._step

    def slow(count: int) -> Any:
        time.sleep(0.3)
        return step(count)

    monkeypatch.setattr(engine, "_step", slow)
    with chat(server.openai(), stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        chat(server.openai(timeout=0.4))
    until(lambda: not engine.running)
    text = server.http.get("/metrics").text
    cancelled = text.partition('request_success_total{finished_reason="cancelled"} ')[2]
    assert float(cancelled.partition("\n")[0]) >= 2


def test_a_fault_tells_no_text(
    server: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fault(*arguments: Any) -> None:
        raise RuntimeError("the secret Zanzibar")

    monkeypatch.setattr(server.service.people, "persona", fault)
    answer = server.ask("POST", "/v1/completions", json={"prompt": "Zanzibar"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server has a fault; its log says where"
    told = "".join(capfd.readouterr())
    assert "error: RuntimeError in" in told
    assert "Zanzibar" not in answer.text + told


SAMPLING = {"max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "seed": 1}
ASK = SAMPLING | {"user": "ann", "metadata": {}, "persona": {"explain": True}, "stream": False}
ASK |= {"stream_options": {"include_usage": True}, "stop": ["y"], "n": 2, "logprobs": None}
PAGE = "?after=-1&limit=9999999999999999999999"
GOOD: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": ASK | {"messages": [{"role": "user", "content": "x"}]},
    "POST /v1/completions": ASK | {"prompt": "x"},
    "POST /v1/personalize": SAMPLING | {"input": "x", "users": ["ann", "ben"]},
    "POST /v1/personas/ann/items": {"items": ITEMS[:1]},
    "POST /v1/personas/%00/items": {"items": ITEMS[:1]},
    "POST /v1/personas/ann/soft_prompt": {"input": "x", "rows": "all", "format": "vllm"},
    "PUT /v1/personas/ann/items/0": ITEMS[0],
    "PUT /v1/personas/ann": {},
    "GET /v1/personas/ann/items": {},
    f"GET /v1/personas/ann/items{PAGE}": {},
    "GET /v1/personas/ann/export": {},
    "GET /v1/personas": {},
    "DELETE /v1/personas/ann/items/0": {},
    "DELETE /v1/personas/ann": {},
    "PATCH /v1/models": {},
}
VALUES = st.sampled_from(
    [None, True, 0, 1, -1, 2, 2**63, 1.5, 1e300, "", "x", "all", "vllm", "\ud83d", "ann", ["ann"]]
    + [[[]], ["x"] * 5, {"explain": True}, {"include_usage": True}, {"persona": "ann"}, ITEMS]
) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
MUTATED = st.sampled_from(sorted(GOOD)).flatmap(
    lambda request: st.tuples(
        st.just(request),
        st.dictionaries(st.sampled_from([*GOOD[request], "other"]), VALUES, max_size=2),
        st.sets(st.sampled_from([*GOOD[request], "other"]), max_size=2),
    )
)
# Where a body ends too soon, and its type.
ENDS = st.sampled_from([None] * 8 + [0, 30])
TYPES = st.sampled_from(["application/json"] * 4 + ["application/x-ndjson", "nonsense"])


def test_no_request_finds_a_fault(server: Running, ann: str) -> None:
    """Nor what another tenant has. CONTRIBUTING.md says how to try 10,000."""
    secret = ITEMS[0] | {"id": "secret", "title": "Zanzibar"}
    server.ask("POST", f"/v1/personas/{ann}/items", json={"items": [secret]})

    @given(MUTATED, ENDS, TYPES)
    def ask(mutated: tuple[str, dict, set[str]], end: int | None, type: str) -> None:
        request, more, less = mutated
        body = {field: x for field, x in (GOOD[request] | more).items() if field not in less}
        content, headers = json.dumps(body)[:end], {"content-type": type}
        answer = server.ask(*request.split(), key=1, content=content, headers=headers)
        assert answer.status_code < 500, answer.text
        assert not re.search("Traceback|has a fault|Zanzibar", answer.text)

    ask()


def test_an_ending_server_finishes_what_runs(finished: Path, tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 's'}")
    running = Running(make_service("tiny", load_plug(str(finished)), store, slots=2))
    engine = running.service.engine
    step = engine._step

    def slow(count: int) -> Any:
        time.sleep(0.1)
        return step(count)

    engine._step = slow
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(chat, running.openai()) for _ in range(2)]
        while engine.running < 2:
            time.sleep(0.01)
        running.stop()
        assert len({answer.result().choices[0].message.content for answer in answers}) == 1
    with pytest.raises(openai.APIConnectionError):
        chat(running.openai())


def answers(port: int) -> bool:
    """Whether a process listens there."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def start(finished: Path, store: Path) -> tuple[Fork, str]:
    """Starts the command, and returns where it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--plug={finished}", f"--port={port}", f"--store=sqlite:///{store}", "--slots=2"]
    server = Fork("pplug_jax.serve", *options)
    while not answers(port):
        assert server.poll() is None, server.communicate(30)
        time.sleep(0.05)
    return server, f"http://127.0.0.1:{port}/v1"


def end(server: Fork, ending: signal.Signals) -> list[str]:
    """Ends the command, and returns the lines that it printed."""
    server.send_signal(ending)
    lines = server.communicate(30)[0].splitlines()
    assert server.returncode in (0, -ending)
    return lines


def test_the_command(finished: Path, tmp_path: Path) -> None:
    server, url = start(finished, tmp_path / "store")
    assert chat(openai.OpenAI(base_url=url, api_key="any")).choices[0].message.content
    lines = end(server, signal.SIGINT)
    assert lines[0].startswith("no API key is in use: whoever is on this machine may ask")
    assert lines[1:] == [f"serving {finished.name} at {url}"]


def test_a_killed_server_has_all_that_it_acknowledged(finished: Path, tmp_path: Path) -> None:
    server, url = start(finished, tmp_path / "store")
    told: set[str] = set()

    def write(writer: int) -> None:
        """Adds three items a call until the server is gone."""
        with httpx.Client(base_url=url) as client, contextlib.suppress(httpx.HTTPError):
            for call in itertools.count():
                name = f"{writer}-{call}"
                items = [ITEMS[k] | {"id": f"{name}-{k}"} for k in range(3)]
                path = f"/personas/person {call % 3}/items"
                client.post(path, json={"items": items}).raise_for_status()
                told.add(name)

    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(write, writer) for writer in range(8)]
        until(lambda: 3 * len(told) >= 1000)
        server.kill()
        for writer in writers:
            writer.result()
    server.communicate(30)
    server, url = start(finished, tmp_path / "store")
    exported = [httpx.get(f"{url}/personas/person {i}/export").text for i in range(3)]
    items = [json.loads(line) for lines in exported for line in lines.splitlines()]
    calls = collections.Counter(item["id"].rpartition("-")[0] for item in items)
    assert len({item["id"] for item in items}) == len(items)  # none twice
    assert set(calls.values()) == {3}  # none half
    assert told <= calls.keys()
    assert len(calls) <= len(told) + 8  # at most one of each that was not told any more
    for item in items:
        assert item == ITEMS[int(item["id"][-1])] | {"id": item["id"]}
    assert chat(openai.OpenAI(base_url=url, api_key="any"), user="person 1").choices[0]
    end(server, signal.SIGTERM)


def test_a_command_that_cannot_be(finished: Path, tmp_path: Path) -> None:
    store = f"--store=sqlite:///{tmp_path / 'store'}"
    with pytest.raises(
        SystemExit, match=r"error: there is no plug 'nothing'; give a run's workdir"
    ):
        main(["--plug=nothing", store])
    with pytest.raises(SystemExit, match=r"there is no plug 'runs/nothing'; .* hub id \("):
        main(["--plug=runs/nothing", store])
    with pytest.raises(SystemExit, match=r"plug_config\.json: no such file; a plug to load is"):
        main([f"--plug={tmp_path}", store])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"--port={port}: .*Address already in use"):
            main([f"--plug={finished}", f"--port={port}", store])
    assert list(tmp_path.iterdir()) == []  # no store was made
    with pytest.raises(SystemExit, match=r"--host=0\.0\.0\.0: without any API key the server list"):
        main([f"--plug={finished}", "--host=0.0.0.0", store])


@given(
    st.lists(st.sampled_from(["a", "b", " ", "ab", "\n", "xy", "x"])),
    st.sampled_from([(), ("ab",), ("x y", "b ")]),
)
def test_text_as_it_comes_is_text_at_the_end(pieces: list[str], stops: tuple[str, ...]) -> None:
    stream = TextStream(lambda ids: "".join(pieces[i] for i in ids), stops)
    told = []
    for i in range(len(pieces)):
        told.append(stream.push(i))
        if stream.stopped:
            break
    told.append(stream.end())
    text = "".join(pieces).lstrip()
    at = min([text.find(stop) for stop in stops if stop in text], default=len(text))
    assert "".join(told) == text[:at].rstrip()
    assert stream.stopped == (at < len(text))
