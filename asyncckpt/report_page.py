"""A Report as one HTML page that needs nothing else: no network, light and dark, on paper and on a telephone.

Charts are SVG whose marks stand in a box of 1000 by 100 that is stretched to the page, while all text is HTML beside it
and keeps its size. Every text of a run's is escaped, and the page's own policy lets no other script run and nothing be
fetched. Thinned out so that 10,000 steps make no larger page than 500. Judges nothing: report.py does. Called by
cli/report.py.
"""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from typing import NamedTuple

from asyncckpt.overview import Glance
from asyncckpt.report import Fault, Finding, Report, Save, Subtree, findings, in_words, metrics_of
from asyncckpt.version import __version__

MAX_MARKS = 240  # of a chart that is some 500 pixels wide
MAX_ROWS = 100  # of the table of steps
MAX_FAULTS = 40  # an error takes some lines
MAX_METRICS = 4  # that get a chart
_MAX_TEXT = 600
_WORDS = {"bad": "Problem", "look": "Look at", "note": "Note"}
_UNKNOWN = "not known"


class Point(NamedTuple):
    """x: 0 to 1000. y: in the chart's own unit. text: for who points at it. style: a class in report.css."""

    x: float
    y: float
    text: str
    style: str = "ok"


class Axis(NamedTuple):
    """texts: (place from 0 to 1, text)."""

    low: float
    high: float
    is_log: bool
    texts: list[tuple[float, str]]

    def at(self, value: float) -> float:
        """0 to 1."""
        if self.is_log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def page(report: Report) -> str:
    """The whole page."""
    found = findings(report)
    script, style = (resources.files("asyncckpt").joinpath(f"report.{kind}").read_text() for kind in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = [
        _head(report),
        _verdict(report, found),
        _cards(report),
        _charts(report),
        _faults(report),
        _retention(report),
        _contents(report),
        _table(report),
        _foot(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>Checkpoints of {_e(report.url)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + f"\n<script>{script}</script>\n</body>\n</html>\n"
    )


# -- the first screen


def _head(report: Report) -> str:
    return f'<h1>Checkpoints of {_e(report.url)}</h1>\n<p class="soft">as of {utc(report.made_s)}</p>'


def _verdict(report: Report, found: Sequence[Finding]) -> str:
    levels = {finding.level for finding in found}
    level, words = "good", "Healthy"
    if "bad" in levels:
        level, words = "bad", "Not healthy"
    elif "look" in levels:
        level, words = "look", "Healthy now, with something to look at"
    good = report.last_good
    if good is not None and good.head is not None:
        words += f": the last good save is step {good.step}, {_ago(report.made_s - good.head.time_s)}"
    items = [
        f'<li><span class="mark {finding.level}">{_WORDS[finding.level]}:</span> {_e(finding.text)}</li>'
        for finding in found
    ]
    more = f"<ul>{''.join(items)}</ul>" if items else ""
    return f'<section class="verdict {level}"><strong>{words}.</strong>{more}</section>'


def _cards(report: Report) -> str:
    costs, durables, rates = (
        sorted(value for save in report.saves if not math.isnan(value := getattr(save, name)))
        for name in ("cost_s", "durable_s", "rate")
    )
    cards = [_last_card(report), *_cost_cards(report, costs, durables, rates), _saves_card(report), _kept_card(report)]
    return f'<section class="cards">{"".join(cards)}</section>'


def _last_card(report: Report) -> str:
    good = report.last_good
    if good is None or good.head is None:
        return _card("Last good save", "none", "", is_bad=True)
    more = (
        f"{utc(good.head.time_s)}; {num_bytes(good.num_bytes)} by {good.head.world_size} "
        f"rank{'' if good.head.world_size == 1 else 's'}; all files there in their length"
    )
    return _card("Last good save", f"step {good.step}", more)


def _cost_cards(report: Report, costs: Sequence[float], durables: Sequence[float], rates: Sequence[float]) -> list[str]:
    cost = durable = rate = _UNKNOWN
    cost_more = durable_more = rate_more = "only events tell"
    if costs:
        cost = f"{seconds(statistics.median(costs))} a save"
        share = report.cost_share
        part = "" if math.isnan(share) else f", {100 * share:.2g} % of the time in all"
        cost_more = f"median; longest {seconds(costs[-1])}{part}"
    if durables:
        durable = seconds(statistics.median(durables))
        durable_more = f"median; 99 of 100 within {seconds(durables[math.ceil(0.99 * len(durables)) - 1])}"
    if rates:
        rate = f"{num_bytes(statistics.median(rates))}/s"
        rate_more = f"median while writing, all ranks; {num_bytes(rates[0])}/s to {num_bytes(rates[-1])}/s"
    return [
        _card("Training waits", cost, cost_more),
        _card("Durable after", durable, durable_more),
        _card("Write rate", rate, rate_more),
    ]


def _saves_card(report: Report) -> str:
    number = {kind: sum(fault.kind == kind for fault in report.faults) for kind in ("failed", "skipped", "interrupted")}
    more = ", ".join(f"{count:,} {kind}" for kind, count in number.items())
    starts = len(report.starts)
    runs = f"; {starts} start{'' if starts == 1 else 's'} of the run" if starts else ""
    known = f"{len(report.saves):,} committed" if report.has_events else f"{len(report.saves):,} in storage"
    return _card("Saves", known, more + runs if report.has_events else "of those gone only events tell")


def _kept_card(report: Report) -> str:
    size = num_bytes(sum(step.num_bytes for step in report.steps))
    more = f"{size} in storage"
    if report.pruned:
        more += f"; {len(report.pruned):,} dropped by retention"
    number = len(report.committed)
    return _card("Kept", f"{number:,} step{'' if number == 1 else 's'}", more)


def _card(label: str, value: str, more: str, *, is_bad: bool = False) -> str:
    return (
        f'<div class="card"><div class="label">{_e(label)}</div>'
        f'<div class="value{" bad" if is_bad else ""}">{_e(value)}</div>'
        f'<div class="more soft">{_e(more)}</div></div>'
    )


# -- charts


def _charts(report: Report) -> str:
    saves = report.saves
    if not saves:
        return ""
    charts = [_progress(report)]
    places = _places(len(saves))
    labels = _step_labels(saves)
    starts = _starts_by_order(report)
    for title, how, name, show, is_log in (
        ("What training waits for", "for each save, on the slowest rank", "cost_s", seconds, True),
        ("Durable after", "from the call until the step was whole", "durable_s", seconds, True),
        ("Write rate", "all ranks together, while they wrote", "rate", rate, False),
        ("Size", "of what was saved, all ranks", "num_bytes", num_bytes, False),
    ):
        values = [float(getattr(save, name)) for save in saves]
        points = [
            Point(x, value, f"step {save.step}: {show(value)}")
            for x, save, value in zip(places, saves, values, strict=True)
            if not math.isnan(value)
        ]
        if points:
            axis = _axis([point.y for point in points], show, is_log=is_log)
            charts.append(_chart(title, how, points, axis, labels, starts))
    charts += _metrics(report)
    key = (
        '<p class="key">Point at a mark for its values.<i style="background:var(--ok)"></i>a save'
        '<i style="background:var(--faint)"></i>dropped since<i style="background:var(--bad)"></i>failed'
        '<i class="line" style="background:var(--look)"></i>the run was started again</p>'
    )
    return f'<h2>Saves over time</h2>{key}<div class="charts">{"".join(charts)}</div>'


def _progress(report: Report) -> str:
    """Steps over the clock: pauses, restarts, going back, failures."""
    failed = [fault for fault in report.faults if fault.kind == "failed" and fault.step >= 0 and fault.phase != "prune"]
    there = {(step.step, step.sequence) for step in report.committed}
    times = [save.time_s for save in report.saves] + [fault.time_s for fault in failed if not math.isnan(fault.time_s)]
    begin, end = min(times), max(max(times), min(times) + 1e-3)

    def at(time_s: float) -> float:
        return 1000 * (time_s - begin) / (end - begin)

    points = [
        Point(
            at(save.time_s), save.step, f"step {save.step} at {utc(save.time_s)}",
            "ok" if (save.step, save.sequence) in there else "gone",
        )
        for save in report.saves
    ]  # fmt: skip
    points += [
        Point(at(fault.time_s), fault.step, f"step {fault.step} failed at {utc(fault.time_s)}", "failed")
        for fault in failed
    ]
    axis = _axis([point.y for point in points], lambda step: f"{step:,.0f}", is_log=False, from_zero=False)
    labels = [(part, _clock(begin + part * (end - begin), end - begin)) for part in (0, 1 / 3, 2 / 3, 1)]
    starts = [
        (at(start.time_s), _started(start.time_s, start.resumed_from))
        for start in report.starts[1:]
        if begin <= start.time_s <= end
    ]
    return _chart("Steps", "by the clock (UTC)", points, axis, labels, starts, is_wide=True)


def _metrics(report: Report) -> list[str]:
    values = [(step, metrics_of(step)) for step in report.committed]
    charts = []
    for name in list(dict.fromkeys(name for _, metrics in values for name in metrics))[:MAX_METRICS]:
        known = [(step, metrics[name]) for step, metrics in values if name in metrics]
        points = [
            Point(x, value, f"step {step.step}: {value:.6g}")
            for x, (step, value) in zip(_places(len(known)), known, strict=True)
        ]
        axis = _axis([point.y for point in points], lambda value: f"{value:.3g}", is_log=True, from_zero=False)
        labels = _step_labels([step for step, _ in known])
        charts.append(_chart(_cut(name, 80), "metric of the steps that are kept", points, axis, labels))
    return charts


def _chart(
    title: str,
    how: str,
    points: Sequence[Point],
    axis: Axis,
    labels: Sequence[tuple[float, str]],
    starts: Iterable[tuple[float, str]] = (),
    *,
    is_wide: bool = False,
) -> str:
    grid = "".join(f'<path class="grid" d="M0 {_y(place)}H1000"/>' for place, _ in axis.texts)
    lines = "".join(f'<path class="start" d="M{x:.1f} 0V100"><title>{_e(text)}</title></path>' for x, text in starts)
    marks = "".join(_mark(bunch, axis) for bunch in _bunches(points))
    ys = "".join(f'<span class="y" style="top:{_y(place)}%">{_e(text)}</span>' for place, text in axis.texts)
    return (
        f'<figure{" class=wide" if is_wide else ""}><figcaption><b>{_e(title)}</b> <span class="how">{_e(how)}</span>'
        f'<output></output></figcaption><div class="plot">{ys}<svg viewBox="0 0 1000 100" preserveAspectRatio="none" '
        f'role="img" aria-label="{_e(title)}">{grid}{lines}{marks}</svg>{_under(labels)}</div><div class="under"></div>'
        "</figure>"
    )


def _under(labels: Sequence[tuple[float, str]]) -> str:
    kinds = ["first", *["minor"] * (len(labels) - 2), "last"]
    return "".join(
        f'<span class="x {kind}" style="left:{100 * place:.1f}%">{_e(text)}</span>'
        for kind, (place, text) in zip(kinds, labels, strict=False)
    )


def _bunches(points: Sequence[Point]) -> list[list[Point]]:
    """Neighbours of one style put together, so that a chart has no more marks than can be told apart."""
    if len(points) <= MAX_MARKS:
        return [[point] for point in points]
    bunches: dict[tuple[int, str], list[Point]] = {}
    for point in points:
        bunches.setdefault((int(point.x * MAX_MARKS / 1001), point.style), []).append(point)
    return list(bunches.values())


def _mark(bunch: Sequence[Point], axis: Axis) -> str:
    """One dot; for several a dot at their median, and a line from the least to the most."""
    values = sorted(point.y for point in bunch)
    x, style = bunch[len(bunch) // 2].x, bunch[0].style
    middle, low, high = (_y(axis.at(value)) for value in (values[len(values) // 2], values[0], values[-1]))
    text = bunch[0].text if len(bunch) == 1 else f"{bunch[0].text} ... {bunch[-1].text} ({len(bunch)} saves)"
    line = f'<path class="range" d="M{x:.1f} {low}V{high}"/>' if low != high else ""
    return f'{line}<path class="{style}" data-x="{x:.1f}" d="M{x:.1f} {middle}h0"><title>{_e(text)}</title></path>'


def _axis(values: Sequence[float], show: Callable[[float], str], *, is_log: bool, from_zero: bool = True) -> Axis:
    low, high = min(values), max(values)
    is_log = is_log and low > 1e-300 and high / 20 > low
    if is_log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = -(-(last - first) // 5)  # powers of ten between two texts, of which there is room for six
        ticks = [10.0**power for power in range(first, last + every, every)]
    else:
        low = min(0.0, low) if from_zero else low
        # not finer than a float is
        unit = _round_unit(max(high / 3 - low / 3, abs(high) * 1e-9, abs(low) * 1e-9, 1e-300))
        first, last = math.floor(low / unit), max(math.ceil(high / unit), math.floor(low / unit) + 1)
        ticks = [number * unit for number in range(first, last + 1)]
    axis = Axis(ticks[0], ticks[-1], is_log, [])
    return axis._replace(texts=[(axis.at(value), show(value)) for value in ticks])


def _round_unit(least: float) -> float:
    """1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((unit * power for unit in (1, 2, 5) if unit * power >= least * 0.999), 10 * power)


def _y(place: float) -> str:
    """From above, as SVG counts."""
    return f"{100 - 100 * place:.1f}"


def _places(count: int) -> list[float]:
    return [1000 * (number + 0.5) / count for number in range(count)]


def _step_labels(saves: Sequence[Save] | Sequence[Glance]) -> list[tuple[float, str]]:
    count = len(saves)
    chosen = sorted({round(part * (count - 1)) for part in (0, 1 / 3, 2 / 3, 1)})
    return [((number + 0.5) / count, f"step {saves[number].step}") for number in chosen]


def _starts_by_order(report: Report) -> list[tuple[float, str]]:
    count = len(report.saves)
    return [
        (
            1000 * sum(save.time_s < start.time_s for save in report.saves) / count,
            _started(start.time_s, start.resumed_from),
        )
        for start in report.starts[1:][-MAX_ROWS:]
    ]


def _started(time_s: float, resumed_from: int | None) -> str:
    return f"started again at {utc(time_s)}" + ("" if resumed_from is None else f", from step {resumed_from}")


# -- below


def _faults(report: Report) -> str:
    if not report.faults:
        none = "None that the events tell of." if report.has_events else "None in storage; of others only events tell."
        return f"<h2>Faults</h2><p>{none}</p>"
    shown = report.faults[-MAX_FAULTS:]
    rows = "".join(_fault_row(fault) for fault in reversed(shown))
    left = f", the last {MAX_FAULTS} of them" if len(shown) < len(report.faults) else ""
    return (
        f'<h2>Faults</h2><p class="soft">{len(report.faults):,} in all{left}.</p>'
        '<div class="scroll"><table class="sorted faults">'
        "<thead><tr><th>when (UTC)</th><th>step</th><th>what</th><th>told by rank</th><th>in words</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _fault_row(fault: Fault) -> str:
    level = {"failed": "bad", "damaged": "bad", "partial": "note", "unguarded": "note", "merged": "note"}
    what = f"{fault.kind} ({fault.phase})" if fault.phase else fault.kind
    when = "" if math.isnan(fault.time_s) else utc(fault.time_s).removesuffix(" UTC")
    step = str(fault.step) if fault.step >= 0 else ""
    ranks = ", ".join(map(str, sorted(fault.ranks)[:8])) + (" ..." if len(fault.ranks) > 8 else "")
    return (
        f'<tr><td class="num">{when}</td><td class="num">{step}</td>'
        f'<td><span class="mark {level.get(fault.kind, "look")}">{_e(what)}</span></td><td class="by">{ranks}</td>'
        f'<td class="what">{_e(_cut(fault.text))}</td></tr>'
    )


def _retention(report: Report) -> str:
    committed = report.committed
    if not committed:
        return ""
    there = {(step.step, step.sequence) for step in committed}
    gone = [save for save in report.saves if (save.step, save.sequence) not in there]
    words = [f"{len(committed):,} steps are kept."]
    if report.policy:
        words.append(f"The policy keeps what is: {_cut(in_words(report.policy))}.")
    if gone:
        again = sum(save.step not in report.pruned for save in gone)
        words.append(
            f"{len(gone):,} saves that were whole are gone: {len(gone) - again:,} dropped by that policy"
            + (f", {again:,} saved again, or dropped by another run or by hand." if again else ".")
        )
    elif report.has_events:
        words.append("None that was whole is gone.")
    else:
        number = max(step.sequence for step in committed)
        words.append(f"Save number {number:,} is the newest; what became of the others only events tell.")
    return f"<h2>Retention</h2><p>{_e(' '.join(words))}</p>{_strip(report)}"


def _strip(report: Report) -> str:
    """One tick for each save in the order of time: kept, or gone."""
    there = {(step.step, step.sequence) for step in report.committed}
    points = []
    for x, save in zip(_places(len(report.saves)), report.saves, strict=True):
        if (save.step, save.sequence) in there:
            why = ", ".join(report.kept_for.get(save.step, []))
            points.append(Point(x, 1.0, f"step {save.step}: kept{f' as {why}' if why else ''}", "ok"))
        else:
            when = report.pruned.get(save.step)
            told = f"dropped by retention at {utc(when)}" if when else "gone"
            points.append(Point(x, 0.45, f"step {save.step}: {told}", "gone"))
    ticks = []
    for bunch in sorted(_bunches(points), key=lambda bunch: bunch[0].y):
        text = bunch[0].text if len(bunch) == 1 else f"{bunch[0].text} ... {bunch[-1].text} ({len(bunch)} saves)"
        x, height = bunch[0].x, 100 * bunch[0].y
        ticks.append(
            f'<path class="{bunch[0].style} tick" data-x="{x:.1f}" d="M{x:.1f} 100v-{height:.0f}">'
            f"<title>{_e(text)}</title></path>"
        )
    return (
        '<figure class="wide"><figcaption><span class="how">each save in order: tall and coloured if kept, short and '
        'grey if gone</span><output></output></figcaption><div class="plot low"><svg viewBox="0 0 1000 100" '
        f'preserveAspectRatio="none" role="img" aria-label="Retention">{"".join(ticks)}</svg>'
        f'{_under(_step_labels(report.saves))}</div><div class="under"></div></figure>'
    )


def _contents(report: Report) -> str:
    tree = report.tree
    if tree is None:
        return ""
    most = max((child.num_bytes for child in tree.children), default=0) or 1
    rows = "".join(_branch(child, most, tree.num_bytes) for child in tree.children)
    return (
        f"<h2>What is in {_e(tree.name)}</h2>"
        f'<p class="soft">{num_bytes(tree.num_bytes)} in {tree.num_keys:,} values. A click opens a branch.</p>{rows}'
    )


def _branch(node: Subtree, most: int, total: int, depth: int = 0) -> str:
    row = (
        f'<span class="name" style="--depth:{depth}">{_e(_cut(node.name))}</span>'
        f'<span class="bar"><i style="width:{100 * node.num_bytes / most:.1f}%"></i></span>'
        f'<span class="num">{num_bytes(node.num_bytes)} · {100 * node.num_bytes / max(total, 1):.1f} %</span>'
    )
    if not node.children:
        return f'<div class="leaf">{row}</div>'
    below = "".join(_branch(child, most, total, depth + 1) for child in node.children)
    is_open = depth == 0 and node.num_bytes > total / 10
    return f"<details{' open' if is_open else ''}><summary>{row}</summary>{below}</details>"


def _table(report: Report) -> str:
    steps = [step for step in reversed(report.steps) if step.kind != "partial"]
    if not steps:
        return ""
    saves = {(save.step, save.sequence): save for save in report.saves}
    metrics = list(dict.fromkeys(name for step in steps for name in metrics_of(step)))[:8]
    heads = [
        "step",
        "state",
        "committed (UTC)",
        "size",
        "ranks",
        "training waited",
        "durable after",
        *metrics,
        "kept as",
    ]
    rows = "".join(_step_row(report, step, saves.get((step.step, step.sequence)), metrics) for step in steps[:MAX_ROWS])
    left = len(steps) - MAX_ROWS
    more = f" The newest {MAX_ROWS}; <code>asyncckpt ls --limit 0</code> lists {left:,} more." if left > 0 else ""
    return (
        f'<h2>Steps</h2><p class="soft">A click on a heading sorts.{more}</p><div class="scroll"><table class="sorted">'
        f"<thead><tr>{''.join(f'<th>{_e(_cut(head, 60))}</th>' for head in heads)}</tr></thead><tbody>{rows}</tbody>"
        "</table></div>"
    )


def _step_row(report: Report, step: Glance, save: Save | None, metrics: Sequence[str]) -> str:
    state, level = ("damaged", "bad") if step.damage else (step.kind, "good" if step.kind == "committed" else "note")
    head = step.head
    cells = [
        f'<td class="num">{step.step}</td><td><span class="mark {level}">{state}</span></td>',
        _cell(utc(head.time_s).removesuffix(" UTC") if head else "", head.time_s if head else math.nan),
        _cell(num_bytes(step.num_bytes), step.num_bytes),
        _cell(str(head.world_size) if head else "", head.world_size if head else math.nan),
    ]
    times = (save.cost_s, save.durable_s) if save is not None else (math.nan, math.nan)
    cells += [_cell("" if math.isnan(value) else seconds(value), value) for value in times]
    for name in metrics:
        value = metrics_of(step).get(name, math.nan)
        cells.append(_cell("" if math.isnan(value) else f"{value:.6g}", value))
    cells.append(f"<td class='what'>{_e(', '.join(report.kept_for.get(step.step, [])))}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _cell(text: str, value: float) -> str:
    """value: to sort by."""
    known = "" if math.isnan(value) else repr(value)
    return f'<td class="num" data-v="{known}">{_e(text)}</td>'


def _foot(report: Report) -> str:
    ranks = report.ranks
    told = "no events"
    if ranks:
        some = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 8 else ", ".join(map(str, ranks))
        told = f"the events of rank{'' if len(ranks) == 1 else 's'} {some}"
    return (
        f"<footer>Made by asyncckpt {__version__} from the manifests, the listing and {told}. A step counts as whole "
        "if its manifest reads and its files are there in their length; <code>asyncckpt verify</code> reads every byte."
        "</footer>"
    )


# -- words


def _e(text: object) -> str:
    return escape(str(text).encode("utf-8", "replace").decode())  # a lone surrogate has no place in a file


def _cut(text: str, most: int = _MAX_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]} ..."


def num_bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def rate(per_second: float) -> str:
    return f"{num_bytes(per_second)}/s"


def seconds(length: float) -> str:
    """A length of time, to two or three digits."""
    if length < 0.9995:
        return f"{length * 1e3:.3g} ms" if length >= 1e-3 or length <= 0 else f"{length * 1e6:.3g} us"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if length >= 2 * size:
            return f"{length / size:.3g} {unit}"
    return f"{length:.3g} s"


def _ago(length: float) -> str:
    return f"{seconds(round(length))} ago" if length >= 2 else "a moment ago"


def utc(time_s: float) -> str:
    if not 0 <= time_s < 250_000_000_000:  # year 9,892; a file may say anything
        return "an unknown time"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))


def _clock(time_s: float, span_s: float) -> str:
    if not 0 <= time_s < 250_000_000_000:
        return ""
    form = "%H:%M:%S" if span_s < 3600 else "%H:%M" if span_s < 86400 else "%b %d %H:%M" if span_s < 864000 else "%b %d"
    return time.strftime(form, time.gmtime(time_s))
