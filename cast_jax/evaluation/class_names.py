"""The names under which results are reported."""

from __future__ import annotations

from collections.abc import Sequence

from cast_jax.core.annotations import Category


def class_names(categories: Sequence[Category]) -> list[str]:
    """One distinct name a category: its own, with its id in brackets where a dataset uses a name twice."""
    names = [category.name for category in categories]
    return [
        name if names.count(name) == 1 else f"{name} ({category.id})"
        for name, category in zip(names, categories, strict=True)
    ]
