"""`asyncckpt report`: what it knows of a run, what it says of it, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from asyncckpt import CheckpointManager, Event, KeepBest, KeepEvery, KeepLast, WriteError, cli, events
from asyncckpt.event_file import EventFile
from asyncckpt.manifest import decode_manifest, encode_manifest
from asyncckpt.report import MAX_EVENT_BYTES, Report, findings, look_at
from asyncckpt.report_page import _axis, num_bytes, page, seconds
from asyncckpt.steps import attempt_name, manifest_name
from asyncckpt.storage import open_storage
from asyncckpt.testing import FaultyStorage
from tests.browser import CHROMIUM, Browser
from tests.states import state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;'\ud800"
NOW_S = 1_800_000_000.0


def ran(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app.app, ["report", *arguments])


def report_of(url: pathlib.Path | str, *others: str) -> Report:
    storage = open_storage(str(url))
    return look_at(storage, list(map(open_storage, others)), now_s=NOW_S)


def said(report: Report) -> list[tuple[str, str]]:
    return [(finding.level, finding.text) for finding in findings(report)]


def made_run(path: pathlib.Path) -> list[Event]:
    """Three processes: saves of which one fails and one is cut off, retention, restores; events beside them."""
    seen: list[Event] = []
    keep = KeepLast(2) | KeepEvery(10) | KeepBest(1, "loss")
    for start in range(3):
        sinks = [seen.append, EventFile(str(path))]
        with CheckpointManager(str(path), keep=keep, events=sinks) as manager:
            manager.restore_latest(state(0))
            for step in range(4 * start, 4 * start + 4):
                if step == 5:
                    manager._saver.committer.storage = FaultyStorage(manager._storage, "write_file", nth=1)
                    with pytest.raises(WriteError):
                        manager.save(step, state(step))
                    continue
                manager.save_async(step, state(step), metrics={"loss": abs(step - 2.5) + step / 100})
                manager.join()
    staged = next(event for event in seen if isinstance(event, events.Staged))
    seen.append(dataclasses.replace(staged, step=99, time_s=seen[-1].time_s + 1))
    sinks[1](seen[-1])  # type: ignore[operator]
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[Event]]:
    path = tmp_path_factory.mktemp("report") / "run"
    return path, made_run(path)


def test_what_events_told_is_what_the_report_knows(run: tuple[pathlib.Path, list[Event]]) -> None:
    """Of each save what training waited for (all of a blocking one), when it was durable, and how fast; of each fault
    where; which steps retention dropped, and why others are kept."""
    path, seen = run
    report = report_of(path)
    committed = [event for event in seen if isinstance(event, events.Committed)]
    assert [(save.step, save.durable_s, save.num_bytes) for save in report.saves] == [
        (event.step, event.durable_s, event.num_bytes) for event in committed
    ]
    assert [save.cost_s for save in report.saves] == [event.stall_s for event in committed]
    written = {event.step: event.write_s for event in seen if isinstance(event, events.Written)}
    assert all(save.write_s == written[save.step] for save in report.saves)
    assert [(fault.kind, fault.step, fault.phase) for fault in report.faults] == [
        ("failed", 5, "write"), ("interrupted", 99, "")
    ]  # fmt: skip
    assert [start.resumed_from for start in report.starts] == [None, 3, 7]
    assert sorted(report.pruned) == [1, 3, 4, 6, 7, 8, 9]
    assert {step.step for step in report.committed} == {0, 2, 10, 11}
    assert report.kept_for == {
        0: ["a multiple of 10"], 2: ["one of the 1 with the lowest loss"],
        10: ["one of the last 2", "a multiple of 10"], 11: ["the newest", "one of the last 2"],
    }  # fmt: skip
    assert report.tree is not None
    assert report.tree.num_bytes == sum(child.num_bytes for child in report.tree.children)


def test_a_blocking_save_costs_all_of_its_time(tmp_path: pathlib.Path) -> None:
    """Since training waits for the commit."""
    seen: list[Event] = []
    with CheckpointManager(str(tmp_path), events=[EventFile(str(tmp_path)), seen.append]) as manager:
        manager.save(1, state(1))
    [save] = report_of(tmp_path).saves
    assert save.cost_s == save.durable_s == next(e.durable_s for e in seen if isinstance(e, events.Committed))


def test_ranks_are_one_save_and_one_fault(tmp_path: pathlib.Path) -> None:
    """The slowest counts; what each of them reports of one failure is one."""
    for rank in (1, 0):
        sink = EventFile(str(tmp_path))
        common = {"url": "u", "step": 7, "rank": rank}
        sink(events.Staged(**common, time_s=100.0, num_bytes=5, wait_s=0, stage_s=1, stall_s=1.0 + rank))
        sink(events.Written(**common, time_s=103.0, num_bytes=5, num_files=1, copy_s=0, write_s=2.0 + rank))
        sink(events.Committed(**common, time_s=104.0, sequence=1, num_bytes=9, stall_s=1.0 + rank, durable_s=5.0))
        sink(events.Failed(**{**common, "step": 8}, time_s=110.0 + rank, phase="write", error=OSError(f"rank {rank}")))
    report = report_of(tmp_path)
    [save] = report.saves
    assert (save.cost_s, save.write_s, save.durable_s, save.rate) == (2.0, 3.0, 5.0, 3.0)
    [fault] = report.faults
    assert (fault.ranks, fault.text) == ({0, 1}, "OSError: rank 0")
    assert report.ranks == [0, 1]
    assert report.cost_share == pytest.approx(2.0 / 11)


def test_without_events_storage_tells_what_it_knows(tmp_path: pathlib.Path) -> None:
    """And how to have more the next time."""
    with CheckpointManager(str(tmp_path)) as manager:
        for step in (1, 2):
            manager.save(step, state(step), metrics={"loss": 1 / step})
    report = report_of(tmp_path)
    assert [save.step for save in report.saves] == [1, 2]
    assert all(math.isnan(save.cost_s) for save in report.saves)
    assert ("note", "EventFile(url)") in [(level, text[-17:-3]) for level, text in said(report)]
    text = page(report)
    assert "loss" in text
    assert "only events tell" in text


def test_events_of_elsewhere_can_be_given(tmp_path: pathlib.Path) -> None:
    """For a run whose bucket should hold nothing else."""
    with CheckpointManager(str(tmp_path / "run"), events=[EventFile(str(tmp_path / "other"))]) as manager:
        manager.save(1, state(1))
    assert not report_of(tmp_path / "run").has_events
    for other in ("other", "other/events"):
        assert report_of(tmp_path / "run", str(tmp_path / other)).saves[0].durable_s > 0


def test_a_run_that_is_in_order_has_no_findings(tmp_path: pathlib.Path) -> None:
    """But that its saves have ended, as this report is of years later."""
    with CheckpointManager(str(tmp_path), events=[EventFile(str(tmp_path))]) as manager:
        for step in range(5):
            manager.save_async(step, state(step))
    report = report_of(tmp_path)
    assert [level for level, _ in said(report)] == ["note"]
    report = dataclasses.replace(report, made_s=report.saves[-1].time_s + 1)
    assert said(report) == []
    assert "Healthy: the last good save is step 4, a moment ago." in page(report)


@pytest.mark.parametrize(("cost_s", "levels"), [(4.0, []), (6.0, ["look"])])
def test_saves_that_take_more_than_a_twentieth_are_told_of(
    tmp_path: pathlib.Path, cost_s: float, levels: list[str]
) -> None:
    """Of the time of all processes."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, state(1))
    sink = EventFile(str(tmp_path))
    for step, time_s in ((0, NOW_S - 101), (1, NOW_S - 1)):
        common = {"url": "u", "step": step, "rank": 0, "time_s": time_s}
        sink(events.Committed(**common, sequence=step, num_bytes=9, stall_s=cost_s / 2, durable_s=5.0))
    found = dataclasses.replace(report_of(tmp_path), made_s=NOW_S)
    assert [level for level, text in said(found) if "of the time" in text] == levels


