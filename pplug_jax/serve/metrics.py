"""What a server counts, under vLLM's names with `pplug:` in front; it counts nothing of a text."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ITEMS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 512)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"pplug:{name}", about, labels, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"pplug:{name}", about, buckets=buckets, registry=registry)

        self.prompt_tokens = counter("prompt_tokens", "Rows of prompts.")
        self.generation_tokens = counter("generation_tokens", "New tokens.")
        self.request_success = counter("request_success", "Answers.", "finished_reason")
        self.encode_items = counter("encode_items", "Items that were encoded.")
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From the request to its first token."
        )
        self.latency = histogram("e2e_request_latency_seconds", "From the request to its end.")
        self.persona_seconds = histogram(
            "persona_seconds", "Encoding the input and weighing the history."
        )
        self.store_seconds = histogram("store_seconds", "Reading a history.")
        self.history_items = histogram("history_items", "Items of a history.", ITEMS)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when it is asked for."""
        Gauge(f"pplug:{name}", about, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """Return all of them in Prometheus' text form."""
        return generate_latest(self._registry)
