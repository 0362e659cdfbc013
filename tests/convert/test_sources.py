"""Checkpoints in every published form are opened; what is no checkpoint is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cast_jax.convert.sources import fold_batch_norms, open_checkpoint
from cast_jax.core.errors import UserError

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([0.5, -2.0])}


def sharded(folder, weight_map, shards):
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def values(path):
    checkpoint = open_checkpoint(path)
    assert all(checkpoint.read(key).dtype == np.float32 for key in checkpoint.shapes)
    return {key: checkpoint.read(key).tolist() for key in checkpoint.shapes}


EXPECTED = {key: tensor.tolist() for key, tensor in WEIGHTS.items()}


def test_safetensors_alone_in_a_folder_and_in_shards(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    assert values(tmp_path / "model.safetensors") == EXPECTED
    assert values(tmp_path) == EXPECTED
    assert open_checkpoint(tmp_path).config == {"model_type": "dinov2"}
    shards = {"x-1.safetensors": {"a.weight": WEIGHTS["a.weight"]}, "x-2.safetensors": {"b": WEIGHTS["b"]}}
    index = {key: name for name, tensors in shards.items() for key in tensors}
    assert values(sharded(tmp_path / "shards", index, shards)) == EXPECTED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_other_precisions_become_float32(tmp_path, dtype, suffix):
    path = tmp_path / f"x.{suffix}"
    tensors = {key: tensor.to(dtype) for key, tensor in WEIGHTS.items()}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    assert values(path) == EXPECTED
    assert set(open_checkpoint(path).dtypes.values()) & {"F16", "BF16", "F64", "float16", "bfloat16", "float64"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights, "epoch": 3},
        lambda weights: {"state_dict": weights, "optimizer": {"lr": 0.1}},
        lambda weights: {"teacher": {f"module.{key}": value for key, value in weights.items()}},
    ],
)
def test_wrappers_are_unwrapped(tmp_path, wrap):
    path = tmp_path / "x.pth"
    torch.save(wrap(WEIGHTS), path)
    assert values(path) == EXPECTED


def test_files_from_before_zip_archives(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    assert values(path) == EXPECTED


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", ".."]
)
def test_shards_must_not_leave_the_folder(tmp_path, name):
    save_file(WEIGHTS, tmp_path / "outside.safetensors")
    folder = sharded(tmp_path / "model", {"b": name}, {})
    with pytest.raises(UserError, match=r"a shard must be a \.safetensors file in the same folder"):
        open_checkpoint(folder)


def test_faulty_shards(tmp_path):
    folder = sharded(tmp_path / "lost", {"b": "x.safetensors"}, {})
    with pytest.raises(UserError, match=r"index\.json: missing x\.safetensors"):
        open_checkpoint(folder)
    folder = sharded(tmp_path / "lost_key", {"b": "x.safetensors", "c": "x.safetensors"}, {"x.safetensors": WEIGHTS})
    with pytest.raises(UserError, match=r"in no shard: c"):
        open_checkpoint(folder)
    both = {"x.safetensors": WEIGHTS, "y.safetensors": WEIGHTS}
    folder = sharded(tmp_path / "twice", {"a.weight": "x.safetensors", "b": "y.safetensors"}, both)
    with pytest.raises(UserError, match=r"keys in more than one shard: a\.weight \(x\.safetensors, y\.safetensors\)"):
        open_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        open_checkpoint(folder)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_code_in_a_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, write, reason in (
        ("a.pth", lambda path: torch.save({"x": Harmful()}, path), r"it asks for posix\.mkdir"),
        ("b.pth", _pickle, "it is no pickle of tensors"),  # of a protocol that PyTorch does not even start with
    ):
        write(tmp_path / name)
        with pytest.raises(UserError, match=rf"refused; .* but {reason}$"):
            open_checkpoint(tmp_path / name)
    assert not (tmp_path / "harmed").exists()


def _pickle(path):
    path.write_bytes(pickle.dumps({"x": Harmful()}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.safetensors", b"not weights", "not a readable safetensors"),
        ("x.pth", b"not weights", "x.pth: "),
        ("x.pth", b"", "x.pth: "),
        ("x.txt", b"text", r"not a folder, a \.safetensors or a \.pth"),
        ("nowhere/else.pth", None, "no such file"),
        ("", None, "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / name)


def test_a_folder_of_pickles_is_told_apart(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"give pytorch_model\.bin by its name"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    big = {"a": torch.zeros(1000)}
    save_file(big, path) if suffix == "safetensors" else torch.save(big, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=rf"x\.{suffix}: (not a readable|refused)"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no weights"):
        open_checkpoint(tmp_path / "x.pth")


def test_without_torch_it_says_what_to_install(tmp_path, monkeypatch):
    torch.save(WEIGHTS, tmp_path / "x.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'cast_jax\[convert\]'"):
        open_checkpoint(tmp_path / "x.pth")


def batch_norm() -> dict[str, torch.Tensor]:
    """Of six channels, one of them all but constant, and a convolution before it."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(6, generator=generator)
    variance = draw().square() + 0.1
    variance[0] = 1e-7
    return {
        "conv.weight": torch.ones(6, 3, 1, 1), "n.weight": draw(), "n.bias": draw(), "n.running_mean": draw(),
        "n.running_var": variance, "n.num_batches_tracked": torch.tensor(7),
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_batch_norms_are_folded(tmp_path, suffix):
    weights, path = batch_norm(), tmp_path / f"x.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    folded = fold_batch_norms(open_checkpoint(path))
    assert folded.shapes == {"conv.weight": (6, 3, 1, 1), "n.scale": (6,), "n.shift": (6,)}
    assert folded.dtypes.keys() == folded.shapes.keys()
    assert all(folded.read(key).dtype == np.float32 for key in folded.shapes)
    np.testing.assert_array_equal(folded.read("conv.weight"), weights["conv.weight"])
    inputs = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(6, dtype=torch.float64)
    norm.load_state_dict({key.removeprefix("n."): value for key, value in weights.items() if key.startswith("n.")})
    scale, shift = (torch.from_numpy(folded.read(f"n.{part}"))[:, None, None] for part in ("scale", "shift"))
    torch.testing.assert_close(inputs * scale + shift, norm.eval()(inputs), rtol=1e-6, atol=1e-6)


def test_folding_reads_one_batch_norm_at_a_time(tmp_path):
    weights = {f"{name}.{key[2:]}": value for name in "nm" for key, value in batch_norm().items() if key[:2] == "n."}
    torch.save(weights, tmp_path / "x.pth")
    checkpoint = open_checkpoint(tmp_path / "x.pth")
    keys: list[str] = []

    def read(key: str) -> np.ndarray:
        keys.append(key)
        return checkpoint.read(key)

    folded = fold_batch_norms(dataclasses.replace(checkpoint, read=read))
    assert keys == []
    folded.read("n.scale")
    assert keys == ["n.weight", "n.bias", "n.running_mean", "n.running_var"]


@pytest.mark.parametrize("member", ["weight", "bias", "running_mean", "running_var"])
def test_incomplete_batch_norms_are_named(tmp_path, member):
    weights = batch_norm()
    del weights[f"n.{member}"]
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"the batch norm n lacks n\.{member}$"):
        fold_batch_norms(open_checkpoint(tmp_path / "x.pth"))
