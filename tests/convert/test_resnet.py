"""ResNet conversion through files on disk, batch norms with statistics of their own included."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from published import save_torch

from cast_jax.convert.command import convert
from cast_jax.convert.models import MODELS, parameter_shapes
from cast_jax.convert.verify import verify
from cast_jax.core.errors import UserError
from cast_jax.core.files import read_json

CHANGES = {"encoder": {"width": 4, "depths": [1, 2, 1, 1]}}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights, and the statistics of the batch norms."""
    torch.manual_seed(0)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.5)
    return model.eval()


def hugging_face(head: bool = False) -> Any:
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[16, 32, 64, 128], depths=[1, 2, 1, 1])
    return randomised((transformers.ResNetForImageClassification if head else transformers.ResNetModel)(config))


def torchvision() -> dict[str, torch.Tensor]:
    """The keys of torchvision's ``resnet.py``: what Hugging Face's are called there."""
    names = (
        (r"resnet\.embedder\.embedder\.convolution", "conv1"),
        (r"resnet\.embedder\.embedder\.normalization", "bn1"),
        (r"resnet\.encoder\.stages\.(\d)\.layers\.(\d)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}."),
        (r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}"),
        (r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}"),
        (r"shortcut\.convolution", "downsample.0"),
        (r"shortcut\.normalization", "downsample.1"),
        (r"classifier\.1", "fc"),
    )
    renamed = {}
    for key, tensor in hugging_face(head=True).state_dict().items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        renamed[key] = tensor
    assert {"layer2.1.conv3.weight", "layer1.0.downsample.1.running_var", "bn1.num_batches_tracked", "fc.bias"} <= set(
        renamed
    )
    return renamed


def check(source, destination):
    stages = verify(convert("resnet50", source, destination, CHANGES), source, destination / "model.safetensors")
    assert [stage.name for stage in stages if not stage.passed] == []
    assert len(stages) == 1 + 5 + 4
    assert all(stage.relative < 1e-5 for stage in stages)


@pytest.mark.parametrize("head", [False, True])
def test_hugging_face(tmp_path, head):
    hugging_face(head).save_pretrained(tmp_path / "source")
    check(tmp_path / "source", tmp_path / "destination")
    assert read_json(tmp_path / "destination" / "config.json")["converted"]["keys"] == "hugging_face"


def test_torchvision(tmp_path):
    check(save_torch(tmp_path / "x.pth", torchvision()), tmp_path / "destination")
    assert read_json(tmp_path / "destination" / "config.json")["converted"]["keys"] == "torchvision"


def test_both_layouts_are_the_same_weights(tmp_path):
    hugging_face(head=True).save_pretrained(tmp_path / "source")
    convert("resnet50", tmp_path / "source", tmp_path / "a", CHANGES)
    convert("resnet50", save_torch(tmp_path / "x.pth", torchvision()), tmp_path / "b", CHANGES)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("prefix", ["backbone.", "module.", "module.backbone."])
@pytest.mark.parametrize("make", [torchvision, lambda: hugging_face().state_dict()])
def test_prefixes(tmp_path, make, prefix):
    source = save_torch(tmp_path / "x.pth", {f"{prefix}{key}": value for key, value in make().items()})
    convert("resnet50", source, tmp_path / "destination", CHANGES)


def test_the_first_files_do_not_count_batches(tmp_path):
    weights = {key: value for key, value in torchvision().items() if not key.endswith("num_batches_tracked")}
    check(save_torch(tmp_path / "x.pth", weights), tmp_path / "destination")


def test_what_it_refuses(tmp_path):
    weights = torchvision()
    del weights["layer1.0.bn2.running_var"]
    source = save_torch(tmp_path / "x.pth", weights)
    with pytest.raises(UserError, match=r"the batch norm layer1\.0\.bn2 lacks layer1\.0\.bn2\.running_var"):
        convert("resnet50", source, tmp_path / "destination", CHANGES)
    weights = torchvision() | {"bn1.bias": torch.zeros(5)}
    with pytest.raises(UserError, match="the tensors of the batch norm bn1 differ in length"):
        convert("resnet50", save_torch(tmp_path / "y.pth", weights), tmp_path / "destination", CHANGES)
    weights = torchvision() | {"bn1.running_mean": torch.zeros(len(torchvision()["bn1.bias"]), dtype=torch.int32)}
    with pytest.raises(UserError, match=r"(?s)bn1.*int32"):
        convert("resnet50", save_torch(tmp_path / "i.pth", weights), tmp_path / "destination", CHANGES)
    weights = torchvision()
    weights["bn1.running_var"][0] = -1.0
    with pytest.raises(UserError, match=r"bn1\.running_var is negative or NaN"):
        convert("resnet50", save_torch(tmp_path / "v.pth", weights), tmp_path / "destination", CHANGES)
    model = hugging_face()
    model.config.downsample_in_bottleneck = True
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="downsample_in_bottleneck is True, not False"):
        convert("resnet50", tmp_path / "source", tmp_path / "destination", CHANGES)
    assert not (tmp_path / "destination").exists()


@pytest.mark.parametrize(
    ("name", "depths", "count"),
    [("resnet50", [3, 4, 6, 3], 23_508_032), ("resnet101", [3, 4, 23, 3], 42_500_160)],
)
def test_full_size_parameters(name, depths, count):
    """As many as PyTorch's: its batch norms' weights and biases are our scales and shifts."""
    with torch.device("meta"):
        theirs = transformers.ResNetModel(transformers.ResNetConfig(depths=depths))
    ours = parameter_shapes(MODELS[name]())
    total = sum(torch.Size(shape).numel() for shape in ours.values())
    assert total == count == sum(parameter.numel() for parameter in theirs.parameters())
