"""Exported weights come back bit for bit, and only where they fit."""

from __future__ import annotations

import hashlib
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import save

from cast_jax.core.annotations import Category
from cast_jax.core.errors import UserError
from cast_jax.core.files import read_json
from cast_jax.export import load_shapes, load_weights, merge_weights, product, save_weights, weights_hash

CATEGORIES = (Category(24, "person"), Category(26, "car"))
MODEL = {"model": {"name": "student_tiny", "encoder": {"depth": 2}}, "image_size": [32, 48]}


def params(value: float = 0.0):
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.normal(size=shape) + value).astype(np.float32)
    blocks = {str(i): {"kernel": draw(3, 4), "bias": draw(4)} for i in range(2)}
    return {"encoder": {"blocks": blocks, "encoder_norm": {"scale": draw(4)}}, "head": {"kernel": draw(4, 2)}}


def test_round_trip(tmp_path):
    path = tmp_path / "exported" / "last.safetensors"
    save_weights(path, jax.device_put(params()), MODEL, CATEGORIES)
    loaded, model, categories = load_weights(path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params())
    assert jax.tree.structure(loaded) == jax.tree.structure(params())
    assert model == MODEL
    assert categories == CATEGORIES
    shapes, *rest = load_shapes(path)
    assert rest == [model, categories]
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, loaded)
    assert read_json(path.parent / "classes.json")[1] == {"id": 26, "name": "car"}
    assert weights_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    before = weights_hash(path)
    save_weights(path, params(1.0), MODEL, CATEGORIES)
    assert weights_hash(path) != before


def test_unreadable_exports_are_named(tmp_path):
    path = tmp_path / "last.safetensors"
    with pytest.raises(UserError, match=r"last\.safetensors: not a readable export"):
        load_weights(path)
    save_weights(path, params(), MODEL, CATEGORIES)
    whole = path.read_bytes()
    for content in (b"", b"no weights", whole[: len(whole) // 2]):
        path.write_bytes(content)
        for load in (load_weights, load_shapes):
            with pytest.raises(UserError, match=r"last\.safetensors: not a readable export"):
                load(path)
    changed = bytearray(whole)
    changed[-3] ^= 1
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"its numbers are not those that were written; delete it"):
        load_weights(path)
    earlier = path.with_name("earlier.safetensors")
    earlier.write_bytes(save({"kernel": np.ones(3)}))  # which says nothing of its numbers
    load_weights(earlier)
    with pytest.raises(UserError, match=rf"{tmp_path}: is a folder; name the file, such as {path}"):
        load_weights(tmp_path)
    path.write_bytes(whole)
    for classes in ("{", '[{"name": "car"}]', "3"):
        (tmp_path / "classes.json").write_text(classes)
        with pytest.raises(UserError, match=r"last\.safetensors: not a readable export"):
            load_weights(path)
    (tmp_path / "classes.json").unlink()
    with pytest.raises(UserError, match=r"classes\.json"):
        load_weights(path)


def test_the_product_of_a_run_is_refine_s_then_distill_s_then_the_newest(tmp_path):
    assert product(tmp_path) is None
    files = [tmp_path / name / "exported" / "last.safetensors" for name in ("refine", "distill", "finetune", "adapt")]
    for age, file in enumerate(files):
        save_weights(file, params(), MODEL, CATEGORIES)
        os.utime(file, (1e9 - age, 1e9 - age))
    best = files[0].with_name("best.safetensors")
    best.write_bytes(files[0].read_bytes())  # the newest, but not what the run ends with
    (tmp_path / "refine" / "other.safetensors").write_bytes(b"")  # no export
    assert product(files[0].parent) == files[0]
    for file, left in zip(files, (best, *files[1:]), strict=True):
        assert product(tmp_path) == file
        file.unlink()
        if left == best:
            assert product(tmp_path) == best
            best.unlink()
    assert product(tmp_path) is None


def test_merge_takes_everything_or_parts():
    fresh, loaded = params(), params(5.0)
    jax.tree.map(np.testing.assert_array_equal, merge_weights(fresh, loaded, (), "x"), loaded)
    abstract = jax.eval_shape(lambda: fresh)
    jax.tree.map(np.testing.assert_array_equal, merge_weights(abstract, loaded, (), "x"), loaded)
    # Of the parts only; others may differ or be absent.
    merged = merge_weights(fresh, {"encoder": loaded["encoder"], "other": np.zeros(3)}, ("encoder",), "x")
    jax.tree.map(np.testing.assert_array_equal, merged, {"encoder": loaded["encoder"], "head": fresh["head"]})
    merged = merge_weights(fresh, loaded, ("encoder/blocks/1", "head"), "x")
    np.testing.assert_array_equal(merged["encoder"]["blocks"]["0"]["bias"], fresh["encoder"]["blocks"]["0"]["bias"])
    np.testing.assert_array_equal(merged["encoder"]["blocks"]["1"]["bias"], loaded["encoder"]["blocks"]["1"]["bias"])


def test_merge_lists_every_fault():
    loaded = params()
    del loaded["encoder"]["blocks"]["0"]["bias"]
    loaded["encoder"]["blocks"]["1"]["kernel"] = np.zeros((3, 5), np.float32)
    loaded["neck"] = {"kernel": np.zeros(2, np.float32)}
    with pytest.raises(UserError) as caught:
        merge_weights(params(), loaded, (), "some/file")
    assert str(caught.value).splitlines() == [
        "some/file: the weights do not fit the model:",
        "  missing encoder/blocks/0/bias",
        "  unexpected neck/kernel",
        "  encoder/blocks/1/kernel has shape (3, 5), not (3, 4)",
    ]
    merge_weights(params(), loaded, ("head",), "some/file")
    many = params() | {f"extra{i}": np.zeros(1) for i in range(25)}
    with pytest.raises(UserError, match="and 5 more"):
        merge_weights(params(), many, (), "some/file")


def test_a_part_that_is_nowhere_is_a_fault():
    with pytest.raises(UserError, match=r"some/file: the weights do not fit the model:\n  no parameters under encodr"):
        merge_weights(params(), params(5.0), ("encodr",), "some/file")


def test_files_with_single_layers_fill_stacks(tmp_path):
    path = tmp_path / "last.safetensors"
    single = params()
    save_weights(path, single, MODEL, CATEGORIES)
    blocks = [single["encoder"]["blocks"][str(layer)] for layer in range(2)]
    stacked = params(1.0)
    stacked["encoder"]["blocks"] = {"each": jax.tree.map(lambda *leaves: np.stack(leaves) + 1.0, *blocks)}
    merged = merge_weights(stacked, load_weights(path)[0], (), "x")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b - 1.0, rtol=1e-6, atol=1e-6), merged, stacked)
    described = merge_weights(stacked, load_shapes(path)[0], (), "x")
    assert described["encoder"]["blocks"]["each"]["kernel"].shape == (2, 3, 4)
    del single["encoder"]["blocks"]["1"]["bias"]
    with pytest.raises(UserError, match="missing encoder/blocks/each/bias"):
        merge_weights(stacked, single, (), "x")
