"""Published sizes against PyTorch, through files on disk: ``pytest -m full tests/convert/test_full_size.py -s``.

Prints what BENCHMARKS.md holds: every model's largest errors, its time and the process's memory.
"""

from __future__ import annotations

import resource
import time

import pytest
from published import scaled

from cast_jax.convert.command import convert
from cast_jax.convert.models import MODELS, family_of
from cast_jax.convert.verify import verify
from cast_jax.models.teacher.grounding_dino_config import GROUNDING_DINO
from cast_jax.models.teacher.sam2 import SAM2

# Rows and columns of patches: not square, and for a plain ViT around the 37 x 37 of its position embedding.
SIZES = {False: (37, 40), True: (16, 20)}
WHOLE = dict.fromkeys(SAM2, (32, 32)) | dict.fromkeys(GROUNDING_DINO, (12, 12))  # of whole models: 1024², 384²
NAMES = [name for name in MODELS if name != "dinov2_g"]  # 4.5 GB as float32, and no encoder of the paper's


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_published_sizes(tmp_path, name):
    started = time.monotonic()
    config = MODELS[name]()
    scaled(family_of(config).reference(config)).save_pretrained(tmp_path / "source")
    config = convert(name, tmp_path / "source", tmp_path / "destination")
    patches = WHOLE.get(name) or SIZES[config.encoder.pyramid]
    stages = verify(config, tmp_path / "source", tmp_path / "destination" / "model.safetensors", patches)
    assert [stage for stage in stages if not stage.passed] == []
    height, width = family_of(config).inputs(config, patches)[0].shape[1:3]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    absolute, relative = (max(getattr(stage, kind) for stage in stages) for kind in ("absolute", "relative"))
    seconds = time.monotonic() - started
    print(f"| {name} | {height} x {width} | {absolute:.1e} | {relative:.1e} | {seconds:.0f} | {memory:.1f} |")
