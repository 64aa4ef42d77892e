"""Answers by vLLM, or any server of its form, that was started with `--enable-prompt-embeds`."""

import asyncio
import concurrent.futures
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import httpx
import jax.numpy as jnp
import numpy as np

from pplug_jax.errors import InputError
from pplug_jax.llm import LLM
from pplug_jax.serve.engine.base import Emit, Engine, Finished, Request, Sampling, Token
from pplug_jax.serve.engine.torch_file import prompt_embeds

PAUSE = 1.0  # seconds between two looks whether the server is well
SILENCE = 300.0  # seconds without a byte, after which a request has failed
KEY = "VLLM_API_KEY"  # the environment variable that vLLM reads its own key from
# What an answer raises that is not such a server's.
ANSWERS_NOT = (httpx.HTTPError, ValueError, LookupError, TypeError)


class _Full(Exception):
    """The server takes no more requests for now."""


class _Refused(Exception):
    """The server does not take this request, but may take others."""


class _Asked(Request):
    """A request, and the task that reads its answer once there is one."""

    task: asyncio.Task[Finished]

    def __init__(self, engine: "VllmEngine", rows: np.ndarray, sampling: Sampling, emit: Emit):
        super().__init__(rows, sampling, emit)
        self.engine = engine

    def cancel(self) -> None:
        super().cancel()
        self.engine.call(lambda: self.task.cancel())


