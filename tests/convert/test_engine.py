"""The engine finds every fault before it writes, tells them in one error, and holds one tensor at a time."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cast_jax.convert.engine import LAYOUTS, Rule, affine, converted, ignore, likeness, plan, write_tensors
from cast_jax.convert.sources import Checkpoint
from cast_jax.core.errors import UserError

RULES = (
    *affine(r"layers\.(\d)\.fc", r"layers/\1/fc", "linear"),
    Rule(r"layers\.(\d)\.qkv", (r"layers/\1/q", r"layers/\1/k", r"layers/\1/v"), "linear"),
    Rule("stem", "stem", "convolution"),
    Rule("old_stem", "stem", "convolution"),
    *ignore(r"head\..*"),
)
WANTED = {
    "layers/0/fc/kernel": (4, 2),
    "layers/0/fc/bias": (2,),
    "layers/0/q": (4, 3),
    "layers/0/k": (4, 3),
    "layers/0/v": (4, 3),
    "stem": (3, 5, 1, 4),
}
SOURCE = {"layers.0.fc.weight": (2, 4), "layers.0.fc.bias": (2,), "layers.0.qkv": (9, 4), "stem": (4, 1, 3, 5)}


def checkpoint(shapes) -> Checkpoint:
    random = np.random.default_rng(0)
    arrays = {key: random.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    return Checkpoint(Path("some/file"), dict(shapes), dict.fromkeys(shapes, "F32"), arrays.__getitem__, {})


def test_every_parameter_is_filled(tmp_path):
    source = checkpoint({**SOURCE, "head.weight": (7,)})
    origins = plan(source, RULES, WANTED, "toy")
    write_tensors(tmp_path / "model.safetensors", WANTED, converted(source, origins), before=lambda: None)
    written = load_file(tmp_path / "model.safetensors")
    assert {name: array.shape for name, array in written.items()} == WANTED
    np.testing.assert_array_equal(written["layers/0/fc/kernel"], source.read("layers.0.fc.weight").T)
    for part, name in enumerate("qkv"):
        np.testing.assert_array_equal(written[f"layers/0/{name}"], source.read("layers.0.qkv")[3 * part :][:3].T)
    np.testing.assert_array_equal(written["stem"], np.einsum("oihw->hwio", source.read("stem")))


def test_all_faults_in_one_error():
    shapes = {**SOURCE, "old_stem": (4, 1, 3, 5), "layers.0.fc.weight": (2, 5), "layers.0.fc.bais": (2,)}
    del shapes["layers.0.fc.bias"]
    shapes["layers.1.qkv"] = (10, 4)  # no three equal parts, and no such layer
    with pytest.raises(UserError) as caught:
        plan(checkpoint(shapes), RULES, WANTED, "toy")
    lines = [" ".join(line.split()) for line in str(caught.value).splitlines()]
    assert lines == [
        "some/file: these weights do not make a toy:",
        "missing layers/0/fc/bias nearest names: layers.0.fc.bais, layers.1.qkv",
        "unexpected layers.0.fc.bais nearest names: layers/0/fc/bias, layers/0/v, layers/0/q",
        *(f"unexpected layers.1.qkv would be layers/1/{name}, which toy lacks" for name in "qkv"),
        "mis-shaped layers/0/fc/kernel (5, 2) from layers.0.fc.weight (2, 5), not (4, 2)",
        "filled twice stem by stem, old_stem",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.fc.weight": None}, r"missing +layers/0/fc/kernel"),
        ({"other": (1,)}, r"unexpected +other +nearest names"),
        ({"layers.0.qkv": (10, 4)}, r"mis-shaped +layers/0/q +impossible from layers\.0\.qkv \(10, 4\), not \(4, 3\)"),
        ({"stem": (4, 3)}, r"mis-shaped +stem +impossible"),
        ({"old_stem": (4, 1, 3, 5)}, r"filled twice +stem +by stem, old_stem"),
    ],
)
def test_each_fault_alone(change, message):
    shapes = {key: shape for key, shape in {**SOURCE, **change}.items() if shape}
    with pytest.raises(UserError, match=message) as caught:
        plan(checkpoint(shapes), RULES, WANTED, "toy")
    assert "by its shapes" not in str(caught.value)


def test_long_lists_are_shortened_and_variants_recognised():
    small, large = ({f"layers/{n}/fc/bias": (width,) for n in range(9)} for width in (2, 3))
    source = checkpoint({**{f"layers.{n}.fc.bias": (3,) for n in range(9)}, **{f"x{n}": (1,) for n in range(20)}})
    given = large | {"stem": None}
    others = {name: likeness(given, shapes) for name, shapes in (("large", large), ("other", WANTED))}
    assert others == {"large": 9 / 10, "other": 0.0}
    with pytest.raises(UserError, match=r"by its shapes this is a large; you asked for small(?s:.*)and 8 more"):
        plan(source, RULES, small, "small", lambda: others)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_refuse_other_axes(layout):
    if layout != "same":
        with pytest.raises((ValueError, IndexError)):
            LAYOUTS[layout](np.zeros((2, 2, 2)))


def test_a_pointwise_convolution_must_be_one():
    assert LAYOUTS["pointwise"](np.zeros((4, 3, 1, 1))).shape == (3, 4)
    with pytest.raises(ValueError, match="squeeze"):
        LAYOUTS["pointwise"](np.zeros((4, 3, 1, 3)))


def test_memory_stays_at_one_tensor(tmp_path):
    """The arrays appear one by one: the peak is a few of a hundred."""
    shapes = {f"layers.{n}.fc.weight": (128, 512) for n in range(10)}
    wanted = {f"layers/{n}/fc/kernel": (512, 128) for n in range(10)}
    source = Checkpoint(
        Path("x"), shapes, dict.fromkeys(shapes, "F32"), lambda key: np.ones(shapes[key], np.float32), {}
    )
    origins = plan(source, RULES, wanted, "toy")
    tracemalloc.start()
    write_tensors(tmp_path / "model.safetensors", wanted, converted(source, origins), before=lambda: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one = 4 * 128 * 512
    assert (tmp_path / "model.safetensors").stat().st_size > 10 * one
    assert peak < 4 * one


def test_nothing_is_left_when_reading_fails(tmp_path):
    def broken():
        yield np.zeros((2, 2), np.float32)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_tensors(tmp_path / "m.safetensors", {"a": (2, 2), "b": (1,)}, broken(), before=lambda: None)
    assert list(tmp_path.iterdir()) == []
