"""A server on loopback, and those who ask it."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn

from pplug_jax.serve.app import Service, make_app
from pplug_jax.serve.build import load_plug, make_service
from pplug_jax.serve.store import Store


def until(is_so: Callable[[], bool]) -> None:
    """Waits for something, and fails if it does not come."""
    deadline = time.monotonic() + 30
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_so()


class Running:
    """A server on loopback."""

    def __init__(self, service: Service):
        self.service = service
        config = uvicorn.Config(make_app(service), port=0, log_level="warning", access_log=False)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.keys = [service.store.create_key(tenant) for tenant in ("one", "two")]

    def openai(self, key: int = 0, **settings: Any) -> openai.OpenAI:
        settings = {"max_retries": 0, "timeout": 60} | settings
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[key], **settings)

    def ask(self, method: str, path: str, key: int = 0, **request: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[key]}"} | request.pop("headers", {})
        return self.http.request(method, path, headers=headers, **request)

    def stop(self) -> None:
        self.server.should_exit = True  # as SIGTERM does
        self.thread.join()
        self.http.close()


@contextlib.contextmanager
def serving(finished: Path, store: Path) -> Iterator[Running]:
    """A finished run's plug, which a `Personalizer` of the same models answers for greedily."""
    personalizer = load_plug(str(finished))
    running = Running(
        make_service(finished.name, personalizer, Store(f"sqlite:///{store}"), slots=8)
    )
    models = personalizer.models
    models.config = models.config.changed({"eval.num_beams": 1})
    yield running
    running.stop()