def test_the_worst_comes_first(run: tuple[pathlib.Path, list[Event]], tmp_path: pathlib.Path) -> None:
    """Nothing whole; the newest damaged; a failure since the last save; what was overcome is only to be looked at."""
    path, _ = run
    storage = open_storage(str(tmp_path))
    source = open_storage(str(path))
    for name in source.list_files():
        storage.replace(name, source.read_file(name))
    found = said(report_of(tmp_path))
    assert found[0][0] == "look"
    assert ("look", "1 failure before the last good save, at step 5.") in found
    assert any("cut off by the end of the process" in text for _, text in found)
    EventFile(str(tmp_path))(
        events.Failed(url="u", step=20, rank=0, time_s=NOW_S, phase="commit", error=OSError("no space"))
    )
    assert said(report_of(tmp_path))[0] == ("bad", "1 failure since the last good save, the last in commit.")
    cut = next(name for name in storage.list_files("11") if name.endswith(".distcp"))
    storage.replace(cut, storage.read_file(cut)[:-1])
    assert (
        "bad",
        "The newest step, 11, is damaged; the newest one that is whole is 10. restore_latest takes that.",
    ) in (said(report_of(tmp_path)))
    storage.delete([name for name in storage.list_files() if "manifest-" in name])
    assert said(report_of(tmp_path))[0] == ("bad", "There is no whole checkpoint. A run that ends now begins anew.")
    assert "Not healthy" in page(report_of(tmp_path))