class VllmEngine(Engine):
    """An engine that asks a server, which has the LLM that the plug was trained with.

    The server reads whole prompts as embeddings. One thread sends all requests and reads all
    answers, and looks now and then whether the server is well. A closed connection is how the
    server learns that somebody left.

    Args:
        url: the server's, as OpenAI's clients take it: it ends in /v1.
        llm: the LLM, of which shapes suffice.
        longest_prompt: the most rows of a prompt.
        max_new_tokens: the most new tokens.
        slots: how many requests the server is given at a time.
        waiting: how many may wait besides.

    Raises:
        InputError: the server does not answer, or not what it must.
    """

    def __init__(
        self,
        url: str,
        llm: LLM,
        *,
        longest_prompt: int,
        max_new_tokens: int,
        slots: int = 32,
        waiting: int = 256,
    ):
        super().__init__(longest_prompt, max_new_tokens, waiting)
        self.url, self.slots = url.rstrip("/"), slots
        self._size, self._dtype = llm.config.hidden_size, jnp.dtype(llm.embedding.dtype)
        self._stops = list(llm.config.eos_ids)
        self._requests: set[_Asked] = set()
        self.running = 0  # requests that the server was given
        self._loop = asyncio.new_event_loop()
        begun: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(begun,), name="engine", daemon=True)
        self._thread.start()
        try:
            begun.result()
        except (*ANSWERS_NOT, httpx.InvalidURL, _Full, _Refused) as error:
            raise InputError(f"--engine_url={url}: {_said(error)}") from error

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._requests) - self.running

    def submit(self, rows: np.ndarray, sampling: Sampling, emit: Emit) -> Request:
        self._check_lengths(rows, sampling)
        request = _Asked(self, rows, sampling, emit)
        with self._news:
            self._check_room(len(self._requests) - self.slots)
            self._requests.add(request)
        self.call(lambda: self._begin(request))
        return request

    def _told(self, failure: BaseException) -> str:
        return f"{self.url} failed: {_said(failure)}"

    def close(self) -> None:
        with self._news:
            self._ending = True
            self._news.wait_for(lambda: not self._requests)
        self.call(self._end)
        self._thread.join()

    def call(self, function: Callable[[], object]) -> None:
        """Call a function in the engine's thread, unless that has ended: then nothing runs."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    # All below runs in the engine's thread.

    def _run(self, begun: concurrent.futures.Future[None]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._live(begun))

    async def _live(self, begun: concurrent.futures.Future[None]) -> None:
        self._ended = asyncio.Event()
        self._places = asyncio.Semaphore(self.slots)
        key = os.environ.get(KEY)
        async with httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(SILENCE, connect=5),
            # Of the server's 5 seconds: or a request may meet a connection that it just closed.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
        ) as self._client:
            try:
                await self._introduce()
            except Exception as error:  # noqa: BLE001  whoever made the engine is told
                begun.set_exception(error)
                return
            begun.set_result(None)
            await self._watch()

    def _end(self) -> None:
        self._ended.set()

    async def _introduce(self) -> None:
        """Find the model's name, and try what every request does.

        Raises:
            _Refused: the server is no such one.
        """
        response = await self._client.get("/models")
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        card = response.json()["data"][0]
        self._model = card["id"]
        longest = self.longest_prompt + self.max_new_tokens
        if (most := card.get("max_model_len")) is not None and most < longest:
            raise _Refused(
                f"it reads and writes {most} tokens, and prompts and answers of this plug may have "
                f"{longest}; start it with --max-model-len={longest}"
            )
        rows = np.zeros((1, self._size), np.float32)
        await self._read(self._body(rows, Sampling(1)), lambda token: None)

    async def _watch(self) -> None:
        """Note whether the server is well, until the engine ends."""
        while not self._ended.is_set():
            try:
                health = await self._client.get(self.url.removesuffix("/v1") + "/health", timeout=5)
                self._note(None if health.is_success else _refusal(health.status_code, b""))
            except httpx.HTTPError as error:
                self._note(error)
            try:
                await asyncio.wait_for(self._ended.wait(), PAUSE)
            except TimeoutError:
                continue

    def _note(self, failure: Exception | None) -> None:
        with self._news:
            self._failure = failure

    def _begin(self, request: _Asked) -> None:
        request.task = asyncio.ensure_future(self._answer(request))
        request.task.add_done_callback(lambda task: self._finish(request))

    def _finish(self, request: _Asked) -> None:
        cancelled = request.task.cancelled()
        request.emit(Finished("cancelled") if cancelled else request.task.result())
        with self._news:
            self._requests.remove(request)
            self._news.notify_all()

    async def _answer(self, request: _Asked) -> Finished:
        """Hand the tokens on as they come, and return why there are no more."""
        body = await asyncio.to_thread(self._body, request.rows, request.sampling)
        async with self._places:
            self.running += 1
            try:
                while True:
                    try:
                        return Finished(await self._read(body, request.emit))
                    except _Full:  # who waits here is told `Busy` before there are too many
                        await asyncio.sleep(PAUSE)
            except Exception as error:  # noqa: BLE001  of any kind: nobody may wait for it
                if not isinstance(error, _Refused):
                    self._note(error)
                return Finished("error", self._told(error))
            finally:
                self.running -= 1

    def _body(self, rows: np.ndarray, sampling: Sampling) -> bytes:
        """Return a request, which sets all that else the model's own defaults would."""
        body = {
            "model": self._model,
            "prompt_embeds": prompt_embeds(rows.astype(self._dtype)),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "stop_token_ids": self._stops,
            "logprobs": 0,
            "return_token_ids": True,
            "stream": True,
        }
        return json.dumps(body).encode()

    async def _read(self, body: bytes, emit: Callable[[Token], None]) -> str:
        """Hand the tokens of an answer on as they come, and return why there are no more.

        Raises:
            _Full: the server has no place now.
            _Refused: it does not take the request.
            httpx.HTTPError: it does not answer.
            ValueError, LookupError, TypeError: what it answers is no such stream.
        """
        headers = {"Content-Type": "application/json"}
        reason: str | None = None
        posted = self._client.stream("POST", "/completions", content=body, headers=headers)
        async with posted as response:
            if response.status_code == 429:
                raise _Full("it takes no more requests now")
            if response.status_code != 200:
                raise _refusal(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                kind, _, data = line.partition(":")
                if kind != "data" or data.strip() == "[DONE]":
                    continue
                for choice in json.loads(data)["choices"]:
                    for token in _tokens(choice):
                        if token.id not in self._stops:
                            emit(token)
                    reason = choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise ValueError(f"it broke an answer off ({reason})")
        return reason


def _tokens(choice: dict[str, Any]) -> list[Token]:
    """Return the new tokens of a part of an answer."""
    if (ids := choice.get("token_ids")) is None:
        raise ValueError("it gives no token ids, which `return_token_ids` asks for")
    values = choice["logprobs"]["token_logprobs"] if ids else []
    return [Token(*pair) for pair in zip(ids, values, strict=True)]


def _refusal(status: int, content: bytes) -> Exception:
    """Return what a response that is no answer tells: of the request, or of the server."""
    if status >= 500:
        return ValueError(f"it answers {status}")
    try:
        reason = json.loads(content)["error"]
        reason = reason["message"] if isinstance(reason, dict) else reason
    except (ValueError, LookupError, TypeError):
        reason = "no reason given"
    return _Refused(f"it answers {status}: {reason}")


def _said(error: BaseException) -> str:
    kind = type(error).__name__
    return f"no server answers ({kind})" if isinstance(error, httpx.HTTPError) else str(error)
