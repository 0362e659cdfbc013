"""Where images and their instances come from; one file a format."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from cast_jax.core.errors import DataError
from cast_jax.data.sources.base import Source
from cast_jax.data.sources.cityscapes import Cityscapes
from cast_jax.data.sources.coco import Coco
from cast_jax.data.sources.folder import ImageFolder

SOURCES: dict[str, Callable[..., Source]] = {"cityscapes": Cityscapes, "coco": Coco, "folder": ImageFolder}
"""Every source that a configuration can name."""


def open_source(spec: Mapping[str, Any]) -> Source:
    """Opens the source that a configuration describes: ``{"name": "coco", "annotations": "val.json", ...}``.

    Raises:
      DataError: an unknown name, an unknown or missing key (lists the known ones), or what the source itself refuses.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in SOURCES:
        raise DataError(f"source name {name!r} is unknown; known names: {', '.join(SOURCES)}")
    parameters = inspect.signature(SOURCES[name]).parameters
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    if unknown := sorted(options.keys() - parameters.keys()):
        raise DataError(f"source {name!r} has no key {', '.join(unknown)}; known keys: {', '.join(parameters)}")
    if missing := sorted(required - options.keys()):
        raise DataError(f"source {name!r} needs the key {', '.join(missing)}; known keys: {', '.join(parameters)}")
    return SOURCES[name](**options)
