"""Swin conversion through files on disk: every published layout computes what PyTorch does, stage by stage."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from published import in_stacks, layers_of, save_torch
from safetensors.torch import save_file

from cast_jax.convert.engine import converted, place, plan
from cast_jax.convert.sources import open_checkpoint
from cast_jax.convert.swin import HEADS, RULES, facts, found, layout, prepared, reference, reference_stages
from cast_jax.models.functional import Functional, count_parameters
from cast_jax.models.swin import Swin, SwinConfig, swin_b, swin_l, swin_s, swin_t

CONFIG = SwinConfig(embed_dim=8, depths=(1, 5, 1, 2), num_heads=(1, 2, 2, 4), window_size=3)
ALL = (0, 1, 2, 3)
TOLERANCE = 5e-5  # design/porting.md; of unnormalised results times their standard deviation


def hugging_face(kind: str = "SwinBackbone", stages: tuple[int, ...] = ALL) -> torch.nn.Module:
    """A tiny model in which no tensor is zero or constant."""
    config = transformers.SwinConfig(
        embed_dim=8, depths=[1, 5, 1, 2], num_heads=[1, 2, 2, 4], window_size=3, num_labels=3,
        out_features=[f"stage{stage + 1}" for stage in stages],
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def official(prefix: str = "", stages: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """The keys of Microsoft's ``swin_transformer.py``: what Hugging Face's are called there, and the buffers."""
    names = (
        (r"^swin\.", ""),
        (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^embeddings\.norm", "patch_embed.norm"),
        (r"^encoder\.", ""),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"^layernorm", "norm"),
        (r"attention\.relative_position_bias\.", "attn."),
        (r"attention\.o_proj", "attn.proj"),
        (r"^hidden_states_norms\.stage(\d)", lambda match: f"norm{int(match[1]) - 1}"),
    )
    weights = {}
    for key, tensor in hugging_face("SwinBackbone" if stages else "SwinModel", stages or ALL).state_dict().items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        weights[prefix + key] = tensor
    for key in [key for key in weights if ".q_proj." in key]:
        parts = [weights.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    if stages:
        del weights[f"{prefix}norm.weight"], weights[f"{prefix}norm.bias"]  # detectors have none
    else:
        weights |= {"head.weight": torch.zeros(3, 64), "head.bias": torch.zeros(3)}
    for key in [key for key in weights if key.endswith("bias_table")]:
        weights[key.replace("bias_table", "index")] = torch.zeros(9, 9, dtype=torch.int64)
    weights[f"{prefix}layers.1.blocks.1.attn_mask"] = torch.zeros(4, 9, 9)
    present = {
        "layers.0.downsample.reduction.weight",
        "layers.1.blocks.2.attn.qkv.bias",
        "layers.0.blocks.0.norm1.bias",
    }
    assert {prefix + key for key in present} <= weights.keys()
    return weights


class Encoder(nnx.Module):
    """Names the parameters as the rules do, and returns all that is compared."""

    def __init__(self, config: SwinConfig, rngs: nnx.Rngs):
        self.encoder = Swin(config, rngs=rngs)

    def __call__(self, images, *, rngs: nnx.Rngs | None = None):
        return self.encoder.intermediates(images, rngs=rngs)


@functools.cache
def network(config: SwinConfig) -> Functional:
    return Functional(lambda rngs: Encoder(config, rngs))


def convert(source, config: SwinConfig = CONFIG):
    """The parameters by name, and the configuration with what the file decides."""
    checkpoint = prepared(open_checkpoint(source))
    config = dataclasses.replace(config, **found(checkpoint.shapes))
    wanted = layers_of(network(config).abstract())
    origins = plan(checkpoint, (*RULES, *HEADS), wanted, "swin")
    assert all(theirs == ours for theirs, ours in facts(checkpoint.config, config).values())
    return dict(zip(origins, converted(checkpoint, origins), strict=True)), config


def as_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def check(converted_file, theirs: torch.nn.Module, size: tuple[int, int]) -> None:
    """Every intermediate result is PyTorch's."""
    arrays, config = converted_file
    model = network(config)
    inputs = np.random.default_rng(3).normal(size=(2, *size, 3)).astype(np.float32)
    computed = jax.jit(model.apply)(in_stacks(arrays, model.abstract()), inputs)
    with torch.no_grad():
        expected = reference_stages(theirs, as_torch(inputs))
    names = "embedding blocks/0 maps/0 blocks/1 blocks/2 blocks/3 blocks/4 blocks/5 maps/1 blocks/6 maps/2"
    assert list(expected) == [*names.split(), "blocks/7", "blocks/8", "maps/3"]
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        assert computed[name].shape == value.shape
        error = np.abs(computed[name] - value).max() / max(1.0, value.std())
        assert error < TOLERANCE, (name, error)


def same(ours, others) -> bool:
    return ours.keys() == others.keys() and all(np.array_equal(ours[name], others[name]) for name in ours)


