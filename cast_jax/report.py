"""One self-contained page about a run: ``report.html``, built from whatever the run has left in its workdir."""

from __future__ import annotations

import base64
import csv
import dataclasses
import datetime
import io
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from cast_jax.core.files import atomic_write, read_json
from cast_jax.core.logging import read_metrics

# What stands first, in this order; the last of the trained steps that has a result is the run's.
_STEPS = ("pretrain", "finetune", "adapt", "burn_in", "distill", "refine", "finetuned", "adapted")
_STUDENTS, _BASELINE = ("burn_in", "distill", "refine"), "student_supervised"
_COLUMNS = (  # of the summary: key, title, format
    ("mask_ap", "mask AP", ".1f"),
    ("mask_ap50", "AP50", ".1f"),
    ("images_per_second", "images/s", ".2f"),
    ("seconds", "seconds", ",.0f"),
)
_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#eab308", "#ec4899", "#06b6d4", "#84cc16")
_GREY = "#868c96"  # legible on white and on black
_OVERLAYS = 8  # an image a step more would only weigh the page down


@dataclasses.dataclass(frozen=True)
class _Chart:
    """What to draw together: the metrics whose names match ``pattern``."""

    title: str
    pattern: str
    smooth: bool = False


_CHARTS = (
    _Chart("Losses", r"^loss/", smooth=True),
    _Chart("Mask AP (%)", r"(^|/)mask_ap(50|75)?$"),
    _Chart("Contrastive loss", r"^contrastive/loss$", smooth=True),
    _Chart("False-negative rate", r"(^|/)false_negative_rate", smooth=True),
    _Chart("Margin between instances", r"(^|/)margin", smooth=True),
    _Chart("Learning rate", r"(^|/)(lr|learning_rate)($|[_/])"),
    _Chart("Images per second", r"(^|/)images_per_second$", smooth=True),
)


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes ``workdir/report.html`` and returns its path; a part that the run has not produced is left out.

    Read: ``summary.json`` (``steps``: step → mask_ap, mask_ap50, images_per_second, seconds), ``config.json``,
    ``environment.json``, ``<step>/metrics.jsonl``, ``<step>/overlays/*.jpg``, ``evaluation/`` of the run and of each
    step (per_class_ap.csv, pr_curve.png), ``pseudo_labels/*/`` (stats.json, contact_sheet.jpg), ``audit/`` (audit.json,
    calibration.png, contact_sheet.jpg). Images are embedded, so that the page can be sent alone; it loads nothing.
    """
    workdir = Path(workdir)
    summary = _json(workdir / "summary.json").get("steps", {})
    evaluated = [step for step, row in summary.items() if row.get("mask_ap") is not None]
    students = [step for step in evaluated if step in _STUDENTS]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "duration": _duration, "words": lambda name: name.replace("_", " ")}
    page = environment.get_template("report.html.j2").render(
        name=workdir.resolve().name,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        summary=summary,
        headline=(students or evaluated or [None])[-1],
        baseline=_BASELINE if students and _BASELINE in evaluated else None,
        seconds=sum(row.get("seconds") or 0 for row in summary.values()),
        steps=[step for folder in _folders(workdir) if (step := _step(folder))],
        pseudo_labels=[part for folder in _folders(workdir / "pseudo_labels") if (part := _pseudo_labels(folder))],
        audit=_audit(workdir / "audit"),
        evaluations=[part for folder in [workdir, *_folders(workdir)] if (part := _evaluation(folder, workdir))],
        settings=[
            (title, list(_flat(_json(workdir / file))))
            for title, file in (("Configuration", "config.json"), ("Environment", "environment.json"))
            if (workdir / file).is_file()
        ],
    )
    atomic_write(workdir / "report.html", page)
    return workdir / "report.html"


def summary_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """An aligned plain-text table of step, mask AP, AP50 (percent), images/s and seconds; "-" where not measured."""
    rows = [["step", *(title for _, title, _ in _COLUMNS)]]
    for step, row in summary.items():
        rows.append([step, *(_number(row.get(key), style) for key, _, style in _COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _step(folder: Path) -> dict[str, Any] | None:
    """A trained step's curves and overlays; ``None`` if the folder is not one."""
    metrics = read_metrics(folder / "metrics.jsonl")
    charts = [(chart.title, _draw(chart, curves)) for chart in _CHARTS if (curves := _curves(metrics, chart.pattern))]
    overlays = sorted(folder.glob("overlays/*.jpg"), key=_natural)[-_OVERLAYS:]
    if not charts and not overlays:
        return None
    images = [(path.stem, _embed(path, 1600)) for path in overlays]
    return {
        "name": folder.name,
        "last": max((line["step"] for line in metrics), default=None),
        "charts": charts,
        "overlays": images,
    }