def test_damage_that_nothing_dates_is_told_first(run: tuple[pathlib.Path, list[Event]], tmp_path: pathlib.Path) -> None:
    """A manifest that does not read has no time; the data of a save that died neither."""
    source, storage = open_storage(str(run[0])), open_storage(str(tmp_path))
    for name in source.list_files():
        storage.replace(name, b"" if name.startswith("2/manifest") else source.read_file(name))
    storage.replace("1/00000001-0123456789abcdef/__0_0.distcp", b"half")
    report = report_of(tmp_path)
    assert [(fault.kind, fault.step) for fault in report.faults][-2:] == [("partial", 1), ("damaged", 2)]
    assert {
        ("look", "1 older step damaged: 2."),
        ("note", "1 save left behind half done; the next saves remove that."),
    } <= (set(said(report)))
    assert page(report).index("damaged</span>") < page(report).index("failed (write)</span>")


def test_the_command_writes_one_page_and_says_so(run: tuple[pathlib.Path, list[Event]], tmp_path: pathlib.Path) -> None:
    """And its verdict as JSON; nothing beside it is left, and the run is as it was."""
    path, _ = run
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    out = tmp_path / "r.html"
    done = ran(str(path), "-o", str(out), "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["health"], document["last_good_step"], document["faults"]) == ("look", 11, 2)
    assert {finding["level"] for finding in document["findings"]} <= {"look", "note"}
    assert list(tmp_path.iterdir()) == [out]
    (tmp_path / "any").touch()
    assert out.stat().st_mode == (tmp_path / "any").stat().st_mode
    assert before == {p: p.stat().st_mtime_ns for p in path.rglob("*")}


@pytest.mark.s3
def test_a_run_on_s3_is_reported(s3_url: str, s3_options: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """With the options given, which are in no page."""
    sink = EventFile(s3_url, s3_options)
    with CheckpointManager(s3_url, storage_options=s3_options, events=[sink]) as manager:
        manager.save(1, state(1))
    sink.flush()
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in s3_options.items()}
    options = [word for key, text in texts.items() for word in ("--storage-option", f"{key}={text}")]
    done = ran(s3_url, "-o", str(tmp_path / "r.html"), "--json", *options)
    assert (done.exit_code, json.loads(done.stdout)["last_good_step"]) == (0, 1)
    text = (tmp_path / "r.html").read_text()
    assert "the events of rank 0" in text
    assert s3_options["secret"] not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["{tmp}/nowhere", "-o", "{tmp}/r.html"],
            r"there is no step at .*nowhere, and no events\. Nothing was written",
        ),
        (["nosuch://bucket/run"], r"unknown protocol 'nosuch'"),
        (["{run}", "-o", "{tmp}/none/r.html"], r"No such file"),
    ],
    ids=str,
)
def test_what_cannot_be_reported_is_an_error_in_words(
    run: tuple[pathlib.Path, list[Event]], tmp_path: pathlib.Path, arguments: list[str], words: str
) -> None:
    """Status 2, no page."""
    done = ran(*(word.replace("{tmp}", str(tmp_path)).replace("{run}", str(run[0])) for word in arguments))
    assert done.exit_code == 2
    assert re.search(words, done.output)
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_saves_all_failed_has_a_report(tmp_path: pathlib.Path) -> None:
    """Its events are all there is."""
    EventFile(str(tmp_path / "run"))(
        events.Failed(url="u", step=0, rank=0, time_s=1e9, phase="write", error=OSError("no space"))
    )
    done = ran(str(tmp_path / "run"), "-o", str(tmp_path / "r.html"), "--json")
    assert (done.exit_code, json.loads(done.stdout)["health"]) == (0, "bad")
    assert "no space" in (tmp_path / "r.html").read_text()


