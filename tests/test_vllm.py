"""A server of vLLM's form answers as our own engine does, and its faults are told."""

import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from fastapi.testclient import TestClient

from pplug_jax import Personalizer
from pplug_jax.errors import InputError
from pplug_jax.llm import load_llm
from pplug_jax.llm.generate import generate
from pplug_jax.serve.__main__ import main
from pplug_jax.serve.app import make_app
from pplug_jax.serve.build import load_plug, make_service
from pplug_jax.serve.engine import Busy, Sampling, Unwell, tokens_of
from pplug_jax.serve.engine.jax_engine import JaxEngine
from pplug_jax.serve.engine.torch_file import torch_file
from pplug_jax.serve.engine.vllm_engine import VllmEngine
from pplug_jax.serve.store import Store
from tests.support.engines import LLAMA, LONGEST, Reader, T, alone, engine_of, llm_of, prompt
from tests.support.parity import needs_torch, torch
from tests.support.server import until

if torch is not None:
    from tests.support.vllm import StandIn

VLLM = "PPLUG_TEST_VLLM"  # the address of a real one
LIMITS = {"longest_prompt": LONGEST, "max_new_tokens": T}
pytestmark = needs_torch


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 64)])
def test_pytorch_reads_the_file(dtype: Any, shape: tuple[int, int]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(dtype)
    read = torch.load(io.BytesIO(torch_file(array)), weights_only=True)
    assert read.dtype == getattr(torch, np.dtype(dtype).name)
    assert read.is_contiguous()
    np.testing.assert_array_equal(read.float().numpy(), array.astype(np.float32))


Serve = Callable[..., tuple["StandIn", VllmEngine]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Make a stand-in and an engine that asks it."""
    made: list[Any] = []

    def make(family: str = LLAMA, **limits: Any) -> tuple["StandIn", VllmEngine]:
        server = StandIn(engine_of(family), llm_of(family).config.hidden_size)
        made.append(server)
        made.append(VllmEngine(server.url, llm_of(family), **LIMITS | limits))
        server.asked.clear()  # what was only tried
        return server, made[-1]

    yield make
    for each in reversed(made):
        each.close() if isinstance(each, VllmEngine) else each.stop()


def rows_of(seed: int, family: str = LLAMA) -> np.ndarray:
    return prompt(llm_of(family), seed)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_greedy_answers_are_our_own(serve: Serve, family: str) -> None:
    _, engine = serve(family, slots=3)
    readers = [Reader(engine, rows_of(seed, family)) for seed in range(16)]
    reasons = set()
    for seed, reader in enumerate(readers):
        assert reader.wait().tokens == alone(family, seed)
        assert reader.reason == ("stop" if len(reader.tokens) < T else "length")
        reasons.add(reader.reason)
    ours = Reader(engine_of(family), rows_of(3, family)).wait()
    # Small ones are what is left of the logits' difference, whose rounding is absolute.
    np.testing.assert_allclose(
        readers[3].log_probabilities, ours.log_probabilities, rtol=1e-5, atol=1e-5
    )
    until(lambda: engine.running == engine.waiting == 0)
    assert "length" in reasons


@pytest.mark.slow
def test_the_sampling_is_handed_on(serve: Serve) -> None:
    server, engine = serve()
    sampling = {"max_tokens": 5, "temperature": 1.5, "top_p": 0.75, "seed": 7}
    drawn = Reader(engine, rows_of(3), **sampling).wait().tokens
    assert drawn == Reader(engine_of(LLAMA), rows_of(3), **sampling).wait().tokens
    assert drawn != alone(LLAMA, 3)[:5]
    (body,) = server.asked
    assert sampling.items() <= body.items()
    assert body["stop_token_ids"] == [1]


@pytest.mark.slow
def test_who_leaves_closes_the_connection(serve: Serve) -> None:
    server, engine = serve(slots=2)
    server.pause = 0.2
    reader = Reader(engine, rows_of(0), 1)
    assert reader.wait().reason == "cancelled"
    assert reader.tokens == alone(LLAMA, 0)[: len(reader.tokens)]
    until(lambda: server.left == 1)
    left_at_once = Reader(engine, rows_of(0), 0)
    assert left_at_once.wait().reason == "cancelled"
    reading = tokens_of(engine, rows_of(1), Sampling(T))
    next(reading)
    reading.close()
    until(lambda: engine.running == engine.waiting == 0)
    reader.request.cancel()  # again, and too late
    server.pause = 0.0
    assert Reader(engine, rows_of(2)).wait().tokens == alone(LLAMA, 2)


@pytest.mark.slow
def test_a_full_server_is_asked_again_and_too_many_are_refused(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pplug_jax.serve.engine.vllm_engine.PAUSE", 0.2)
    server, engine = serve(slots=1, waiting=2)
    server.full = 3
    readers = [Reader(engine, rows_of(seed)) for seed in range(3)]
    until(lambda: engine.running == 1)
    assert engine.waiting == 2
    with pytest.raises(Busy, match="2 requests wait already; try again later"):
        Reader(engine, rows_of(4))
    for seed, reader in enumerate(readers):
        assert reader.wait().tokens == alone(LLAMA, seed)
    assert server.full == 0


@pytest.mark.slow
def test_an_ending_engine_finishes(serve: Serve) -> None:
    server, engine = serve(slots=2)
    server.pause = 0.1
    readers = [Reader(engine, rows_of(seed)) for seed in range(4)]
    ending = threading.Thread(target=engine.close)
    ending.start()
    until(lambda: engine._ending)
    with pytest.raises(Busy, match="the server ends"):
        Reader(engine, rows_of(4))
    ending.join(60)
    for seed, reader in enumerate(readers):
        assert reader.done.is_set()
        assert reader.tokens == alone(LLAMA, seed)


@pytest.mark.slow
def test_a_server_that_fails_and_comes_back(serve: Serve) -> None:
    server, engine = serve()
    engine.check()
    server.broken = True
    assert Reader(engine, rows_of(0)).wait().reason == "error"
    with pytest.raises(Unwell, match="failed: it answers 500"):
        engine.check()
    server.broken = False
    until(lambda: engine._failure is None)
    assert Reader(engine, rows_of(0)).wait().tokens == alone(LLAMA, 0)

    server.pause = 0.3
    reader = Reader(engine, rows_of(1))
    until(lambda: len(reader.tokens) > 0)
    server.stop()
    assert reader.wait().reason == "error"
    with pytest.raises(Unwell, match="failed: "):
        Reader(engine, rows_of(1))
    server.pause = 0.0
    server.start()
    until(lambda: engine._failure is None)
    assert Reader(engine, rows_of(1)).wait().tokens == alone(LLAMA, 1)


@pytest.mark.slow
def test_what_cannot_be_asked(serve: Serve) -> None:
    _, engine = serve()
    size = llm_of(LLAMA).config.hidden_size
    with pytest.raises(InputError, match="the prompt has 21 tokens, and this server takes 20"):
        engine.submit(np.zeros((21, size)), Sampling(1), print)
    with pytest.raises(InputError, match=f"max_tokens must be from 1 to {T}, not {T + 1}"):
        engine.submit(np.zeros((1, size)), Sampling(T + 1), print)
    told: list[Any] = []
    engine.submit(np.zeros((1, size + 1)), Sampling(1), told.append)
    until(lambda: len(told) == 1)
    with pytest.raises(Unwell, match="it answers 400: the embeddings have 33 numbers"):
        told[0].check()
    engine.check()  # another request may do


@pytest.mark.slow
def test_a_server_that_does_not_do_is_refused_at_the_start(serve: Serve) -> None:
    server, _ = serve()

    def refused(message: str, url: str = server.url) -> None:
        with pytest.raises(InputError, match=message):
            VllmEngine(url, llm_of(LLAMA), **LIMITS)

    refused("engine_url=http://127.0.0.1:9/v1: no server answers", "http://127.0.0.1:9/v1")
    refused("engine_url=nonsense: no server answers", "nonsense")
    refused("it answers 404", server.url.removesuffix("/v1") + "/v2")
    server.size += 1
    refused("it answers 400: the embeddings have 32 numbers")
    server.size -= 1
    server.ids = False
    refused("it gives no token ids")
    server.ids, server.broken = True, True
    refused("it answers 500")
    server.broken, server.card = False, {"max_model_len": 28}
    refused("it reads and writes 28 tokens, and prompts and answers of this plug may have 29")


def test_the_options_belong_together() -> None:
    for options in (["--engine=vllm"], ["--engine_url=http://127.0.0.1:9/v1"]):
        with pytest.raises(SystemExit, match="--engine=vllm and --engine_url belong together"):
            main(["--plug=none", *options])


@pytest.mark.slow
def test_people_are_answered_as_by_a_personalizer(finished: Path, tmp_path: Path) -> None:
    personalizer = Personalizer.from_checkpoint(finished)
    models = personalizer.models
    models.config = models.config.changed({"eval.num_beams": 1})
    limits = {"longest_prompt": personalizer.longest_prompt, "max_new_tokens": 8, "slots": 2}
    server = StandIn(JaxEngine(models.llm, models.mesh, **limits), models.llm.config.hidden_size)
    store = Store(f"sqlite:///{tmp_path / 'store.sqlite'}")
    service = make_service("tiny", load_plug(str(finished)), store, slots=2, engine_url=server.url)
    input = "Generate a title for the following abstract of a paper: Rivers are measured."
    items = [{"id": str(i), "title": f"River {i}", "abstract": "It is long."} for i in range(4)]
    with TestClient(make_app(service)) as client:
        client.post("/v1/personas/ann/items", json={"items": items})
        body = {"prompt": input, "user": "ann", "logprobs": 0}
        answer = client.post("/v1/completions", json=body)
        (choice,) = answer.json()["choices"]
        assert choice["text"] == personalizer.generate(input, items)
        assert "llm" not in vars(service.people.personalizer.models)  # its embedding alone
        assert len(choice["logprobs"]["token_logprobs"]) > 0
        assert client.get("/health").status_code == 200
        assert "pplug:num_requests_running 0.0" in client.get("/metrics").text
        server.broken = True
        assert client.post("/v1/completions", json=body).status_code == 503
        assert client.get("/health").status_code == 503
    server.stop()
    server.engine.close()


@pytest.mark.slow
def test_real_vllm_answers_as_we_do() -> None:
    """Start it with `--enable-prompt-embeds --dtype float32`, on a directory of this machine."""
    import httpx

    url = os.environ.get(VLLM)
    if not url:
        pytest.skip(f"{VLLM} names no server of vLLM's (http://HOST:8000/v1)")
    llm = load_llm(httpx.get(f"{url}/models").json()["data"][0]["root"], dtype="float32")
    engine = VllmEngine(url, llm, **LIMITS | {"longest_prompt": 300})
    rng, table = np.random.default_rng(0), np.asarray(llm.embedding[...])
    prompts = [table[rng.integers(0, len(table), n)] for n in (3, 9, LONGEST)]
    prompts = [llm.config.embedding_scale * rows for rows in prompts]
    readers = [Reader(engine, rows) for rows in prompts]
    for rows, reader in zip(prompts, readers, strict=True):
        (expected,) = np.asarray(
            generate(llm, rows[None], np.ones((1, len(rows)), bool), max_new_tokens=T)
        )
        tokens = reader.wait().tokens
        assert tokens == expected[: len(tokens)].tolist()
        assert len(tokens) == T or expected[len(tokens)] in llm.config.eos_ids

    def cached() -> float:
        told = httpx.get(f"{url.removesuffix('/v1')}/metrics").text
        (hits,) = re.findall(r"\nvllm:prefix_cache_hits_total\S* (\S+)", told)
        return float(hits)

    # Embeddings that begin alike are read once, so soft tokens behind an input share it.
    rows = llm.config.embedding_scale * table[rng.integers(0, len(table), 300)]
    Reader(engine, rows[:290]).wait()
    before = cached()
    Reader(engine, rows).wait()
    assert cached() - before >= 256
    engine.close()
