"""Prometheus metrics of the server. Each app has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
GAUGES = {
    "running": ("requests_running", "Requests in the engine's batch"),
    "waiting": ("requests_waiting", "Requests that wait for the engine"),
    "kv_blocks_used": ("kv_blocks_used", "Blocks of the KV cache in use"),
    "kv_blocks_total": ("kv_blocks_total", "Blocks of the KV cache"),
}


class Metrics:
    """`stats` gives the engine's gauges; those that GAUGES does not name are shown under their own name."""

    def __init__(self, stats: Callable[[], dict[str, float]]) -> None:
        self._stats = stats
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "undistilled_requests", "HTTP requests answered", ["route", "status"], registry=registry
        )
        self.prompt_tokens = Counter("undistilled_prompt_tokens", "Prompt tokens taken", registry=registry)
        self.generated = Counter("undistilled_generation_tokens", "Tokens generated", registry=registry)
        self.ttft = self._histogram("time_to_first_token_seconds", "From request to first token")
        self.itl = self._histogram("inter_token_latency_seconds", "Between tokens of a request")
        self.e2e = self._histogram("e2e_request_latency_seconds", "From request to last token")
        self._gauges: dict[str, Gauge] = {}

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram("undistilled_" + name, text, registry=self.registry, buckets=SECONDS)

    def render(self) -> bytes:
        """The text format, with the engine's gauges as of now."""
        for key, value in self._stats().items():
            if key not in self._gauges:
                name, text = GAUGES.get(key, (key, "Reported by the engine"))
                self._gauges[key] = Gauge("undistilled_" + name, text, registry=self.registry)
            self._gauges[key].set(value)
        return generate_latest(self.registry)


class Timer:
    """Observes one sequence: `tokens(n)` each time that n tokens came, `end` with the last."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._began, self._last = perf_counter(), 0.0
        metrics.prompt_tokens.inc(prompt_tokens)

    def tokens(self, count: int) -> None:
        if not count:
            return
        now = perf_counter()
        if self._last:
            self._metrics.itl.observe((now - self._last) / count)
        else:
            self._metrics.ttft.observe(now - self._began)
        self._last = now
        self._metrics.generated.inc(count)

    def end(self) -> None:
        self._metrics.e2e.observe(perf_counter() - self._began)
