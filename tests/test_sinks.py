"""TensorBoard, Prometheus and OpenTelemetry, each read back by its own reader."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from asyncckpt import CheckpointManager, DamagedStepError, Delayed, Event, WriteError
from asyncckpt.testing import FaultyStorage
from tests.states import state
from tests.test_cli import damage

opentelemetry = pytest.importorskip("opentelemetry.sdk")
prometheus_client = pytest.importorskip("prometheus_client")
pytest.importorskip("tensorboard")

from opentelemetry import trace  # noqa: E402
from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

from asyncckpt.integrations.opentelemetry import OpenTelemetrySink  # noqa: E402
from asyncckpt.integrations.prometheus import PrometheusSink  # noqa: E402
from asyncckpt.integrations.tensorboard import TensorBoardSink  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def run_with(folder: pathlib.Path, *sinks: Any) -> list[Event]:
    """Saves 1 and 2, of which retention drops 1; a third that fails; a restore; and a restore of damage."""
    seen: list[Event] = []
    with CheckpointManager(str(folder), max_to_keep=1, events=[seen.append, *sinks]) as manager:
        manager.save_async(1, state(1))
        manager.join()
        manager.save(2, state(2))
        manager._saver.committer.storage = FaultyStorage(manager._storage, "write_file", nth=1)
        with pytest.raises(WriteError):
            manager.save(3, state(3))
        manager.restore(2, state(0))
        damage(folder, 2)
        with pytest.raises(DamagedStepError):
            manager.restore(2, state(0))
    return seen


def of(seen: list[Event], kind: str, step: int) -> Any:
    [found] = [event for event in seen if type(event).__name__ == kind and event.step == step]
    return found


@pytest.mark.parametrize("given", ["folder", "writer"])
def test_tensorboard_shows_scalars_by_step_and_failures_as_text(given: str, tmp_path: pathlib.Path) -> None:
    """Read by its own reader. A writer that was given is the caller's."""
    logs = str(tmp_path / "logs")
    writer = SummaryWriter(logs)
    sink = TensorBoardSink(logs if given == "folder" else writer)
    seen = run_with(tmp_path / "run", sink)
    writer.close()
    sink.close()
    read = EventAccumulator(logs).Reload()
    for step in (1, 2):
        committed, written, staged = (of(seen, kind, step) for kind in ("Committed", "Written", "Staged"))
        for name, value in (
            ("stall_s", staged.stall_s), ("wait_s", staged.wait_s), ("durable_s", committed.durable_s),
            ("MB", committed.num_bytes / 1e6), ("write_s", written.write_s),
            ("write_MB_per_s", written.num_bytes / 1e6 / written.write_s),
        ):  # fmt: skip
            [point] = [point for point in read.Scalars(f"asyncckpt/{name}") if point.step == step]
            assert point.value == pytest.approx(value), name
        assert point.wall_time == pytest.approx(written.time_s)
    [point] = read.Scalars("asyncckpt/restore_s")
    assert point.value == pytest.approx(of(seen, "Restored", 2).restore_s)
    texts = [text.tensor_proto.string_val[0].decode() for text in read.Tensors("asyncckpt/failed/text_summary")]
    assert re.match(r"    write: WriteError: step 3 .*injected fault", texts[0])


def test_tensorboard_is_left_to_rank_0(tmp_path: pathlib.Path) -> None:
    """Others make no file."""
    delay = {"url": "u", "step": 1, "time_s": 1.0, "phase": "write", "ranks": (1,), "waited_s": 40.0}
    for rank in (1, 0):
        sink = TensorBoardSink(str(tmp_path / "logs"))
        sink(Delayed(rank=rank, **delay))
        assert (tmp_path / "logs").exists() == (rank == 0)
        sink.close()


def samples(registry: Any) -> dict[tuple[str, str], float]:
    """{(name, phase): value}, as the text that a server would show is read by the client's own parser."""
    text = prometheus_client.generate_latest(registry).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_created", "_bucket")):
                assert sample.labels["rank"] == "0"
                found[sample.name, sample.labels.get("phase", "")] = sample.value
    return found


