"""Progress for a person: a bar with an ETA on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm

from cast_jax.core.distributed import is_first

logger = logging.getLogger(__name__)


class Progress:
    """Shows how far a loop of ``total`` steps is; a context manager.

    Args:
      name: shown in front.
      total: steps of the whole run.
      start: steps already done by an earlier run; the ETA leaves them out, and the first of this one, which compiles.
      every: seconds between plain lines.
      terminal: draw a bar; None asks whether standard error is a terminal.
    """

    def __init__(
        self, name: str, total: int, *, start: int = 0, every: float = 15.0, terminal: bool | None = None
    ) -> None:
        self.name, self.total, self.every = name, total, every
        self._last = time.monotonic()
        self._since: float | None = None  # when the first step here was done
        self._known = start
        self._values: dict[str, float] = {}
        terminal = sys.stderr.isatty() if terminal is None else terminal
        self._silent = not is_first()
        self._bar = tqdm(total=total, initial=start, desc=name) if terminal and not self._silent else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, values: Mapping[str, float]) -> None:
        """Sets the numbers shown beside the progress."""
        self._values = dict(values)
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)

    def update(self, step: int) -> None:
        """Says that ``step`` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if self._since is None:
            self._since, self._known = now, step
        if self._silent or now - self._last < self.every:
            return
        self._last = now
        logger.info("%s", self.line(step, now - self._since))

    def line(self, step: int, seconds: float) -> str:
        """'distill  37 %  step 370/1000  loss 1.234  ETA 0:12:34' after ``seconds`` since the first step."""
        numbers = "".join(f"  {name} {value:.4g}" for name, value in self._values.items())
        line = f"{self.name}  {100 * step // self.total} %  step {step}/{self.total}{numbers}"
        if step == self._known:
            return line
        return f"{line}  ETA {clock(seconds / (step - self._known) * (self.total - step))}"


class Stopwatch:
    """Seconds of a run in total and by activity, carried over restarts.

    ``previous`` is what :meth:`read` gave before the restart.
    """

    def __init__(self, previous: Mapping[str, float] | None = None) -> None:
        self._seconds = dict(previous or {})
        self._base = self._seconds.pop("total", 0.0)
        self._begin = time.monotonic()

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Adds the time spent inside to ``activity``."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._seconds[activity] = self._seconds.get(activity, 0.0) + time.monotonic() - begin

    def read(self) -> dict[str, float]:
        """Seconds so far, by activity, and under "total" all of them together with the time between."""
        return {"total": self._base + time.monotonic() - self._begin, **self._seconds}


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
