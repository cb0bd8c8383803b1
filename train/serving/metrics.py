"""/metrics for Prometheus: what the engine counts, and how long clients wait."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from train.serving.engine import Engine

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class EngineCollector(Collector):
    """Reads the engine's counters when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        engine, c = self.engine, self.engine.counters
        for name, text, value in (
            ("serve_slots", "Requests that can be answered at once", engine.session.slots),
            ("serve_running", "Requests that have a slot", engine.running),
            ("serve_waiting", "Requests that wait for a slot", engine.waiting),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            ("serve_prompt_tokens", "Tokens of prompts that were read", c.prompt_tokens),
            ("serve_answer_tokens", "Tokens that were generated", c.answer_tokens),
            ("serve_steps", "Steps of decoding", c.steps),
            ("serve_step_rows", "Tokens that these steps computed", c.rows),
            ("serve_cancelled", "Requests whose client hung up", c.cancelled),
        ):
            yield CounterMetricFamily(name, text, value=value)


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answered = Counter(
            "serve_requests", "HTTP requests by path and status", ["path", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            "serve_first_token_seconds", "Until the first piece of an answer", buckets=FIRST_TOKEN,
            registry=self.registry,
        )  # fmt: skip
        self.whole = Histogram(
            "serve_answer_seconds", "Until the end of an answer", buckets=WHOLE, registry=self.registry
        )

    def watch(self, engine: Engine) -> None:
        self.registry.register(EngineCollector(engine))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def count(self, path: str, status: int, known: Iterable[str]) -> None:
        self.answered.labels(path if path in known else "other", str(status)).inc()
