"""The page about one run, or about several side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from agrivision.errors import one_line
from agrivision.pages import (
    DASH,
    definitions,
    document,
    escaped,
    facts,
    figure,
    listing,
    percent,
    photograph,
    scrolled,
    section,
    share_bar,
    share_words,
    swatch,
    table,
)
from agrivision.report import figures
from agrivision.report.attempts import RUNNING, Attempt
from agrivision.report.drawings import drawn, side_by_side
from agrivision.report.history import History
from agrivision.report.rows import Evaluation
from agrivision.report.tiles import Shown, Tiles
from agrivision.report.words import (
    counted,
    energy_words,
    hours_words,
    rate_words,
    score_words,
    span_words,
    time_words,
)

_QUALITY = 75  # of the tiles' JPEG: there are dozens
_MISSING = "not there"  # a key that a run's configuration has not
_MOST_ATTEMPTS = 200  # that are shown one by one
_ABSENT = object()


def page(histories: Sequence[History], tiles: Sequence[Tiles | None]) -> bytes:
    """The page: the same bytes for the same runs.

    Args:
        histories: of the runs, in the order in which they are to be shown.
        tiles: of each run; None where nobody asked.
    """
    if len(histories) == 1:
        history = histories[0]
        head = f"<header><h1>{escaped(history.name)}</h1><p>{escaped(_summary(history))}</p></header>"
        parts = [head, *_run(history, tiles[0], (), level=2)]
        return document(f"{history.name} {DASH} run", parts).encode()
    names = display_names([history.run.path for history in histories])
    differing = differences(histories)
    title = f"{len(histories)} runs"
    parts = [
        f"<header><h1>{title}</h1><p>{escaped(', '.join(names))}</p></header>",
        section("Results", _results(histories, names)),
        section("What differs in their configuration", _differing(histories, names, differing)),
        section("Side by side", side_by_side(figures.compared(histories, names)) + _COMPARED),
    ]
    for number, (history, name) in enumerate(zip(histories, names, strict=True)):
        inner = _run(history, tiles[number], differing, level=3)
        heading = swatch(figures.run_color(number)) + escaped(name)
        summary = f'<p class="note">{escaped(_summary(history))}</p>'
        parts.append(section(heading, "\n".join([summary, *filter(None, inner)])))
    return document(title, parts).encode()


_COMPARED = (
    '<p class="note">Each run has the colour of its square above. A line of many points is drawn as'
    " the mean and the range of short stretches.</p>"
)


def display_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each run: the last folders of its path, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts))):
        names = [one_line("/".join(part[-depth:])) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{one_line(path.name)} ({number})" for number, path in enumerate(paths, 1)]


def differences(histories: Sequence[History]) -> tuple[str, ...]:
    """The keys of the configuration that are not the same in all runs."""
    keys = sorted({key for history in histories for key in history.values})
    return tuple(
        key
        for key in keys
        if any(
            history.values.get(key, _ABSENT) != histories[0].values.get(key, _ABSENT)
            for history in histories[1:]
        )
    )


def _summary(history: History) -> str:
    best, state = history.metrics.best, history.state
    words = [state if state != "not known" else "no word on how it ended"]
    words[0] = words[0].capitalize()
    if best is not None:
        words.append(f"best mIoU {score_words(best.miou)} at step {best.step:,}")
    words.append(counted(history.metrics.last_step, "step"))
    if history.attempts:
        words.append(counted(len(history.attempts), "attempt"))
    return " · ".join(words)


def _run(history: History, tiles: Tiles | None, differing: Sequence[str], *, level: int) -> list[str]:
    """The parts of the page that are about one run."""

    def part(heading: str, content: str) -> str:
        return section(heading, content, level=level) if content else ""

    metrics = history.metrics
    shown = metrics.best or metrics.last
    return [
        part("At a glance", facts(_glance(history)) + _warnings(history)),
        part("Learning", side_by_side(figures.curves(history)) + _learning_note(history)),
        part("Scores by class", _scores(history, level + 1)),
        part("Confusion", _confusion(shown)) if shown else "",
        part("Best and worst tiles", _tiles(tiles, level + 1)) if tiles is not None else "",
        part("Speed", _speed(history)),
        part("Attempts and interruptions", _attempts(history)),
        part("What it took", definitions(_costs(history))),
        part("Configuration", _configuration(history, differing)),
        part("Versions and hardware", _about(history)),
    ]


def _glance(history: History) -> list[tuple[str, str]]:
    metrics, best = history.metrics, history.metrics.best
    entries = [
        ("Best mIoU", score_words(best.miou) if best else DASH),
        ("at step", f"{best.step:,}" if best else DASH),
        ("Steps done", f"{metrics.last_step:,}"),
        ("Epochs done", DASH if metrics.last_epoch is None else f"{metrics.last_epoch:,}"),
        ("Attempts", f"{len(history.attempts)}" if history.attempts else DASH),
        ("Time at work", span_words(history.seconds)),
        ("Images per second", rate_words(history.images_per_second)),
    ]
    if history.attempts and history.attempts[-1].on_gpu:
        entries.insert(6, ("GPU hours", hours_words(history.rank_seconds)))
    return entries


def _warnings(history: History) -> str:
    notes = []
    if history.metrics.unread:
        count = counted(history.metrics.unread, "row")
        notes.append(f"{count} of metrics.jsonl could not be read, and the page is without them.")
    left_out = history.metrics.last.left_out if history.metrics.last else 0
    if left_out:
        notes.append(f"The last evaluation is without {counted(left_out, 'tile')} that are damaged.")
    if history.state == RUNNING:
        notes.append("The run goes on: what stands here is what it had written so far.")
    elif history.metrics.early_end is not None:
        notes.append(f"The run ended early: {history.metrics.early_end}.")
    return "".join(f'<p class="note">{escaped(note)}</p>' for note in notes)


def _learning_note(history: History) -> str:
    notes = ["A line of many points is drawn as the mean and the range of short stretches."]
    if history.resumed_at:
        notes.append("Dotted: where the run went on after an interruption.")
    if not history.metrics.evaluations:
        notes.append("There was no evaluation yet.")
    return f'<p class="note">{" ".join(notes)}</p>'


def _scores(history: History, level: int) -> str:
    best, last = history.metrics.best, history.metrics.last
    if last is None:
        return "<p>There was no evaluation yet.</p>"
    parts = [_data_bar(history)]
    if best is not None and best.step != last.step:
        parts.append(_heading(level, f"At the best evaluation, step {best.step:,}"))
        parts.append(_score_table(history, best))
        parts.append(_heading(level, f"At the last evaluation, step {last.step:,}"))
    else:
        which = ", which is the best" if best is not None else ""
        parts.append(_heading(level, f"At the last evaluation, step {last.step:,}{which}"))
    parts.append(_score_table(history, last))
    if not last.precision:
        parts.append(
            '<p class="note">Its evaluations tell IoU alone; <code>agrivision evaluate</code> tells'
            " precision, recall and F1 of its checkpoint.</p>"
        )
    if isinstance(history.data, str):
        parts.append(
            f'<p class="note">Without the classes\' shares of the data set. {escaped(history.data)}</p>'
        )
    return "\n".join(parts)


def _heading(level: int, text: str) -> str:
    return f"<h{level}>{escaped(text)}</h{level}>"


def _data_bar(history: History) -> str:
    shares = _shares(history)
    if not shares:
        return ""
    names = list(shares)
    bar = share_bar([pixels for pixels, _, _, _ in shares.values()], names, figures.class_colors(names))
    return f'<p class="note">The classes\' pixels in the training split:</p>{bar}'


def _shares(history: History) -> dict[str, tuple[int, int, int, int]]:
    """By class: its pixels and all pixels, its tiles and all tiles of the training split."""
    if isinstance(history.data, str):
        return {}
    schema = history.data.schema
    split = schema.splits.get(str(history.values.get("data.train_split", "train")))
    if split is None:
        return {}
    counts = zip(schema.classes, split.class_pixels, split.class_tiles, strict=True)
    return {name: (pixels, split.pixels, tiles, split.tiles) for name, pixels, tiles in counts}


_SCORES = {"IoU": "iou", "Precision": "precision", "Recall": "recall", "F1": "f1"}


def _score_table(history: History, evaluation: Evaluation) -> str:
    shares = _shares(history)
    columns = {title: getattr(evaluation, key) for title, key in _SCORES.items()}
    columns = {title: values for title, values in columns.items() if values}
    head = ["Class", *columns, *(["Pixels", "Tiles"] if shares else [])]
    rows = []
    colors = figures.class_colors(evaluation.iou)
    for name, color in zip_longest(evaluation.iou, colors):
        cells = [score_words(values.get(name)) for values in columns.values()]
        if shares:
            pixels, all_pixels, tiles, all_tiles = shares.get(name, (0, 0, 0, 0))
            cells += [share_words(pixels, all_pixels), share_words(tiles, all_tiles)]
        rows.append(((swatch(color) if color else "") + escaped(name), cells))
    means = [_mean(values.values()) for values in columns.values()]
    means[0] = score_words(evaluation.miou)
    return table(head, rows, ("Mean", means + [""] * (2 if shares else 0)))


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return score_words(sum(known) / len(known) if known else None)


def _confusion(evaluation: Evaluation) -> str:
    if not evaluation.confusion:
        return (
            "<p>Its evaluations hold no confusion matrix; <code>agrivision evaluate --json</code>"
            " computes that of its checkpoint.</p>"
        )
    picture = drawn(figures.confusion(evaluation))
    caption = (
        f"Where the pixels of each true class went, in per cent, at step {evaluation.step:,}."
        " The diagonal is the recall."
    )
    shown = scrolled(picture, "Confusion matrix")
    return f'<div class="square">{figure(shown, caption)}</div>'


def _tiles(tiles: Tiles, level: int) -> str:
    why = f'<p class="note">{escaped(tiles.why)}</p>' if tiles.why else ""
    parts = []
    for worst, title in ((True, "Worst"), (False, "Best")):
        shown = [one for one in tiles.shown if one.worst == worst]
        if shown:
            parts.append(_heading(level, title))
            parts += map(_tile, shown)
    if parts:
        words = (
            f"Tiles of the split {tiles.split}, as the checkpoint of step {tiles.step:,} sees them:"
            " natural colours, near-infrared as red, truth, prediction."
        )
        parts.insert(0, f"<p>{escaped(words)}</p>")
    return "\n".join(parts) + why


def _tile(shown: Shown) -> str:
    reasons = ", ".join(f"{name} {score_words(iou)}" for name, iou in shown.reasons)
    words = f"{shown.key}: IoU of {reasons}"
    picture = photograph(Image.fromarray(shown.picture), f"Tile {words}", _QUALITY)
    return figure(scrolled(picture, f"Tile {shown.key}"), escaped(words))


def _speed(history: History) -> str:
    charts = side_by_side(figures.speed(history))
    if not charts:
        return "<p>Its rows do not tell how fast it was.</p>"
    notes = ["Evaluations and checkpoints count as time at work."]
    if len(history.hours) and figures.pauses(history):
        notes.append("Shaded: between two attempts.")
    elif history.resumed_at:
        notes.append("Dotted: where the run went on after an interruption.")
    return charts + f'<p class="note">{" ".join(notes)}</p>'


def _attempts(history: History) -> str:
    if not history.attempts:
        return "<p>There is no provenance.json that can be read, so nothing tells of its attempts.</p>"
    head = ["Attempt", "Began", "At work", "Steps", "Where", "Ranks", "Device", "How it ended"]
    numbered = list(enumerate(history.attempts, 1))
    rows = [(str(number), _attempt(attempt)) for number, attempt in numbered[-_MOST_ATTEMPTS:]]
    left_out = len(numbered) - len(rows)
    note = (
        f'<p class="note">The first {counted(left_out, "attempt")} are not shown.</p>'
        if left_out
        else ""
    )
    return f'<div class="words">{table(head, rows)}</div>{note}'


def _attempt(attempt: Attempt) -> list[str]:
    first, last = attempt.from_step + 1, attempt.to_step
    return [
        time_words(attempt.started),
        span_words(attempt.seconds),
        f"{first:,} to {last:,}" if last >= first else "none",
        _hosts(attempt.hosts),
        f"{attempt.ranks:,}" if attempt.ranks else DASH,
        attempt.device or DASH,
        attempt.why,
    ]


def _hosts(hosts: Sequence[str]) -> str:
    if len(hosts) <= 4:
        return ", ".join(hosts) or DASH
    return f"{', '.join(hosts[:3])} and {len(hosts) - 3} more"


def _costs(history: History) -> list[tuple[str, str]]:
    attempts, metrics = history.attempts, history.metrics
    entries = [("Time at work", span_words(history.seconds))]
    ends = [attempt.ended for attempt in attempts if attempt.ended is not None]
    if ends and attempts[0].started is not None:
        entries.append(("From beginning to end", span_words(max(ends) - attempts[0].started)))
    on_gpu = bool(attempts) and attempts[-1].on_gpu
    title = "GPU hours" if on_gpu else "Rank hours, without a GPU"
    entries.append((title, hours_words(history.rank_seconds)))
    if metrics.has("energy_joules"):
        joules = float(np.nansum(metrics.training["energy_joules"]))
        entries.append(("Energy of the GPUs", f"{energy_words(joules)}, for the steps that were kept"))
    else:
        entries.append(("Energy", "no row tells it"))
    if metrics.has("memory_gib"):
        most = float(np.nanmax(metrics.training["memory_gib"]))
        of = "GPU" if on_gpu else "process"
        entries.append((f"Most memory of rank 0's {of}", f"{most:.3g} GiB"))
    waiting, rate = (history.over_time(name) for name in ("waiting_share", "megapixels_per_second"))
    if waiting is not None:
        entries.append(("Time waiting for data", percent(waiting)))
    if rate is not None:
        entries.append(("Megapixels per second", rate_words(rate)))
    seconds = [one.seconds for one in metrics.evaluations if one.seconds is not None]
    if seconds:
        words = f"{counted(len(seconds), 'evaluation')}, {span_words(sum(seconds))}"
        entries.append(("Evaluating", words))
    if metrics.saving:
        words = f"{counted(len(metrics.saving), 'checkpoint')}, {span_words(sum(metrics.saving))}"
        entries.append(("Saving", words))
    return entries


def _configuration(history: History, differing: Sequence[str]) -> str:
    if not history.config:
        return "<p>There is no config.yaml that can be read.</p>"
    note = (
        '<p class="note">Marked: what is not the same in all runs of this page.</p>'
        if differing
        else ""
    )
    return listing(_yaml(history.config, differing)) + note


def _yaml(
    tree: Mapping[str, Any], marked: Sequence[str], prefix: str = "", indent: str = ""
) -> list[tuple[str, bool]]:
    """The lines of a configuration, each with whether its key is to be marked."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            lines.append((f"{indent}{_scalar(key)}:", False))
            lines += _yaml(value, marked, f"{prefix}{key}.", f"{indent}  ")
        else:
            lines.append((f"{indent}{_scalar(key)}: {_scalar(value)}", f"{prefix}{key}" in marked))
    return lines


