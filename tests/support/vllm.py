"""A stand-in for vLLM with `--enable-prompt-embeds`: its form of HTTP, one of our engines."""

import asyncio
import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from pplug_jax.serve.engine import Engine, Finished, Sampling

BODY = {"model", "prompt_embeds", "max_tokens", "temperature", "top_p", "seed", "stream"} | {
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "stop_token_ids",
    "logprobs",
    "return_token_ids",
}


class StandIn:
    """A server on loopback.

    Attributes:
        asked: the bodies of the requests, without the embeddings.
        full: so many of the next requests are told that there is no place.
        broken: every request is a fault.
        pause: seconds before every part of an answer, which then has one token.
        left: how many readers went away.
        card: what `/v1/models` says besides.
        ids: whether it tells the tokens' ids.
    """

    def __init__(self, engine: Engine, size: int):
        self.engine, self.size = engine, size
        self.asked: list[dict[str, Any]] = []
        self.full, self.broken, self.pause, self.left, self.ids = 0, False, 0.0, 0, True
        self.card: dict[str, Any] = {"max_model_len": 4096}
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        config = uvicorn.Config(self._app(), port=self.port, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/health")
        def health() -> Response:
            return Response(status_code=500 if self.broken else 200)

        @app.get("/v1/models")
        def models() -> Any:
            return {"data": [{"id": "tiny"} | self.card]}

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            body = await request.json()
            if set(body) != BODY:
                return _error(400, f"unexpected: {set(body) ^ BODY}")
            file = io.BytesIO(base64.b64decode(body.pop("prompt_embeds"), validate=True))
            rows = torch.load(file, weights_only=True)
            if rows.shape[1] != self.size:
                return _error(400, f"the embeddings have {rows.shape[1]} numbers")
            if self.broken:
                return _error(500, "EngineDeadError")
            if self.full:
                self.full -= 1
                return _error(429, "too many")
            self.asked.append(body)
            parts = self._parts(rows.float().numpy(), body)
            return StreamingResponse(parts, media_type="text/event-stream")

        return app

    async def _parts(self, rows: np.ndarray, body: dict[str, Any]) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()

        def emit(event: Any) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        sampling = Sampling(*(body[field] for field in Sampling._fields))
        request = self.engine.submit(rows, sampling, emit)
        try:
            reason = None
            while reason is None:
                # As vLLM does, all that came meanwhile together, and the token that ends it too.
                await asyncio.sleep(self.pause)
                come = [await events.get()]
                while not self.pause and not events.empty():
                    come.append(events.get_nowait())
                if isinstance(come[-1], Finished):
                    reason = come.pop().reason
                ids, values = [token.id for token in come], [x.log_probability for x in come]
                if reason == "stop":
                    ids, values = [*ids, body["stop_token_ids"][0]], [*values, -0.5]
                choice: dict[str, Any] = {"index": 0, "text": "?", "finish_reason": reason}
                choice["logprobs"] = {"token_logprobs": values} if ids else None
                if self.ids:
                    choice["token_ids"] = ids
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            request.cancel()


def _error(status: int, message: str) -> JSONResponse:
    content = {"error": {"message": message, "type": "BadRequestError", "code": status}}
    return JSONResponse(content, status)