def _pseudo_labels(folder: Path) -> dict[str, Any] | None:
    """Numbers, per-class counts and histograms of one set of pseudo-labels, told apart by the shape of their values."""
    stats, sheet = _json(folder / "stats.json"), folder / "contact_sheet.jpg"
    if not stats and not sheet.is_file():
        return None
    bars = {
        name: _histogram(value) if {"edges", "counts"} <= set(value) else value
        for name, value in stats.items()
        if isinstance(value, Mapping)
    }
    return {
        "name": folder.name,
        "numbers": {name: value for name, value in stats.items() if _is_number(value)},
        "bars": {name: rows for name, rows in bars.items() if rows and all(map(_is_number, rows.values()))},
        "sheet": _embed(sheet, 2000) if sheet.is_file() else None,
    }


def _audit(folder: Path) -> dict[str, Any] | None:
    """Pseudo-labels of labelled images against their hidden labels, as ``:audit`` leaves them."""
    found, pictures = _json(folder / "audit.json"), ("calibration.png", "contact_sheet.jpg")
    if not found:
        return None
    return {**found, "pictures": [_embed(folder / name, 2000) for name in pictures if (folder / name).is_file()]}


def _histogram(value: Mapping[str, Any]) -> dict[str, Any]:
    edges = value["edges"]
    return {f"{low:.2f} - {high:.2f}": n for low, high, n in zip(edges[:-1], edges[1:], value["counts"], strict=True)}


def _evaluation(folder: Path, workdir: Path) -> dict[str, Any] | None:
    """Per-class AP and the precision-recall plot of ``folder/evaluation``."""
    table, curve = folder / "evaluation" / "per_class_ap.csv", folder / "evaluation" / "pr_curve.png"
    if not table.is_file() and not curve.is_file():
        return None
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8")))) if table.is_file() else []
    return {
        "name": "" if folder == workdir else folder.name,
        "rows": rows,
        "curve": "data:image/png;base64," + _base64(curve.read_bytes()) if curve.is_file() else None,
    }


def _curves(metrics: list[dict[str, Any]], pattern: str) -> dict[str, tuple[list[int], list[float]]]:
    """Metric name → (steps, values) for the names that match, without values that are not finite."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if re.search(pattern, name) and _is_number(value) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return curves


def _draw(chart: _Chart, curves: Mapping[str, tuple[list[int], list[float]]]) -> str:
    """The chart as a data URI: PNG on a transparent ground, so that it suits light and dark pages."""
    figure = Figure(figsize=(4.0, 2.4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (steps, values)) in enumerate(curves.items()):
        colour, label = _COLOURS[i % len(_COLOURS)], name.rsplit("/", 1)[-1].replace("_", " ")
        if chart.smooth and len(values) > 30:
            axes.plot(steps, values, color=colour, lw=0.7, alpha=0.25)
            axes.plot(steps, _smoothed(values), color=colour, lw=1.7, label=label)
        else:
            axes.plot(steps, values, color=colour, lw=1.7, label=label, marker="o" if len(values) < 30 else "", ms=3)
    positive = [value for _, values in curves.values() for value in values if value > 0]
    count = sum(len(values) for _, values in curves.values())
    if chart.smooth and len(positive) == count and max(positive) > 50 * min(positive):
        axes.set_yscale("log")
    axes.set_xlabel("step", color=_GREY, fontsize=9)
    axes.tick_params(which="both", colors=_GREY, labelsize=8.5)
    axes.grid(color=_GREY, alpha=0.22, lw=0.6)
    axes.spines[:].set_visible(False)
    if len(curves) > 1:
        axes.legend(fontsize=7.5, frameon=False, labelcolor=_GREY, ncols=1 + (len(curves) > 5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, transparent=True)
    return "data:image/png;base64," + _base64(buffer.getvalue())


def _smoothed(values: list[float], reach: int = 7) -> list[float]:
    """Running mean over each value and up to ``reach`` on either side; centred, so that trends are not delayed."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _embed(path: Path, max_side: int) -> str:
    """A picture, shrunk to ``max_side``, as a JPEG data URI."""
    buffer = io.BytesIO()
    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((max_side, max_side))
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + _base64(buffer.getvalue())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _folders(folder: Path) -> list[Path]:
    """Sub-folders, the run's steps in the order of training and the others by name."""
    known = {name: i for i, name in enumerate(_STEPS)}
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda path: (known.get(path.name, len(known)), _natural(path)))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders step_9 before step_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, style: str | None = None) -> str:
    """A number in a format, by default one that suits its size; "-" for what is no finite number."""
    if not _is_number(value) or not math.isfinite(value):
        return "-"
    if style is None:
        style = ",.0f" if isinstance(value, int) or abs(value) >= 1000 else ".1f" if abs(value) >= 10 else ".3g"
    return format(value, style)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
