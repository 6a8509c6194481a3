"""What demo_train.py reported of its starts, as a table of checkpoints and as a picture over time. For demo_run.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Launch:
    """One start of demo_train.py and the lines of its event file. Times are of `time.time()`, in seconds."""

    title: str
    url: str
    started_s: float
    ended_s: float
    events: list[dict[str, Any]]

    def of(self, kind: str) -> dict[int, dict[str, Any]]:
        """Rank 0's events of one kind by step."""
        return {event["step"]: event for event in self.events if event["event"] == kind and event["rank"] == 0}

    @property
    def sha256(self) -> dict[str, str]:
        """Of each part of the state at the end."""
        finished = next(event for event in self.events if event["event"] == "Finished")
        return dict(finished["sha256"])


# -- the table


def checkpoint_table(launches: Sequence[Launch]) -> Table:
    """A row for each checkpoint taken, and below them medians; MB/s there is of all bytes over all of their time.

    Stalls and times are rank 0's, bytes those of all ranks.
    """
    saves = [staged for launch in launches for staged in launch.of("Staged").values()]
    commits = [committed for launch in launches for committed in launch.of("Committed").values()]
    footers = {
        "run": f"{len(saves)} saves",
        "step": "median",
        "stall": _ms(median(staged["stall_s"] for staged in saves)),
        "durable": _ms(median(committed["durable_s"] for committed in commits)),
        "bytes": _mb(median(committed["num_bytes"] for committed in commits)),
        "MB/s": _rate(sum(c["num_bytes"] for c in commits), sum(c["durable_s"] for c in commits)),
        "outcome": "",
    }
    table = Table(title="Checkpoints", title_justify="left", show_footer=True, box=box.SIMPLE)
    for name, footer in footers.items():
        table.add_column(name, footer=footer, justify="left" if name in ("run", "outcome") else "right", no_wrap=True)
    for launch in launches:
        for step, staged in launch.of("Staged").items():
            table.add_row(launch.title, str(step), _ms(staged["stall_s"]), *_outcome(launch, step))
        table.add_section()
    return table


def _outcome(launch: Launch, step: int) -> tuple[str, str, str, str]:
    committed = launch.of("Committed").get(step)
    if committed is None:
        written = [event for event in launch.events if event["event"] == "Written" and event["step"] == step]
        return "never", _mb(sum(event["num_bytes"] for event in written)), "", "[red]killed"
    num_bytes, durable_s = committed["num_bytes"], committed["durable_s"]
    return _ms(durable_s), _mb(num_bytes), _rate(num_bytes, durable_s), "[green]committed"


def _rate(num_bytes: float, seconds: float) -> str:
    return f"{num_bytes / 1e6 / seconds:.0f}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


# -- the picture

LOST = "#d8b4b4"  # steps whose result no checkpoint holds
LANES = {"steps": "#9db8d9", "stall": "#c0392b", "staging": "#e08e2b", "writing": "#3c8d53", "commit": "#6c3483"}


def draw_timeline(reference: Launch, killed: Launch, restarted: Launch, path: Path) -> None:
    """Three rows: the run without a kill, the one with, and a single save from close by, as one PNG."""
    from matplotlib.figure import Figure  # slow to import; without pyplot it needs no display

    figure = Figure(figsize=(14, 9), layout="constrained")
    whole, broken, close = figure.subplots(3, 1)
    _draw_run(whole, [reference])
    whole.set_title("Uninterrupted run", loc="left", fontweight="bold")
    _draw_run(broken, [killed, restarted])
    broken.set_title("The same run, killed in mid-save and started again", loc="left", fontweight="bold")
    _mark_kill(broken, killed, restarted)
    limit = 1.03 * max(whole.get_xlim()[1], broken.get_xlim()[1])
    for axes in (whole, broken):
        axes.set_xlim(0, limit)
    _draw_save(close, reference)
    figure.savefig(path, dpi=110)


def _draw_run(axes: Axes, launches: Sequence[Launch]) -> None:
    start_s = launches[0].started_s
    _prepare(axes)
    for launch in launches:
        _draw_lanes(axes, launch, start_s, scale=1)
        for step, committed in launch.of("Committed").items():
            _say(axes, committed["time_s"] - start_s, "commit", str(step))
    axes.set_xlim(0, launches[-1].ended_s - start_s)
    axes.set_xlabel("seconds since the start of the run")