def hostile_run(path: pathlib.Path) -> None:
    """Its keys, metrics, metadata, URL, errors, policy and rank hold what a browser might take for its own."""
    text = HOSTILE.replace("/", "").replace("\ud800", "")
    run = path / text
    with CheckpointManager(str(run), events=[EventFile(str(run))]) as manager:
        manager.save(
            1,
            {text: {HOSTILE[:-1]: torch.zeros(9)}},
            metrics={text: 1.0, "huge": 1e308, "tiny": 1e-320},
            metadata={text: text},
        )
    sink = EventFile(str(run))
    common = {"url": text, "step": 1, "rank": 0, "time_s": 1e9}
    sink(events.Failed(**common, phase=HOSTILE, error=OSError(HOSTILE)))
    sink(events.Skipped(**common, reason=HOSTILE))
    sink(events.Pruned(**{**common, "step": -5}, whole=True, num_files=1, prune_s=1.0, policy=HOSTILE))
    sink(events.Merged(**common, keys=(HOSTILE,)))
    sink(events.Delayed(**{**common, "time_s": -1e14}, phase=HOSTILE, ranks=(1,), waited_s=1.0))


def test_hostile_texts_are_text(tmp_path: pathlib.Path) -> None:
    """Nothing of the run's is markup: the page has the one script, and no element of theirs."""
    hostile_run(tmp_path)
    [path] = tmp_path.iterdir()
    text = page(report_of(path))
    text.encode()
    assert text.count("<script>") == text.count("</script>") == 1
    assert "<img" not in text
    assert text.count("&lt;img") > 8


def test_the_page_says_no_secret(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the URL, nor of what events quote."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env-secret-1")
    url = "memory://user:password-2@secret/run?token=query-3"
    sink = EventFile(url)
    sink(events.Failed(url=url, step=1, rank=0, time_s=1.0, phase="write", error=OSError("env-secret-1 at " + url)))
    sink.flush()
    text = page(report_of(url))
    assert not [word for word in ("env-secret-1", "password-2", "query-3") if word in text]


def many_steps(path: pathlib.Path, count: int) -> None:
    """One real step, and manifests like its own for `count` steps, with the data file as a link, and events of each."""
    with CheckpointManager(str(path)) as manager:
        manager.save(0, {"w": torch.zeros(4)}, metrics={"loss": 1.0})
    first = path / "0"
    manifest = decode_manifest(next(first.glob("manifest-*")).read_bytes())
    [data] = first.glob("0*/*.distcp")
    sink = EventFile(str(path))
    for step in range(1, count):
        attempt = attempt_name(step + 1, step)
        time = f"2026-11-{1 + step * 27 // count:02d}T00:00:00+00:00"
        head = dataclasses.replace(
            manifest.head, step=step, sequence=step + 1, attempt=attempt, metrics={"loss": 1 / step}, time=time
        )
        folder = path / str(step)
        (folder / attempt).mkdir(parents=True)
        os.link(data, folder / attempt / data.name)
        (folder / manifest_name(step + 1)).write_bytes(encode_manifest(dataclasses.replace(manifest, head=head)))
        common = {"url": "u", "step": step, "rank": 0, "time_s": head.time_s + step % 1000}
        sink(events.Staged(**common, num_bytes=5, wait_s=0, stage_s=0.1, stall_s=0.1))
        sink(events.Written(**common, num_bytes=5, num_files=1, copy_s=0, write_s=0.1))
        sink(events.Committed(**common, sequence=step + 1, num_bytes=99, stall_s=0.1, durable_s=5.0 + step % 7))
        if step % 10 == 0:
            sink(events.Failed(**common, phase="write", error=OSError("x" * 900)))