def test_prometheus_counts_what_happened(tmp_path: pathlib.Path) -> None:
    """With units in the names, as its parser reads them."""
    registry = prometheus_client.CollectorRegistry()
    seen = run_with(tmp_path / "run", PrometheusSink(registry))
    found = samples(registry)
    last = of(seen, "Committed", 2)
    expected = {
        ("commits_total", ""): 2,
        ("save_stall_seconds_count", ""): 3,
        ("save_durable_seconds_count", ""): 2,
        ("save_durable_seconds_sum", ""): last.durable_s + of(seen, "Committed", 1).durable_s,
        ("written_bytes_total", ""): sum(of(seen, "Written", step).num_bytes for step in (1, 2)),
        ("restored_bytes_total", ""): of(seen, "Restored", 2).num_bytes,
        ("restore_seconds_count", ""): 1,
        ("failures_total", "write"): 1,
        ("failures_total", "restore"): 1,
        ("pruned_steps_total", ""): 1,
        ("last_committed_step", ""): 2,
        ("last_commit_timestamp_seconds", ""): last.time_s,
        ("last_commit_bytes", ""): last.num_bytes,
    }
    for (name, phase), value in expected.items():
        assert found[f"asyncckpt_{name}", phase] == pytest.approx(value), name


def test_two_managers_share_prometheus_metrics(tmp_path: pathlib.Path) -> None:
    """Each with a sink of its own, told apart by their labels; and another registry has its own."""
    registry, other = prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()
    for name in ("a", "b"):
        with CheckpointManager(str(tmp_path / name), events=[PrometheusSink(registry)]) as manager:
            manager.save(1, state(1))
    PrometheusSink(other)
    for name in ("a", "b"):
        labels = {"url": str(tmp_path / name), "rank": "0"}
        assert registry.get_sample_value("asyncckpt_commits_total", labels) == 1
        assert other.get_sample_value("asyncckpt_commits_total", labels) is None


@pytest.fixture
def telemetry() -> Iterator[tuple[TracerProvider, InMemorySpanExporter, MeterProvider, InMemoryMetricReader]]:
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracers, meters = TracerProvider(), MeterProvider([reader])
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    yield tracers, exporter, meters, reader
    tracers.shutdown()
    meters.shutdown()


def test_opentelemetry_has_a_span_for_each_save_and_its_phases(tmp_path: pathlib.Path, telemetry: Any) -> None:
    """With the times at which they were, below the span of the training step; a failure is its status."""
    tracers, exporter, meters, _ = telemetry
    with tracers.get_tracer("training").start_as_current_span("train") as train:
        seen = run_with(tmp_path / "run", OpenTelemetrySink(tracers, meters))
    spans: dict[tuple[str, Any], ReadableSpan] = {
        (span.name, span.attributes["asyncckpt.step"]): span  # type: ignore[index]
        for span in exporter.get_finished_spans()
        if span.name.startswith("asyncckpt.")
    }
    staged, written, committed = (of(seen, kind, 2) for kind in ("Staged", "Written", "Committed"))
    save = spans["asyncckpt.save", 2]
    begun = staged.time_s - staged.stall_s
    for name, begin, end in (
        ("save", begun, committed.time_s),
        ("stage", begun, staged.time_s),
        ("write", written.time_s - written.write_s, written.time_s),
        ("commit", committed.time_s - committed.commit_s, committed.time_s),
    ):
        span = spans[f"asyncckpt.{name}", 2]
        assert span.start_time is not None
        assert span.end_time is not None
        assert (span.start_time / 1e9, span.end_time / 1e9) == pytest.approx((begin, end), abs=1e-6)
        assert span.parent is not None
        assert span.parent.span_id == (train if name == "save" else save).get_span_context().span_id
        assert span.status.status_code is trace.StatusCode.UNSET
    failed = spans["asyncckpt.save", 3]
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert "injected fault" in (failed.status.description or "")
    assert failed.attributes is not None
    assert (failed.attributes["asyncckpt.phase"], failed.attributes["error.type"]) == ("write", "WriteError")
    assert [event.name for event in failed.events] == ["exception"]


def test_opentelemetry_metrics_have_units(tmp_path: pathlib.Path, telemetry: Any) -> None:
    """Seconds and bytes; failures by phase."""
    tracers, _, meters, reader = telemetry
    run_with(tmp_path / "run", OpenTelemetrySink(tracers, meters))
    data = reader.get_metrics_data()
    found = {m.name: m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics}
    assert {name: metric.unit for name, metric in found.items()} == {
        "asyncckpt.save.stall.duration": "s", "asyncckpt.save.duration": "s", "asyncckpt.restore.duration": "s",
        "asyncckpt.written": "By", "asyncckpt.restored": "By", "asyncckpt.failures": "{failure}",
    }  # fmt: skip
    saves = {
        "error.type" in point.attributes: point.count for point in found["asyncckpt.save.duration"].data.data_points
    }
    assert saves == {False: 2, True: 1}
    phases = {
        point.attributes["asyncckpt.phase"]: point.value for point in found["asyncckpt.failures"].data.data_points
    }
    assert phases == {"write": 1, "restore": 1}