# Windows of 3: maps of 4 x 5 and more, and maps that are padded, the coarsest smaller than a window.
@pytest.mark.parametrize("size", [(128, 160), (64, 96)])
@pytest.mark.parametrize(("kind", "stages"), [("SwinBackbone", ALL), ("SwinForImageClassification", ())])
def test_hugging_face(tmp_path, kind, stages, size):
    theirs = hugging_face(kind)
    theirs.save_pretrained(tmp_path)
    keys = open_checkpoint(tmp_path).shapes
    assert any("attention.self.query" in key for key in keys)  # the names of version 4
    assert layout(keys) == "hugging_face"
    converted_file = convert(tmp_path)
    assert converted_file[1].learned_norms == stages
    check(converted_file, theirs, size)


@pytest.mark.parametrize("kind", ["SwinBackbone", "SwinModel"])
def test_names_of_version_5(tmp_path, kind):
    theirs = hugging_face(kind)
    theirs.save_pretrained(tmp_path / "saved")
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    assert any("attention.q_proj" in key for key in open_checkpoint(tmp_path / "x.safetensors").shapes)
    assert same(convert(tmp_path / "x.safetensors")[0], convert(tmp_path / "saved")[0])


def test_official_classifiers(tmp_path):
    source = save_torch(tmp_path / "x.pth", {"model": official()})
    assert layout(open_checkpoint(source).shapes) == "official"
    hugging_face("SwinModel").save_pretrained(tmp_path / "saved")
    arrays, config = convert(source)
    assert config.learned_norms == ()
    assert same(arrays, convert(tmp_path / "saved")[0])


@pytest.mark.parametrize("stages", [ALL, (1, 2, 3)])
def test_official_detectors(tmp_path, stages):
    """Norms of the maps, of all stages or of those that the detector uses."""
    weights = official("backbone.", stages) | {"neck.lateral_convs.0.conv.weight": torch.zeros(2)}
    hugging_face(stages=stages).save_pretrained(tmp_path / "saved")
    arrays, config = convert(save_torch(tmp_path / "x.pth", {"state_dict": weights}))
    assert config.learned_norms == stages
    assert same(arrays, convert(tmp_path / "saved")[0])


def test_the_file_shows_its_window(tmp_path):
    source = save_torch(tmp_path / "x.pth", official())
    assert convert(source, dataclasses.replace(CONFIG, window_size=7))[1] == dataclasses.replace(
        CONFIG, learned_norms=()
    )
    assert found({"conv1.weight": (2, 3, 7, 7)}) == {}


def test_configurations_are_held_against_ours():
    differing = {"hidden_act": "relu", "layer_norm_eps": 1e-6}
    assert all(theirs == ours for theirs, ours in facts({}, CONFIG).values())
    for given in (differing, {"backbone_config": differing}):
        assert all(theirs != ours for theirs, ours in facts(given, CONFIG).values())


@pytest.mark.parametrize("stages", [ALL, (1, 2, 3), ()])
def test_the_reference_has_the_parameters(stages):
    config = dataclasses.replace(CONFIG, learned_norms=stages)
    placement = place(reference(config).state_dict(), RULES)
    assert placement.unmatched == []
    assert placement.origins.keys() == layers_of(network(config).abstract()).keys()


def test_the_reference_computes_as_hugging_face():
    """Its backbone moves the windows on every map, its classifier only on those that are larger than a window."""
    images = torch.randn(1, 3, 64, 96)
    backbone, classifier = hugging_face(), hugging_face("SwinModel")
    with torch.no_grad():
        ours = reference_stages(backbone, images)
        for stage, theirs in enumerate(backbone(images).feature_maps):
            np.testing.assert_allclose(ours[f"maps/{stage}"], theirs.permute(0, 2, 3, 1), atol=1e-6)
        for size, agree in (((128, 160), True), ((96, 96), False)):
            images = torch.randn(1, 3, *size)
            ours = torch.from_numpy(reference_stages(classifier, images)["blocks/8"]).flatten(1, 2)
            theirs = classifier(images).last_hidden_state
            assert torch.allclose(classifier.layernorm(ours), theirs, atol=1e-5) == agree


@pytest.mark.parametrize(
    ("make", "sizes", "count"),
    [
        (swin_t, {}, 27_519_354),
        (swin_s, {"depths": [2, 2, 18, 2]}, 48_837_258),
        (swin_b, {"depths": [2, 2, 18, 2], "embed_dim": 128, "num_heads": [4, 8, 16, 32]}, 86_743_224),
        (
            swin_l,
            {"depths": [2, 2, 18, 2], "embed_dim": 192, "num_heads": [6, 12, 24, 48], "window_size": 12,
             "image_size": 384},
            195_198_516,
        ),
    ],
)  # fmt: skip
def test_full_size_parameters(make, sizes, count):
    """As many as PyTorch's, but for the classifier's last norm, which is in its backbone too although unused there."""
    config = make()
    last, norms = 2 * config.map_widths[-1], 2 * sum(config.map_widths)
    with torch.device("meta"):
        settings = transformers.SwinConfig(**sizes, out_features=["stage1", "stage2", "stage3", "stage4"])
        models = [kind(settings) for kind in (transformers.SwinModel, transformers.SwinBackbone)]
    theirs = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    ours = count_parameters(network(config).abstract())
    assert theirs == [count, count + norms] == [ours + last - norms, ours + last]
    if make is swin_l:
        assert theirs[1] == 195_204_276  # design/porting.md
