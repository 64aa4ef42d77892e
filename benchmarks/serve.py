"""Many people at a server: `python -m benchmarks.serve [--llm_path=DIR] [--users=1,8,32]`

People of 5 to 100 stored items ask one question each through OpenAI's client, so many of them at a
time, and stream their answers; whoever has finished is followed by the next. Beside it the same
questions are answered by `Personalizer.generate`, one after another, from the same histories.
Server and clients share a process and its machine, which counts against the server. The plug is
untrained, which changes no time, and no answer ends early. By default the LLM is the bundled one.
"""

import asyncio
import dataclasses
import logging
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import openai
import uvicorn
from absl import app, flags

from benchmarks.timing import report
from configs import common
from pplug_jax.methods.table import METHODS
from pplug_jax.serve.app import Service, make_app
from pplug_jax.serve.build import load_plug, make_service
from pplug_jax.serve.handover import write_plug
from pplug_jax.serve.store import Store
from pplug_jax.session import Models
from pplug_jax.session.weights import new_weights
from pplug_jax.settings import Settings

FLAGS = flags.FLAGS
flags.DEFINE_string("llm_path", "assets/tiny_llama", "A directory with an LLM.")
flags.DEFINE_string("dtype", "float32", "Of the LLM.")
flags.DEFINE_list("users", ["1", "8", "32"], "People at a time.")
flags.DEFINE_integer("requests", 64, "Questions in all, of each number of people.")
flags.DEFINE_integer("alone", 8, "People who are answered one after another.")
flags.DEFINE_integer("tokens", 32, "New tokens of an answer.")
flags.DEFINE_integer("slots", 32, "Of the engine.")

HEADER = (
    "people",
    "tokens/s",
    "over one by one",
    "first token p50",
    "p99",
    "answer p50",
    "p99",
    "persona of an answer",
)


class Told(NamedTuple):
    """What one answer took."""

    first: float
    whole: float
    tokens: int


def read_settings() -> Settings:
    config = common.task_config("custom", "embedded")
    config.llm.update(path=FLAGS.llm_path, dtype=FLAGS.dtype)
    config.plug.num_persona_tokens = 4
    config.eval.update(num_beams=1, max_new_tokens=FLAGS.tokens)
    config.data.update(max_input_length=64, max_target_length=FLAGS.tokens)
    return Settings.of(config)


def write_untrained(output: Path) -> None:
    models = Models(read_settings(), output / "nothing")
    write_plug(models, new_weights(models, METHODS["pplug"], models.config), output)


def make_items(count: int) -> list[list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    return [
        [{"id": str(i), "text": f"person {p} on rivers {i}"} for i in range(rng.integers(5, 101))]
        for p in range(count)
    ]


async def ask(client: openai.AsyncOpenAI, person: int) -> Told:
    began = time.perf_counter()
    first, tokens = 0.0, 0
    stream = await client.completions.create(
        model="any",
        prompt=question(person),
        user=f"person {person}",
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        elif not first:
            first = time.perf_counter() - began
    return Told(first, time.perf_counter() - began, tokens)


def question(person: int) -> str:
    return f"Write a title for what person {person} has measured on long rivers: number {person}"


async def ask_all(url: str, at_once: int, requests: int) -> tuple[list[Told], float]:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
    places = asyncio.Semaphore(at_once)

    async def one(person: int) -> Told:
        async with places:
            return await ask(client, person)

    began = time.perf_counter()
    told = await asyncio.gather(*map(one, range(requests)))
    return told, time.perf_counter() - began


def start(service: Service) -> tuple[uvicorn.Server, threading.Thread, str]:
    config = uvicorn.Config(make_app(service), port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def total(service: Service, name: str) -> float:
    """A histogram's sum."""
    text = service.metrics.text().decode()
    return float(text.partition(f"\npplug:{name}_sum ")[2].partition("\n")[0])


def one_by_one(service: Service, items: list[list[dict[str, Any]]]) -> float:
    """Tokens a second of a Personalizer that is asked for one person after another."""
    personalizer, few = service.people.personalizer, items[: FLAGS.alone]
    for _ in range(2):  # the first round compiles
        began = time.perf_counter()
        for person, history in enumerate(few):
            personalizer.generate(question(person), history)
    return len(few) * FLAGS.tokens / (time.perf_counter() - began)


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    for client in ("httpx", "httpx2"):  # they tell of every request
        logging.getLogger(client).setLevel(logging.WARNING)
    items = make_items(FLAGS.requests)
    with tempfile.TemporaryDirectory() as scratch:
        write_untrained(Path(scratch) / "plug")
        store = Store(f"sqlite:///{scratch}/store.sqlite")
        personalizer = load_plug(f"{scratch}/plug", FLAGS.llm_path)
        service = make_service("any", personalizer, store, slots=FLAGS.slots)
        service.engine._stops = frozenset()  # so that all answers are as long
        people = service.people
        people.personalizer.models.llm.config = _endless(people.personalizer.models.llm.config)
        tenant = store.tenant("local")
        for person, history in enumerate(items):
            store.add(tenant, f"person {person}", history)
        people.added()
        while store.lacking(people.encoder, 1):
            time.sleep(0.1)
        alone = one_by_one(service, items)
        server, thread, url = start(service)
        asyncio.run(ask_all(url, 8, FLAGS.requests))  # compiles what is left
        rows = [("one by one", f"{alone:.0f}", "", "", "", "", "", "")]
        records: list[dict[str, Any]] = [{"people": 0, "tokens/s": alone}]
        for at_once in map(int, FLAGS.users):
            before = [total(service, name) for name in ("persona_seconds", "store_seconds")]
            told, seconds = asyncio.run(ask_all(url, at_once, FLAGS.requests))
            after = [total(service, name) for name in ("persona_seconds", "store_seconds")]
            rate = sum(one.tokens for one in told) / seconds
            first = np.percentile([one.first for one in told], (50, 99))
            whole = np.percentile([one.whole for one in told], (50, 99))
            share = (sum(after) - sum(before)) / sum(one.whole for one in told)
            records.append(
                {"people": at_once, "tokens/s": rate, "persona": share}
                | {"first": first.tolist(), "whole": whole.tolist()}
            )
            times = [f"{1000 * x:.0f} ms" for x in (*first, *whole)]
            rows.append(
                (str(at_once), f"{rate:.0f}", f"{rate / alone:.1f}x", *times, f"{share:.1%}")
            )
        server.should_exit = True
        thread.join()
    answers = f"{FLAGS.requests} answers of {FLAGS.tokens} tokens"
    title = f"{answers}, {FLAGS.slots} slots, {FLAGS.llm_path}"
    report("serve", title, HEADER, rows, records)


def _endless(config: Any) -> Any:
    """The LLM's config without a token that ends an answer."""
    return dataclasses.replace(config, eos_ids=())


if __name__ == "__main__":
    app.run(main)