@pytest.mark.slow
def test_10_000_steps_make_a_small_page(tmp_path: pathlib.Path) -> None:
    """Thinned out, with the newest in full."""
    many_steps(tmp_path / "run", 10_000)
    report = report_of(tmp_path / "run")
    assert (len(report.steps), len(report.saves)) == (10_000, 10_000)
    text = page(report)
    assert len(text) < 600_000
    assert "step 9999" in text
    assert "9,900 more" in text


@pytest.mark.slow
def test_too_many_events_are_left_out_and_the_page_says_so(tmp_path: pathlib.Path) -> None:
    """Those of higher ranks first."""
    for rank in (2, 0):
        sink = EventFile(str(tmp_path))
        sink(events.Failed(url="u", step=0, rank=rank, time_s=1.0, phase="write", error=OSError("x")))
    [large] = tmp_path.glob("events/*-2-*")
    os.truncate(large, MAX_EVENT_BYTES)
    report = report_of(tmp_path)
    assert (report.ranks, report.num_left_out) == ([0], 1)
    assert any("1 file left out" in text for _, text in said(report))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 ms"), (5e-5, "50 us"), (0.0123, "12.3 ms"), (0.9999, "1 s"), (59, "59 s"), (150, "2.5 min"),
     (7200, "2 h"), (172800, "2 days")],
)  # fmt: skip
def test_times_are_short(value: float, text: str) -> None:
    """Two or three digits and a unit."""
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (4_390_000, "4.39 MB"), (999_600, "1,000 kB"), (5e15, "5,000 TB")]
)
def test_sizes_are_short(value: float, text: str) -> None:
    """Decimal units, as the command line has them."""
    assert num_bytes(value) == text


@pytest.mark.parametrize("is_log", [False, True])
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=4))
@example([0.0])
@example([1e15, 1e15 + 1])
@example([1e-299, 1e299])
@example([-1e300, 1e300])
def test_an_axis_holds_its_values_with_few_texts(is_log: bool, values: list[float]) -> None:
    """Whatever a metric may be."""
    axis = _axis(values, str, is_log=is_log, from_zero=False)
    assert all(-1e-6 <= axis.at(value) <= 1 + 1e-6 for value in values)
    assert 2 <= len(axis.texts) <= 8
    assert [place for place, _ in axis.texts] == sorted({place for place, _ in axis.texts})