def _scalar(value: Any) -> str:
    """A value as YAML writes it in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _about(history: History) -> str:
    if not history.attempts:
        return ""
    first, last = history.attempts[0], history.attempts[-1]
    changed = [
        f"{name.lower()} {first.about.get(name, DASH)}"
        for name in sorted(first.about.keys() | last.about.keys())
        if first.about.get(name) != last.about.get(name) and name not in ("Host of rank 0",)
    ]
    note = f"Of the last attempt. The first had: {'; '.join(changed)}." if changed else ""
    return definitions(last.about.items()) + (f'<p class="note">{escaped(note)}</p>' if note else "")


def _results(histories: Sequence[History], names: Sequence[str]) -> str:
    on_gpu = any(history.attempts and history.attempts[-1].on_gpu for history in histories)
    hours = "GPU hours" if on_gpu else "Rank hours"
    head = ["Run", "State", "Best mIoU", "at step", "Steps", "At work", hours, "Images/s", "Attempts"]
    rows = []
    for number, (history, name) in enumerate(zip(histories, names, strict=True)):
        best = history.metrics.best
        cells = [
            history.state,
            score_words(best.miou) if best else DASH,
            f"{best.step:,}" if best else DASH,
            f"{history.metrics.last_step:,}",
            span_words(history.seconds),
            hours_words(history.rank_seconds),
            rate_words(history.images_per_second),
            f"{len(history.attempts)}" if history.attempts else DASH,
        ]
        rows.append((swatch(figures.run_color(number)) + escaped(name), cells))
    return table(head, rows)


def _differing(histories: Sequence[History], names: Sequence[str], differing: Sequence[str]) -> str:
    unread = [name for name, one in zip(names, histories, strict=True) if not one.config]
    note = f'<p class="note">Without a config.yaml: {escaped(", ".join(unread))}.</p>' if unread else ""
    if not differing:
        return f"<p>Nothing: all have the same configuration.</p>{note}"
    rows = [
        (
            escaped(key),
            [
                _scalar(history.values[key]) if key in history.values else _MISSING
                for history in histories
            ],
        )
        for key in differing
    ]
    return table(["Key", *names], rows) + note