def _draw_lanes(axes: Axes, launch: Launch, origin_s: float, scale: float) -> None:
    """Bars for what takes time, a diamond at each commit. scale: units of the axis in a second."""

    def bar(lane: str, event: dict[str, Any], seconds: float, **look: Any) -> None:
        span = ((event["time_s"] - seconds - origin_s) * scale, seconds * scale)
        # An edge of its own colour: a stall of 50 ms in a minute would be thinner than a pixel.
        axes.broken_barh([span], (_height(lane) - 0.35, 0.7), **{"color": LANES[lane], "linewidth": 1, **look})

    for step, event in launch.of("Step").items():
        bar(
            "steps",
            event,
            event["time_s"] - event["started_s"],
            edgecolor="white",
            linewidth=0.6,
            alpha=1 - step % 2 * 0.3,
        )
    for event in launch.of("Staged").values():
        bar("stall", event, event["stall_s"])
        bar("staging", event, event["stage_s"])
    for step, event in launch.of("Written").items():
        bar("writing", event, event["write_s"])
        if committed := launch.of("Committed").get(step):
            bar("commit", committed, committed["time_s"] - event["time_s"])
    commits = [(event["time_s"] - origin_s) * scale for event in launch.of("Committed").values()]
    axes.plot(commits, [_height("commit")] * len(commits), "D", color=LANES["commit"], markersize=6)


def _mark_kill(axes: Axes, killed: Launch, restarted: Launch) -> None:
    """What the second row has over the first: the save that never became whole, the kill, and the way back."""
    (restored,) = restarted.of("Restored").values()
    kill_s = killed.ended_s - killed.started_s
    resume_s = restored["time_s"] - killed.started_s
    lost = [event for step, event in killed.of("Step").items() if step > restored["step"]]
    for event in lost:
        span = (event["started_s"] - killed.started_s, event["time_s"] - event["started_s"])
        axes.broken_barh([span], (-0.35, 0.7), facecolor=LOST, edgecolor="white", linewidth=0.6)
    axes.axvline(kill_s, color="black", linewidth=2)
    axes.axvspan(kill_s, resume_s, color="#dddddd", zorder=0)
    axes.plot([kill_s], [_height("commit")], "X", color="black", markersize=10)
    axes.set_ylim(top=1.5)
    _say_beside(axes, kill_s, f"SIGKILL: step {max(killed.of('Staged'))} is written, but not committed", "right")
    _say_beside(
        axes, resume_s,
        f"started again, step {restored['step']} restored: steps {lost[0]['step']} to {lost[-1]['step']} are run anew",
        "left",
    )  # fmt: skip


def _say_beside(axes: Axes, x: float, text: str, side: str) -> None:
    """Above the lanes, with an arrow to the line at `x`. side: the end of the text that is nearer to it."""
    axes.annotate(
        text, (x, 1), xytext=(-16 if side == "right" else 16, 0), textcoords="offset points", ha=side, va="center",
        arrowprops={"arrowstyle": "->"}, fontsize=9,
    )  # fmt: skip


def _draw_save(axes: Axes, launch: Launch) -> None:
    """One save, from the step before it to the end of a step after its commit."""
    commits = list(launch.of("Committed").values())
    committed = commits[len(commits) // 2]
    staged, steps = launch.of("Staged")[committed["step"]], launch.of("Step").values()
    origin_s = staged["time_s"] - staged["stall_s"]
    _prepare(axes)
    _draw_lanes(axes, launch, origin_s, scale=1000)
    for event in steps:
        middle_ms = 1000 * ((event["started_s"] + event["time_s"]) / 2 - origin_s)
        axes.text(middle_ms, _height("steps"), str(event["step"]), ha="center", va="center", clip_on=True, fontsize=9)
    _say(axes, 1000 * (staged["time_s"] - origin_s), "stall", f"training waited {_ms(staged['stall_s'])}")
    _say(axes, 1000 * (committed["time_s"] - origin_s), "commit", f"whole after {_ms(committed['durable_s'])}")
    begin_s = max(event["started_s"] for event in steps if event["time_s"] <= origin_s)
    end_s = min((event["time_s"] for event in steps if event["time_s"] > committed["time_s"]), default=0)
    end_s = max(end_s, committed["time_s"] + 0.2 * (committed["time_s"] - begin_s))  # room for the text at the commit
    axes.set_xlim(1000 * (begin_s - origin_s), 1000 * (end_s - origin_s))
    axes.set_title(f"The save of step {committed['step']} from close by", loc="left", fontweight="bold")
    axes.set_xlabel("milliseconds since save_async was called")


def _prepare(axes: Axes) -> None:
    axes.set_yticks([_height(lane) for lane in LANES], list(LANES))
    axes.set_ylim(_height("commit") - 0.6, _height("steps") + 0.6)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _height(lane: str) -> int:
    return -list(LANES).index(lane)


def _say(axes: Axes, x: float, lane: str, text: str) -> None:
    axes.annotate(text, (x, _height(lane)), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9)
