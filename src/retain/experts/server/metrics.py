"""Numbers for Prometheus, in a registry of each application's own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """What the server counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("retain_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.answers = Counter(
            "retain_answers", "Answers, by how they ended.", ["expert", "end"], registry=self.registry
        )
        self.tokens = Counter("retain_tokens", "Tokens read and written.", ["expert", "kind"], registry=self.registry)
        self.first = Histogram(
            "retain_first_text_seconds", "Until the first text.", buckets=_SECONDS, registry=self.registry
        )
        self.whole = Histogram(
            "retain_answer_seconds", "Until the end of an answer.", buckets=_SECONDS, registry=self.registry
        )
        self.routing = Histogram(
            "retain_routing_seconds", "Choosing an expert.", buckets=_SECONDS, registry=self.registry
        )

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A number that is looked up when it is asked for."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
