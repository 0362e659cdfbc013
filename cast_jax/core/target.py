"""What programs are compiled for: the devices that are here, or a TPU slice that is not."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import topologies

from cast_jax.core.errors import UserError

_ELSEWHERE: contextvars.ContextVar[tuple[jax.Device, ...]] = contextvars.ContextVar("elsewhere", default=())


def devices() -> Sequence[jax.Device]:
    """Those that a program is for, of all processes."""
    return _ELSEWHERE.get() or jax.devices()


def backend() -> str:
    """Their kind: "cpu", "gpu" or "tpu"."""
    elsewhere = _ELSEWHERE.get()
    return elsewhere[0].platform if elsewhere else jax.default_backend()


@contextlib.contextmanager
def tpu_slice(name: str) -> Iterator[None]:
    """Within, programs are for a TPU slice such as "v5e:2x2": they can be compiled, not run.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    for variable, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(variable, value)  # or libtpu asks a cloud what machine this is
    try:
        described = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # of many kinds
        missing = not isinstance(error, jax.errors.JaxRuntimeError)
        hint = "install libtpu: pip install 'cast_jax[tpu]'" if missing else "name one such as v5e:2x2 or v4:2x2x1"
        raise UserError(f"cannot compile for the TPU slice {name!r} ({error}); {hint}") from error
    token = _ELSEWHERE.set(tuple(described))
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)
