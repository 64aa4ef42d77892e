"""Many people at a server: `python -m benchmarks.serve [--llm_path=DIR --encoder_path=DIR]`

People of 5 to 100 stored items ask one question each through OpenAI's client, so many of them at a
time, and stream their answers. In turn, transformers' `generate` answers behind the same HTTP, for
everybody who waits at once, and must say the same. Before, `Personalizer.generate` answers one
after another, from the same histories. At last one long input is answered for many by
/v1/personalize, with soft tokens in front of it, and behind it, where it is read once.

Servers and clients share a process and its machine, which counts against the servers. The plugs are
untrained, which changes no time, and no answer ends early. By default LLM and encoder are the
bundled ones. Ratios are of tokens a second of CPU time, which others on the machine hardly change
if the benchmark has one core (`taskset --cpu-list 0`); threads of several wait for each other.
"""

import asyncio
import collections
import dataclasses
import logging
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import jax
import numpy as np
import openai
import torch
import transformers
import uvicorn
from absl import app, flags

from benchmarks.timing import report
from configs import common
from pplug_jax.feed.retrieval import demonstration_prompt
from pplug_jax.methods.table import METHODS
from pplug_jax.serve.app import Service, make_app
from pplug_jax.serve.build import load_plug, make_service
from pplug_jax.serve.engine import Engine, Finished, Request, Sampling, Token
from pplug_jax.serve.engine.base import Emit
from pplug_jax.serve.handover import write_plug
from pplug_jax.serve.metrics import Metrics
from pplug_jax.serve.people import People
from pplug_jax.serve.personalizer import GROUPS, Personalizer
from pplug_jax.serve.store import Store
from pplug_jax.session import Models
from pplug_jax.session.models import model_path
from pplug_jax.session.weights import new_weights
from pplug_jax.settings import Settings

FLAGS = flags.FLAGS
flags.DEFINE_string("llm_path", "assets/tiny_llama", "A directory with an LLM.")
flags.DEFINE_string("encoder_path", "assets/tiny_bert", "A directory with an encoder.")
flags.DEFINE_list("users", ["1", "8", "32", "128"], "People at a time.")
flags.DEFINE_integer("alone", 3, "People who are answered one after another.")
flags.DEFINE_integer("tokens", 32, "New tokens of an answer.")
flags.DEFINE_integer("slots", 32, "Of the engine.")
flags.DEFINE_integer("shared", 8, "People who get an answer to one input.")

INPUT = 256  # tokens of the longest input
PLACES = ("front", "behind")
ITEM = (
    "In year {i} person {p} has written a long letter on rivers, bridges, boats and the price of "
    "maps, which nobody printed, and then a short one on what the first had forgotten to say."
)
HEADER = (
    "answered by",
    "people",
    "tokens/s",
    "of CPU",
    "over one by one",
    "first text p50",
    "p99",
    "answer p50",
    "p99",
    "store",
    "persona",
)


class Told(NamedTuple):
    """An answer, and what it took."""

    text: str
    first: float
    whole: float
    tokens: int


class Theirs(Engine):
    """transformers' `generate`, for as many as wait at once.

    Args:
        path: the LLM's directory.
        slots: how many it answers together.
        limits: of `Engine`.
    """

    def __init__(self, path: Path, slots: int, **limits: int):
        super().__init__(**limits, waiting=10**6)
        self.llm = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.llm.eval().generation_config.eos_token_id = None
        self._slots = slots
        self._waiting: collections.deque[Request] = collections.deque()
        self._answered: list[Request] = []
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, rows: np.ndarray, sampling: Sampling, emit: Emit) -> Request:
        request = Request(rows, sampling, emit)
        with self._news:
            self._waiting.append(request)
            self._news.notify()
        return request

    def close(self) -> None:
        """Leave it to the process' end."""

    def _work(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting)
                count = min(self._slots, len(self._waiting))
                self._answered = [self._waiting.popleft() for _ in range(count)]
            self._answer()

    @torch.inference_mode()
    def _answer(self) -> None:
        rows = [request.rows for request in self._answered]
        longest = max(map(len, rows))
        embeds = np.stack([np.pad(x, [(longest - len(x), 0), (0, 0)]) for x in rows])
        mask = np.arange(longest) >= longest - np.array([[len(x)] for x in rows])
        self.llm.generate(
            inputs_embeds=torch.from_numpy(embeds),
            attention_mask=torch.from_numpy(mask).long(),
            max_new_tokens=FLAGS.tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=self,
        )

    def put(self, tokens: torch.Tensor) -> None:
        """Take the next token of each, from `generate`; before the first it tells the prompts."""
        if tokens.ndim == 1:
            for request, token in zip(self._answered, tokens.tolist(), strict=True):
                request.emit(Token(token, 0.0))

    def end(self) -> None:
        for request in self._answered:
            request.emit(Finished("length"))


