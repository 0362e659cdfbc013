"""Draws the paper's Fig. 3 from runs: margin, contrastive loss and false-negative rate over the updates.

python scripts/plot_theory.py runs/k128 runs/k256 runs/k512 --step adapt --out theory.png

The theory (cast_jax.contrastive.loss) predicts a margin between instances that grows about linearly with training and
a bounded false-negative rate, for every number K of negatives. Runs are named after what differs in their contrastive
settings. Each curve is smoothed by a running median; ``--window 1`` shows the values as logged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cast_jax.core.errors import UserError
from cast_jax.core.files import atomic_file, read_json
from cast_jax.core.logging import read_metrics

PANELS = {
    "contrastive/margin": "margin between instances",
    "contrastive/loss": "contrastive loss (unweighted)",
    "contrastive/false_negative_rate": "false-negative rate, 1 - α",
}
Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; what the user can mend ends with its message and exit code 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="workdirs")
    parser.add_argument("--step", default="adapt", help="the trained step to look at")
    parser.add_argument("--out", type=Path, default=Path("theory.png"), help="the picture: .png, .svg or .pdf")
    parser.add_argument("--window", type=int, default=5, help="logged values in a running median")
    options = parser.parse_args(arguments)
    try:
        curves = {run: read_curves(run, options.step) for run in options.runs}
        draw(dict(zip(labels(options.runs, options.step), curves.values(), strict=True)), options.out, options.window)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(options.out)


def read_curves(run: Path, step: str) -> Curves:
    """(updates, values) of every panel's metric.

    Raises:
      UserError: the run has no such step, or it did not log the contrastive metrics.
    """
    path = run / step / "metrics.jsonl"
    if not path.exists():
        trained = sorted(found.parent.name for found in run.glob("*/metrics.jsonl"))
        raise UserError(f"{path} does not exist; trained steps there: {', '.join(trained) or 'none'} (--step)")
    curves: Curves = {}
    lines = read_metrics(path)
    for name in PANELS:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if not points:
            raise UserError(f"{path} has no {name}: was contrastive_weight 0 in this step?")
        updates, values = zip(*points, strict=True)
        curves[name] = np.asarray(updates), np.asarray(values, float)
    return curves


def labels(runs: Sequence[Path], step: str) -> list[str]:
    """``K = 128, scope = bank``: the contrastive settings in which the runs differ, or the folders' names."""
    settings = [_contrastive(run, step) for run in runs]
    differing = [key for key in settings[0] if len({str(values.get(key)) for values in settings}) > 1]
    if not differing or len({str([values.get(key) for key in differing]) for values in settings}) < len(runs):
        return [str(run) for run in runs]
    names = {"num_negatives": "K", "temperature": "τ"}
    return [", ".join(f"{names.get(key, key)} = {values.get(key)}" for key in differing) for values in settings]


def _contrastive(run: Path, step: str) -> Mapping[str, Any]:
    try:
        return read_json(run / "config.json")["steps"][step]["objective"]["contrastive"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def running_median(values: np.ndarray, window: int) -> np.ndarray:
    """The median of up to ``window`` values around each; fewer at the ends."""
    half = max(window, 1) // 2
    return np.array([np.median(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))])


def draw(runs: Mapping[str, Curves], path: Path, window: int) -> Figure:
    """Three panels, one curve a run."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for label, curves in runs.items():
            updates, values = curves[name]
            axes.plot(updates, running_median(values, window), label=label)
        axes.set(title=title, xlabel="updates")
        axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix.lstrip(".") or "png", dpi=150)
    return figure


if __name__ == "__main__":
    main()
