"""The ResNet encoder equals the same network written in torch, values and gradients, on re-randomised weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import drawn

from cast_jax.core.errors import UserError
from cast_jax.models.functional import Functional
from cast_jax.models.registry import build_segmenter
from cast_jax.models.resnet import ResNet, ResNetConfig

CONFIG = ResNetConfig(widths=(4, 8, 8, 12), depths=(1, 2, 1, 1), groups=2)


def reference(params: dict, images: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The four maps, and the input they hang on."""

    def conv(node, features, stride=1):
        kernel = torch.tensor(np.asarray(node["kernel"])).permute(3, 2, 0, 1)
        return F.conv2d(features, kernel, stride=stride, padding=1)

    def norm(node, features):
        return F.group_norm(
            features, CONFIG.groups, *(torch.tensor(np.asarray(node[k])) for k in ("scale", "bias")), 1e-6
        )

    inputs = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    features = F.relu(norm(params["norm"], conv(params["stem"], inputs, 2)))
    maps = []
    for number in range(4):
        for block in range(CONFIG.depths[number]):
            node = params["stages"][str(number)][str(block)]
            stride = 2 if number and not block else 1
            changed = norm(node["norm1"], conv(node["conv1"], features, stride))
            changed = norm(node["norm2"], conv(node["conv2"], F.relu(changed)))
            kept = features if stride == 1 else F.avg_pool2d(features, 2)
            if "shortcut" in node:
                kept = F.conv2d(kept, torch.tensor(np.asarray(node["shortcut"]["kernel"])).T[:, :, None, None])
            features = F.relu(changed + kept)
        maps.append(features)
    return maps, inputs


def test_equals_the_same_network_in_torch():
    model = Functional(lambda rngs: ResNet(CONFIG, rngs=rngs))
    params = drawn(model.abstract())
    images = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    expected, inputs = reference(params, images)
    maps = jax.jit(model.apply)(params, images)
    assert [m.shape[1:] for m in maps] == [(16, 24, 4), (8, 12, 8), (4, 6, 8), (2, 3, 12)]
    for found, wanted in zip(maps, expected, strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    weights = [np.random.default_rng(1).normal(size=m.shape).astype(np.float32) for m in maps]
    loss = lambda x: sum(jnp.sum(m * w) for m, w in zip(model.apply(params, x), weights, strict=True))
    sum((m * torch.tensor(w.transpose(0, 3, 1, 2))).sum() for m, w in zip(expected, weights, strict=True)).backward()
    gradient = inputs.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(images), gradient, rtol=1e-3, atol=1e-4 * np.abs(gradient).max())


@pytest.mark.parametrize("name", ["student_resnet_tiny", "teacher_resnet_tiny"])
def test_a_segmenter_with_it_has_masks_at_half_the_image(name):
    model = build_segmenter({"name": name}, "abc", (64, 96))
    prediction = jax.eval_shape(model.apply, model.abstract(), jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32))
    assert prediction.mask_logits.shape == (2, 5 * 8, 32, 48)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="multiples of groups"):
        ResNetConfig(widths=(4, 8, 8, 13), groups=2)
    with pytest.raises(UserError, match="four values"):
        ResNetConfig(depths=(1, 2, 3))
    with pytest.raises(UserError, match="multiples of the model's patch size 16"):
        build_segmenter({"name": "student_resnet_tiny"}, "abc", (64, 40))
