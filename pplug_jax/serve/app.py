"""The server: personas and their items, and answers in OpenAI's form.

No prompt, history or answer is ever logged: the server writes no log of requests, and an error that
nobody foresaw is told by its kind and place alone.
"""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import unquote

import numpy as np
import safetensors.numpy
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import AfterValidator
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pplug_jax.data.lamp import check_input
from pplug_jax.errors import InputError
from pplug_jax.serve.engine import Busy, Engine, Event, Finished, Sampling, Token, Unwell
from pplug_jax.serve.engine.torch_file import prompt_embeds
from pplug_jax.serve.metrics import Metrics
from pplug_jax.serve.page import page
from pplug_jax.serve.people import People, Persona
from pplug_jax.serve.protocol import Chat, Completion, Items, Personalize, SoftPrompt
from pplug_jax.serve.store import (
    Caller,
    Conflict,
    Store,
    StoreUnavailable,
    UnknownItem,
    UnknownPersona,
    check_name,
    read_lines,
)
from pplug_jax.serve.text import TextStream

LARGEST_BODY = 4 << 20  # bytes
MOST_ITEMS = 1000  # of one call
PATIENCE = 0.5  # seconds between two looks whether a client that waits is still there
# The status of an error, and the type that OpenAI's clients know it by; the first that fits.
STATUS: dict[type[Exception], tuple[int, str]] = {
    UnknownPersona: (404, "not_found_error"),
    UnknownItem: (404, "not_found_error"),
    Conflict: (409, "conflict_error"),
    Busy: (429, "rate_limit_error"),
    StoreUnavailable: (503, "server_error"),
    Unwell: (503, "server_error"),
    InputError: (400, "invalid_request_error"),
}


class Unauthorized(Exception):
    """The request has no key that is in use."""


@dataclasses.dataclass(frozen=True)
class Service:
    """What a server needs.

    Attributes:
        name: the model's name for clients.
        people: the personas.
        engine: answers.
        metrics: counts.
    """

    name: str
    people: People
    engine: Engine
    metrics: Metrics

    @property
    def store(self) -> Store:
        return self.people.store


def _error(status: int, kind: str, message: str) -> JSONResponse:
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(content, status, headers)


def _error_response(error: Exception) -> JSONResponse:
    """Return the response that tells of an error."""
    if isinstance(error, Unauthorized):
        return _error(401, "authentication_error", "no API key of this server's is given")
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return _error(400, "invalid_request_error", f"{where}: {first['msg']}")
    if isinstance(error, HTTPException):
        return _error(error.status_code, "invalid_request_error", str(error.detail))
    for kind, (status, name) in STATUS.items():
        if isinstance(error, kind):
            return _error(status, name, str(error))
    place = traceback.extract_tb(error.__traceback__)[-1]
    print(f"error: {type(error).__name__} in {place.filename}:{place.lineno}", file=sys.stderr)
    return _error(500, "server_error", "the server has a fault; its log says where")


def _line(error: Exception) -> str:
    return bytes(_error_response(error).body).decode()


# A part of a path, which is quoted until then.
Name = Annotated[str, AfterValidator(lambda text: unquote(text))]


class _TooLarge(Exception):
    """A request's body is larger than may be."""


