"""Which images are labelled: seeded and nested (a larger share contains every smaller one of the same seed)."""

from __future__ import annotations

import numpy as np


def split_indices(total: int, labelled: int, seed: int) -> tuple[list[int], list[int]]:
    """(labelled, unlabelled) indices of ``total`` images, each sorted.

    Raises:
      ValueError: ``labelled`` is not between 1 and ``total``.
    """
    if not 1 <= labelled <= total:
        raise ValueError(f"cannot label {labelled} of {total} images")
    order = np.random.default_rng(seed).permutation(total)
    return sorted(order[:labelled].tolist()), sorted(order[labelled:].tolist())