def read_settings(place: str) -> Settings:
    config = common.task_config("custom", "embedded")
    config.llm.update(path=FLAGS.llm_path, dtype="float32")
    config.encoder.path = FLAGS.encoder_path
    config.plug.update(num_persona_tokens=4, place=place)
    config.eval.update(num_beams=1, max_new_tokens=FLAGS.tokens)
    config.data.update(max_input_length=INPUT, max_target_length=FLAGS.tokens)
    return Settings.of(config)


def untrained(scratch: Path, place: str) -> Personalizer:
    """As if one had loaded a trained plug; no token of the LLM ends an answer."""
    models = Models(read_settings(place), scratch / "nothing")
    method = METHODS["pplug"]
    write_plug(models, new_weights(models, method, models.config), method, scratch / place)
    personalizer = load_plug(str(scratch / place), FLAGS.llm_path, FLAGS.encoder_path)
    llm = personalizer.models.llm
    llm.config = dataclasses.replace(llm.config, eos_ids=())
    return personalizer


def make_items(count: int) -> list[list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    return [
        [{"id": str(i), "text": ITEM.format(p=p, i=i)} for i in range(rng.integers(5, 101))]
        for p in range(count)
    ]


def fill(store: Store, people: People, items: list[list[dict[str, Any]]]) -> None:
    """Keep the items, encoded: any vectors take the same time to read."""
    rng, tenant = np.random.default_rng(0), store.tenant("local")
    for person, history in enumerate(items):
        name = f"person {person}"
        store.add(tenant, name, history)
        vectors = rng.normal(size=(len(history), people.personalizer.models.encoder.size))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        store.put_vectors(people.encoder, store.page(tenant, name), vectors)


def question(person: int) -> str:
    return f"Write a title for what person {person} has measured on long rivers: number {person}"


async def ask(client: openai.AsyncOpenAI, person: int) -> Told:
    began = time.perf_counter()
    first, tokens, text = 0.0, 0, ""
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
        else:
            first = first or time.perf_counter() - began
            text += chunk.choices[0].text
    return Told(text, first, time.perf_counter() - began, tokens)


async def ask_all(url: str, at_once: int, requests: int) -> list[Told]:
    places = asyncio.Semaphore(at_once)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600) as client:

        async def one(person: int) -> Told:
            async with places:
                return await ask(client, person)

        return await asyncio.gather(*map(one, range(requests)))