# -- in a browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
LOOK = """(() => {
  const seen = Array.from(document.querySelectorAll("body *")).filter((e) => e.getClientRects().length > 0);
  const texts = seen.filter((e) => Array.from(e.childNodes).some((n) => n.nodeType === 3 && n.data.trim()));
  const outside = texts.filter((e) => !e.closest(".scroll") && !e.closest("svg") && !e.closest("output"))
    .filter((e) => { const b = e.getBoundingClientRect(); return b.left < -1 || b.right > innerWidth + 1; });
  return {
    ready: document.documentElement.dataset.ready,
    wide: document.documentElement.scrollWidth - innerWidth,
    smallest: Math.min(...texts.filter((e) => !e.closest("svg")).map((e) => parseFloat(getComputedStyle(e).fontSize))),
    outside: outside.map((e) => e.outerHTML.slice(0, 200)),
    charts: document.querySelectorAll("svg").length,
    ground: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
  };
})()"""
CONTRAST = """(() => {
  const light = (text) => {
    const part = text.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!color.endsWith(", 0)")) return color;
    }
  };
  let least = 99;
  for (const e of document.querySelectorAll("h1, h2, p, li, .mark, .card div, .y, .x, td, th, .name, .num, footer")) {
    const pair = [light(getComputedStyle(e).color), light(ground(e))].sort((a, b) => a - b);
    least = Math.min(least, (pair[1] + 0.05) / (pair[0] + 0.05));
  }
  return least;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(run: tuple[pathlib.Path, list[Event]], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(report_of(run[0])))
    return path


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_legible_at_every_width(shown: pathlib.Path, browser: Browser, width: int, is_dark: bool) -> None:
    """No text below 12 pixels, none that leaves the page, enough contrast (WCAG AA: 4.5); scripts ran, nothing was
    fetched, no complaint."""
    browser.open(shown, width=width, is_dark=is_dark)
    found = browser.evaluate(LOOK)
    assert (found["ready"], found["wide"], found["outside"]) == ("yes", 0, [])
    assert found["smallest"] >= 12
    assert found["charts"] >= 6
    assert (found["ground"] == "rgb(255, 255, 255)") != is_dark
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.requests == [shown.as_uri()]
    assert browser.complaints == []


@needs_browser
@pytest.mark.slow
def test_pointing_at_a_mark_shows_it_and_a_heading_sorts(shown: pathlib.Path, browser: Browser) -> None:
    """By the values, not by their texts."""
    browser.open(shown)
    box = browser.evaluate(
        "(() => { const f = document.querySelectorAll('figure')[1]; f.scrollIntoView();"
        " const b = f.querySelector('svg').getBoundingClientRect(); return [b.left, b.right, b.top + 20] })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + 2, y=box[2])
    first = browser.evaluate("document.querySelectorAll('figure')[1].querySelector('output').textContent")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[1] - 2, y=box[2])
    last = browser.evaluate("document.querySelectorAll('figure')[1].querySelector('output').textContent")
    assert (first.split(":")[0], last.split(":")[0]) == ("step 0", "step 11")
    steps = (
        "Array.from(document.querySelectorAll('table.sorted:not(.faults) tbody tr'), (row) => row.cells[0].textContent)"
    )
    heading = "document.querySelector('table.sorted:not(.faults) th button').click()"
    assert browser.evaluate(steps) == ["11", "10", "2", "0"]
    browser.evaluate(heading)
    assert browser.evaluate(steps) == ["11", "10", "2", "0"]
    browser.evaluate(heading)
    assert browser.evaluate(steps) == ["0", "2", "10", "11"]


@needs_browser
@pytest.mark.slow
def test_hostile_texts_do_nothing_in_a_browser(tmp_path: pathlib.Path, browser: Browser) -> None:
    """No script of theirs runs, no element of theirs is there, and the page still fits a telephone."""
    hostile_run(tmp_path)
    out = tmp_path / "page.html"
    [path] = [p for p in tmp_path.iterdir() if p.is_dir()]
    out.write_text(page(report_of(path)))
    browser.open(out, width=400)
    assert browser.evaluate("document.querySelectorAll('img').length + document.scripts.length") == 1
    assert browser.evaluate("document.title").startswith("Checkpoints of ")
    found = browser.evaluate(LOOK)
    assert (found["ready"], found["wide"], found["outside"]) == ("yes", 0, [])
    assert browser.requests == [out.as_uri()]
    assert browser.complaints == []


@needs_browser
@pytest.mark.slow
def test_the_policy_of_the_page_lets_nothing_else_in(
    shown: pathlib.Path, tmp_path: pathlib.Path, browser: Browser
) -> None:
    """Even if a text were not escaped: neither a script nor a request."""
    out = tmp_path / "broken.html"
    out.write_text(shown.read_text().replace("<h1>", f"{HOSTILE[:-1]}<img src='http://127.0.0.1:1/x.png'><h1>", 1))
    browser.open(out)
    assert browser.evaluate("document.title") != "owned"
    assert browser.evaluate("document.documentElement.dataset.ready") == "yes"
    assert "Content Security Policy" in browser.complaints[0]


@needs_browser
@pytest.mark.slow
def test_it_prints_on_a_few_pages(shown: pathlib.Path, browser: Browser) -> None:
    """In light colours, whatever the screen has."""
    browser.open(shown, is_dark=True)
    browser.call("Emulation.setEmulatedMedia", media="print")
    found = browser.evaluate(LOOK)
    assert (found["ground"], found["ink"]) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
    assert len(browser.call("Page.printToPDF")["data"]) > 10_000
