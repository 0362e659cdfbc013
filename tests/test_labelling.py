"""Making pseudo-labels: what is said of what was found."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cast_jax.core.annotations import Category, Detections, encode_mask
from cast_jax.core.logging import setup_logging
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.labelling import PseudoLabelConfig, label_images


@pytest.mark.parametrize("found_in", [0, 1, 2])
def test_a_store_of_hardly_any_labels_is_warned_of(found_in, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(10):
        Image.fromarray(np.full((4, 6, 3), number, np.uint8)).save(tmp_path / "images" / f"{number}.png")
    mask = encode_mask(np.ones((4, 6), bool))

    def predict(indices, title):
        for index in indices:
            count = int(index < found_in)
            yield (
                index,
                Detections(np.zeros(count, np.int32), np.ones(count, np.float32), np.ones(count), [mask] * count),
            )

    setup_logging(tmp_path / "log.txt")
    folder, images = tmp_path / "pseudo_labels" / "finetuned", ImageFolder(tmp_path / "images")
    label_images(folder, images, (Category(1, "cell"),), "pixels", "model", PseudoLabelConfig(), lambda: predict)
    said = (tmp_path / "log.txt").read_text()
    assert f"{found_in} instances in 10 images" in said
    assert ("nothing was found in 10 of 10 images" in said) == (found_in == 0)
    assert ("lower pseudo_labels.threshold (0.3)" in said) == (found_in == 0)