class Guard:
    """Bounds the bodies of requests, and tells of every error in one form."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Matched before it is unquoted, for a name may have slashes.
        scope["path"] = scope["raw_path"].decode("ascii", "replace")
        size, begun = 0, False

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise _TooLarge
            return message

        async def noting(message: Message) -> None:
            nonlocal begun
            if size <= LARGEST_BODY:  # FastAPI makes another answer of `_TooLarge`
                begun = True
                await send(message)

        try:
            await self.app(scope, bounded, noting)
        except _TooLarge:
            pass
        except Exception as error:  # noqa: BLE001  or uvicorn would log its text
            if not begun:
                await _error_response(error)(scope, receive, send)
        if size > LARGEST_BODY and not begun:
            text = f"the body is larger than {LARGEST_BODY} bytes; send less at a time"
            await _error(413, "invalid_request_error", text)(scope, receive, send)


class Answer:
    """One choice of a request, under way.

    Args:
        service: the server.
        rows: (L, D), the prompt.
        sampling: how to go on.
        stops: texts that end it.
    """

    def __init__(self, service: Service, rows: np.ndarray, sampling: Sampling, stops: list[str]):
        self.service, self.began = service, time.monotonic()
        self.tokens: list[Token] = []
        self.reason = ""
        tokenizer = service.people.personalizer.models.tokenizer
        self.stream = TextStream(lambda ids: tokenizer.decode(np.array(ids, np.int32)), stops)
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._request = service.engine.submit(rows, sampling, emit)
        service.metrics.prompt_tokens.inc(len(rows))

    async def parts(self) -> AsyncIterator[tuple[str, list[Token]]]:
        """Yield the text as it comes, with its tokens.

        Raises:
            Unwell: the engine failed.
        """
        metrics, sent = self.service.metrics, 0
        try:
            while not self.reason:
                event = await self._events.get()
                if isinstance(event, Finished):
                    event.check()
                    self.reason = event.reason
                    new = self.stream.end()
                else:
                    self.tokens.append(event)
                    if len(self.tokens) == 1:
                        metrics.time_to_first_token.observe(time.monotonic() - self.began)
                    new = self.stream.push(event.id)
                    if self.stream.stopped:
                        self.reason = "stop"
                if new:
                    yield new, self.tokens[sent:]
                    sent = len(self.tokens)
        except Unwell:
            self.reason = "error"
            raise
        finally:
            self._request.cancel()
            metrics.generation_tokens.inc(len(self.tokens))
            metrics.latency.observe(time.monotonic() - self.began)
            metrics.request_success.labels(self.reason or "cancelled").inc()

    def cancel(self) -> None:
        """Give up an answer that nobody reads."""
        self._request.cancel()

    async def whole(self, http: Request) -> str:
        """Return the whole text; give up if the client goes away.

        Raises:
            Unwell: the engine failed.
        """

        async def read() -> None:
            async for _ in self.parts():
                pass

        reading = asyncio.ensure_future(read())
        try:
            while not (await asyncio.wait([reading], timeout=PATIENCE))[0]:
                if await http.is_disconnected():
                    break
            else:
                reading.result()
        finally:
            if not reading.done():
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading
        return self.stream.text


def make_app(service: Service, *, ui: bool = True) -> FastAPI:
    """Return the server's application, with the page at `/` or without."""
    people, store, engine, metrics = (
        service.people,
        service.store,
        service.engine,
        service.metrics,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close)
        await run_in_threadpool(people.close)
        store.close()

    app = FastAPI(title="pplug_jax", lifespan=lifespan)
    app.add_middleware(Guard)
    for kind in (Unauthorized, RequestValidationError, HTTPException, *STATUS):
        app.add_exception_handler(kind, lambda request, error: _error_response(error))
    local = Caller(store.tenant("local"))

    def caller(http: Request) -> Caller:
        """Return whose key the request has; before any key was made all are one tenant."""
        kind, _, key = http.headers.get("authorization", "").partition(" ")
        caller = store.caller(key.strip()) if kind.lower() == "bearer" else None
        if caller is None and store.has_keys():
            raise Unauthorized
        return caller or local

    Who = Annotated[Caller, Depends(caller)]

    async def persona_of(who: Caller, name: str | None, input: str) -> Persona:
        return await run_in_threadpool(people.persona, who.tenant, name, input)

    def rows_of(persona: Persona) -> np.ndarray:
        return people.personalizer.inputs_embeds(persona.made.prompt, persona.made.soft)

    # Answers

    async def answer(ask: Chat | Completion, who: Caller, http: Request) -> Response:
        ask.check()
        input, began = ask.text(), int(time.time())
        persona = await persona_of(who, ask.name, input)
        rows = await run_in_threadpool(rows_of, persona)
        chat = isinstance(ask, Chat)
        samplings = ask.samplings(engine.max_new_tokens)
        answers: list[Answer] = []
        try:
            for sampling in samplings:
                answers.append(Answer(service, rows, sampling, ask.stops))
        except Busy:
            for begun_answer in answers:
                begun_answer.cancel()
            raise
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": began,
            "model": service.name,
        }
        if ask.persona.explain:
            weighed = zip(persona.items, persona.made.weights.tolist(), strict=True)
            head["persona"] = {"items": [{"id": id, "weight": w} for id, w in weighed]}
        known = "known" if persona.known else "unknown" if ask.name else "none"
        headers = {"x-pplug-persona": known, "x-pplug-items": str(len(persona.items))}

        def usage() -> dict[str, int]:
            new = sum(len(answer.tokens) for answer in answers)
            prompt = len(rows)
            return {
                "prompt_tokens": prompt,
                "completion_tokens": new,
                "total_tokens": prompt + new,
            }

        def logprobs(tokens: list[Token]) -> dict[str, Any] | None:
            if ask.logprobs is None or ask.logprobs is False:
                return None
            names = people.personalizer.models.tokenizer.tokenizer.convert_ids_to_tokens(
                [token.id for token in tokens]
            )
            values = [token.log_probability for token in tokens]
            if not chat:
                return {"tokens": names, "token_logprobs": values}
            return {
                "content": [
                    {"token": name, "logprob": value, "bytes": None, "top_logprobs": []}
                    for name, value in zip(names, values, strict=True)
                ]
            }

        def choice(
            index: int, text: str, tokens: list[Token], reason: str | None, *, part: bool
        ) -> dict[str, Any]:
            content: dict[str, Any] = {"text": text}
            if chat:
                message = {"role": "assistant", "content": text} if text or not part else {}
                content = {"delta" if part else "message": message}
            return content | {"index": index, "logprobs": logprobs(tokens), "finish_reason": reason}

        if not ask.stream:
            texts = await asyncio.gather(*(answer.whole(http) for answer in answers))
            kind = "chat.completion" if chat else "text_completion"
            choices = [
                choice(i, text, answer.tokens, answer.reason, part=False)
                for i, (text, answer) in enumerate(zip(texts, answers, strict=True))
            ]
            content = head | {"object": kind, "choices": choices, "usage": usage()}
            return JSONResponse(content, headers=headers)

        async def events() -> AsyncIterator[str]:
            kind = "chat.completion.chunk" if chat else "text_completion"

            def event(*choices: dict[str, Any], **more: Any) -> str:
                return f"data: {json.dumps(head | {'object': kind, 'choices': choices} | more)}\n\n"

            queue: asyncio.Queue[tuple[int, str, list[Token], str | None] | Exception]
            queue = asyncio.Queue()

            async def read(index: int) -> None:
                try:
                    async for text, tokens in answers[index].parts():
                        queue.put_nowait((index, text, tokens, None))
                    queue.put_nowait((index, "", [], answers[index].reason))
                except Unwell as error:
                    queue.put_nowait(error)

            readers = [asyncio.ensure_future(read(i)) for i in range(len(answers))]
            try:
                left = len(answers)
                while left:
                    piece = await queue.get()
                    if isinstance(piece, Exception):
                        yield f"data: {_line(piece)}\n\n"
                        return
                    yield event(choice(*piece, part=True))
                    left -= piece[3] is not None
                if ask.stream_options and ask.stream_options.include_usage:
                    yield event(usage=usage())
                yield "data: [DONE]\n\n"
            finally:  # also if the client goes away
                for reader in readers:
                    reader.cancel()

        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)

    @app.post("/v1/chat/completions")
    async def chat_completions(ask: Chat, who: Who, http: Request) -> Response:
        return await answer(ask, who, http)

    @app.post("/v1/completions")
    async def completions(ask: Completion, who: Who, http: Request) -> Response:
        return await answer(ask, who, http)

    @app.post("/v1/personalize")
    async def personalize(ask: Personalize, who: Who, http: Request) -> Response:
        most = ask.max_tokens or engine.max_new_tokens
        sampling = Sampling(most, ask.temperature, ask.top_p, ask.seed)
        check_input(ask.input)
        for name in ask.users:
            check_name(name, "a persona's name")
        if most > engine.max_new_tokens:
            raise InputError(f"max_tokens must be from 1 to {engine.max_new_tokens}, not {most}")
        # Some at a time, so that others find places.
        places = asyncio.Semaphore(8)

        async def one(name: str) -> dict[str, Any]:
            async with places:
                persona = await persona_of(who, name, ask.input)
                rows = await run_in_threadpool(rows_of, persona)
                while True:
                    try:
                        under_way = Answer(service, rows, sampling, [])
                        break
                    except Busy:
                        await asyncio.sleep(0.1)
                text = await under_way.whole(http)
            count = len(persona.items)
            return {"user": name, "known": persona.known, "items": count, "answer": text}

        async def lines() -> AsyncIterator[str]:
            tasks = [asyncio.ensure_future(one(name)) for name in ask.users]
            try:
                for done in asyncio.as_completed(tasks):
                    try:
                        yield json.dumps(await done) + "\n"
                    except (InputError, Unwell) as error:
                        yield _line(error) + "\n"
                        return
            finally:
                for task in tasks:
                    task.cancel()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    # Personas and items

    @app.get("/v1/personas")
    def list_personas(
        who: Who, after: str = "", limit: Annotated[int, Query(ge=1, le=1000)] = 100
    ) -> Any:
        names = store.personas(who.tenant, after, limit)
        return {"personas": names, "next": names[-1] if len(names) == limit else None}

    @app.get("/v1/personas/{name}/export")
    def export(name: Name, who: Who) -> Response:
        store.count(who.tenant, name)  # an unknown one is an error, not an empty file
        lines = store.export(who.tenant, name)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    def add(who: Caller, name: str, items: list[Any]) -> Any:
        if len(items) > MOST_ITEMS:
            raise InputError(f"at most {MOST_ITEMS} items can be added at once; send several calls")
        added = store.add(who.tenant, name, people.check(items))
        people.added()
        return {"added": added.new, "known": added.known}

    @app.post(
        "/v1/personas/{name}/items",
        openapi_extra={
            "requestBody": {
                "content": {
                    "application/json": {"schema": Items.model_json_schema()},
                    "application/x-ndjson": {"schema": {"type": "string"}},
                }
            }
        },
    )
    async def add_items(name: Name, who: Who, http: Request) -> Any:
        try:
            text = (await http.body()).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"the body is not UTF-8: {error}") from error
        if http.headers.get("content-type", "").startswith("application/json"):
            try:
                items: list[Any] = Items.model_validate_json(text).items
            except ValueError as error:
                raise InputError(
                    "the body must be {'items': [..]}, at most 1000 objects, or JSON lines with "
                    "the content type application/x-ndjson"
                ) from error
        else:
            items = list(read_lines(text))
        return await run_in_threadpool(add, who, name, items)

    @app.get("/v1/personas/{name}/items")
    def list_items(
        name: Name,
        who: Who,
        after: Annotated[int, Query(ge=0, lt=2**62)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> Any:
        rows = store.page(who.tenant, name, after, limit)
        following = rows[-1].place if len(rows) == limit else None
        return {"items": [stored.item for stored in rows], "next": following}

    @app.get("/v1/personas/{name}/items/{id:path}")
    def get_item(name: Name, id: Name, who: Who) -> Any:
        return store.item(who.tenant, name, id)

    @app.put("/v1/personas/{name}/items/{id:path}")
    def put_item(name: Name, id: Name, item: dict[str, Any], who: Who) -> Any:
        people.check([item])
        store.replace(who.tenant, name, id, item)
        people.added()
        return store.item(who.tenant, name, id)

    @app.delete("/v1/personas/{name}/items/{id:path}")
    def remove_item(name: Name, id: Name, who: Who) -> Any:
        store.remove(who.tenant, name, id)
        return {"id": id, "erased": 1}

    @app.post("/v1/personas/{name}/soft_prompt")
    def soft_prompt(name: Name, ask: SoftPrompt, who: Who) -> Response:
        store.count(who.tenant, name)  # an unknown one is an error here
        personalizer = people.personalizer
        if personalizer.changes_llm:
            raise InputError("the plug changes its LLM by a LoRA, so it answers here alone")
        if personalizer.method.retrieval and ask.rows != "all":
            raise InputError("the plug's prompts show items too; ask for all rows, 'rows': 'all'")
        persona = people.persona(who.tenant, name, ask.input)
        rows = rows_of(persona) if ask.rows == "all" else persona.made.soft
        about = {
            "place": "behind" if personalizer.layout.behind else "front",
            "prefix_tokens": str(len(personalizer.models.tokenizer.prefix)),
            "scale": str(float(personalizer.persona.scale[...])),
            "dtype": str(rows.dtype),
            "items": str(len(persona.items)),
        }
        headers = {f"x-pplug-{key.replace('_', '-')}": value for key, value in about.items()}
        if ask.format == "vllm":
            return Response(prompt_embeds(rows), media_type="text/plain", headers=headers)
        content = safetensors.numpy.save({"inputs_embeds": rows}, metadata=about)
        return Response(content, media_type="application/octet-stream", headers=headers)

    @app.put("/v1/personas/{name}")
    def put_persona(name: Name, who: Who, response: Response) -> Any:
        response.status_code = 201 if store.put_persona(who.tenant, name) else 200
        return {"id": name, "items": store.count(who.tenant, name)}

    @app.get("/v1/personas/{name}")
    def get_persona(name: Name, who: Who) -> Any:
        return {"id": name, "items": store.count(who.tenant, name)}

    @app.delete("/v1/personas/{name}")
    def erase_persona(name: Name, who: Who) -> Any:
        return {"id": name, "erased": store.erase(who, name)}

    # About the server

    @app.get("/v1/models")
    def models(who: Who) -> Any:
        card = {"id": service.name, "object": "model", "created": 0, "owned_by": "pplug_jax"}
        longest = engine.longest_prompt + engine.max_new_tokens
        return {"object": "list", "data": [card | {"max_model_len": longest}]}

    @app.get("/health")
    def health() -> Response:
        engine.check()
        store.has_keys()  # or the store does not answer
        return Response()

    @app.get("/metrics")
    def counted() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if ui:
        task = people.personalizer.models.task
        fields = list(dict.fromkeys([*task.fields, *task.optional, "date"]))
        about = {"model": service.name, "task": task.name, "fields": fields}
        html, safety = page(about | {"required": list(task.fields)})

        @app.get("/", include_in_schema=False)
        def shown() -> Response:
            return HTMLResponse(html, headers=safety)

    return app