def start(service: Service) -> tuple[uvicorn.Server, threading.Thread, str]:
    config = uvicorn.Config(make_app(service), port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def totals(service: Service) -> np.ndarray:
    """The seconds so far of reading the store, and of making personas."""
    text = service.people.metrics.text().decode()
    names = ("store_seconds", "persona_seconds")
    parts = [text.partition(f"\npplug:{name}_sum ")[2].partition("\n")[0] for name in names]
    return np.array(parts, float)


class Clock:
    """Tells tokens a second since it was made, of time and of CPU time."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def rates(self, tokens: int) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        return {"tokens/s": tokens / wall, "tokens/CPU s": tokens / cpu}


def one_by_one(personalizer: Personalizer, items: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of a Personalizer that is asked for one person after another."""
    few = items[: FLAGS.alone]
    for _ in range(2):  # the first round compiles
        clock = Clock()
        for person, history in enumerate(few):
            personalizer.generate(question(person), history)
    return {"people": 1} | clock.rates(len(few) * FLAGS.tokens)


def under_load(service: Service, url: str, at_once: int) -> tuple[dict[str, Any], list[str]]:
    """The figures of so many people at a time, and what they were told."""
    before, clock = totals(service), Clock()
    told = asyncio.run(ask_all(url, at_once, max(4, at_once)))
    rates = clock.rates(sum(one.tokens for one in told))
    shares = (totals(service) - before) / sum(one.whole for one in told)
    return {
        "people": at_once,
        **rates,
        "first": np.percentile([one.first for one in told], (50, 99)).tolist(),
        "whole": np.percentile([one.whole for one in told], (50, 99)).tolist(),
        "shares": shares.tolist(),
    }, [one.text for one in told]


def for_many(service: Service, url: str) -> dict[str, Any]:
    """The figures of /v1/personalize with one long input."""
    input = "rivers " * INPUT
    body = {"input": input, "users": [f"person {p}" for p in range(FLAGS.shared)]}
    service.people.personalizer.encode_inputs([input] * sum(GROUPS))  # compiles for each
    for _ in range(2):  # the first round compiles the rest
        clock = Clock()
        httpx.post(f"{url}/v1/personalize", json=body, timeout=3600).raise_for_status()
    return {"people": FLAGS.shared} | clock.rates(FLAGS.shared * FLAGS.tokens)


def prompt_tokens(personalizer: Personalizer, history: list[dict[str, Any]]) -> dict[str, int]:
    """How many tokens the LLM reads: with a plug, and with retrieved items instead."""
    models, input = personalizer.models, question(0)
    found = {"plug": len(personalizer.inputs_embeds(input, personalizer.soft_prompt(input)))}
    for count in (1, 4):
        shown = demonstration_prompt(
            models.task, input, history[-count:], models.tokenizer.tokenizer, 10**6
        )
        found[f"{count} retrieved"] = len(models.tokenizer.prompt(shown, 10**6))
    return found


def row(record: dict[str, Any], alone: float) -> tuple[str, ...]:
    times = [f"{1000 * x:.0f} ms" for x in (*record.get("first", ()), *record.get("whole", ()))]
    shares = [f"{share:.1%}" for share in record.get("shares", ())]
    rates = [f"{record[of]:.1f}" for of in ("tokens/s", "tokens/CPU s")]
    ratio = f"{record['tokens/CPU s'] / alone:.1f}x"
    cells = (record["by"], str(record["people"]), *rates, ratio, *times, *shares)
    return *cells, *[""] * (len(HEADER) - len(cells))


def main(_: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    transformers.logging.disable_progress_bar()
    for client in ("httpx", "httpx2"):  # they tell of every request
        logging.getLogger(client).setLevel(logging.WARNING)
    items = make_items(128)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        store = Store(f"sqlite:///{scratch}/store.sqlite")
        front, behind = (
            make_service("any", untrained(scratch, place), store, slots=FLAGS.slots)
            for place in PLACES
        )
        personalizer = front.people.personalizer
        limits = {"longest_prompt": personalizer.longest_prompt, "max_new_tokens": FLAGS.tokens}
        theirs = Theirs(model_path(FLAGS.llm_path, "llm"), FLAGS.slots, **limits)
        peer = dataclasses.replace(front, engine=theirs, metrics=Metrics())
        fill(store, front.people, items)
        alone = one_by_one(personalizer, items)
        records = [{"by": "Personalizer"} | alone]
        servers = [start(service) for service in (front, peer, behind)]
        ours_url, peer_url, behind_url = (url for _, _, url in servers)
        personalizer.encode_inputs([question(0)] * sum(GROUPS))  # compiles for each
        asyncio.run(ask_all(ours_url, 32, 32))  # and what is left
        asyncio.run(ask_all(peer_url, 1, 1))
        for at_once in map(int, FLAGS.users):
            record, texts = under_load(front, ours_url, at_once)
            records.append({"by": "the server"} | record)
            if at_once > FLAGS.slots:  # which it would answer one batch after another
                continue
            record, others = under_load(peer, peer_url, at_once)
            record["equal"] = np.mean([a == b for a, b in zip(texts, others, strict=True)])
            assert record["equal"] > 0.9, record  # but for near ties
            records.append({"by": "transformers"} | record)
        for place, service, url in zip(
            PLACES, (front, behind), (ours_url, behind_url), strict=True
        ):
            records.append({"by": f"one input, soft tokens {place}"} | for_many(service, url))
        for server, thread, _ in servers:
            server.should_exit = True
            thread.join()
    read = prompt_tokens(personalizer, items[0])
    records.append({"prompt_tokens": read})
    told = ", ".join(f"{count} ({what})" for what, count in read.items())
    title = f"answers of {FLAGS.tokens} tokens, {FLAGS.slots} slots; tokens of a prompt: {told}"
    report(
        "serve", title, HEADER, [row(each, alone["tokens/CPU s"]) for each in records[:-1]], records
    )


if __name__ == "__main__":
    app.run(main)
