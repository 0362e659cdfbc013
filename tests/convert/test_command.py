"""Conversion through files on disk: every published layout becomes the weights that PyTorch computes the same with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from published import (
    ENCODER,
    as_flags,
    depth_anything,
    dinov2,
    encoder_changes,
    neck_changes,
    official_dinov2,
    official_neck,
    save_torch,
)
from safetensors.torch import load_file, save_file

from cast_jax.convert.command import convert, main, parse_changes
from cast_jax.convert.dinov2 import RULES
from cast_jax.convert.engine import place
from cast_jax.convert.models import MODELS, described_config, parameter_shapes
from cast_jax.convert.verify import verify
from cast_jax.core.errors import UserError
from cast_jax.core.files import read_json
from cast_jax.core.rules import named_leaves
from cast_jax.export import load_weights, merge_weights
from cast_jax.models.dinov2 import DinoV2Config
from cast_jax.models.registry import build_segmenter

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"


def check(model: str, source: Path, destination: Path, changes) -> dict[str, float]:
    """Converts and verifies; the largest error of each part."""
    config = convert(model, source, destination, changes)
    assert described_config(load_weights(destination / "model.safetensors")[1]) == config
    stages = verify(config, source, destination / "model.safetensors")
    assert [stage.name for stage in stages if not stage.passed] == []
    assert all(stage.relative < 1e-5 for stage in stages)
    assert all(stage.absolute > 0 or stage.name == "encoder/embedding" for stage in stages)  # two computations
    parts = {stage.name.partition("/")[0] for stage in stages}
    return {part: max(stage.absolute for stage in stages if stage.name.startswith(part)) for part in parts}


@pytest.mark.parametrize(
    ("registers", "ffn", "shard_size"), [(0, "mlp", "1GB"), (3, "mlp", "20KB"), (0, "swiglu", "1GB")]
)
def test_hugging_face_dinov2(tmp_path, registers, ffn, shard_size):
    source, destination = tmp_path / "source", tmp_path / "destination"
    dinov2(registers, swiglu=ffn == "swiglu").save_pretrained(source, max_shard_size=shard_size)
    assert (source / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    check("dinov2_s", source, destination, encoder_changes(ffn=ffn))
    encoder = read_json(destination / "config.json")["model"]["encoder"]
    assert encoder["num_register_tokens"] == registers
    assert (encoder["position_offset"], encoder["position_antialias"]) == (0.0, registers > 0)


def test_a_classifier_with_a_prefix(tmp_path):
    import transformers

    config = dinov2().config
    model = transformers.Dinov2ForImageClassification(config)
    model.save_pretrained(tmp_path / "source")
    check("dinov2_s", tmp_path / "source", tmp_path / "destination", encoder_changes())


@pytest.mark.parametrize(("registers", "ffn"), [(0, "mlp"), (4, "mlp"), (0, "swiglu")])
def test_official_dinov2(tmp_path, registers, ffn):
    source = save_torch(tmp_path / "x.pth", official_dinov2(registers=registers, swiglu=ffn == "swiglu"))
    check("dinov2_s", source, tmp_path / "destination", encoder_changes(ffn=ffn))
    described = read_json(tmp_path / "destination" / "config.json")
    encoder = described["model"]["encoder"]
    assert (encoder["position_offset"], encoder["position_antialias"]) == ((0.0, True) if registers else (0.1, False))
    assert described["converted"]["keys"] == "official"


def test_official_and_hugging_face_keys_are_the_same_weights(tmp_path):
    """The two tables agree on a model whose tensors are known in both layouts."""
    weights = official_dinov2()
    renamed = {}
    for key, tensor in weights.items():
        for old, new in (
            ("blocks.", "encoder.layer."), ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("cls_token", "embeddings.cls_token"), ("mask_token", "embeddings.mask_token"),
            ("pos_embed", "embeddings.position_embeddings"), ("attn.proj", "attention.output.dense"),
            ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"),
        ):  # fmt: skip
            key = key.replace(old, new)
        key = f"layer{key}" if key.startswith("norm.") else key
        if "attn.qkv" in key:
            for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[key.replace("attn.qkv", f"attention.attention.{name}")] = part.contiguous()
        else:
            renamed[key] = tensor
    assert renamed.keys() == load_file_of(tmp_path, dinov2()).keys()
    save_file(renamed, tmp_path / "hf.safetensors")
    convert("dinov2_s", tmp_path / "hf.safetensors", tmp_path / "a", encoder_changes())
    convert("dinov2_s", save_torch(tmp_path / "x.pth", weights), tmp_path / "b", encoder_changes())
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def load_file_of(folder, model):
    model.save_pretrained(folder / "saved")
    return load_file(folder / "saved" / "model.safetensors")


def test_hugging_face_depth_anything(tmp_path):
    depth_anything().save_pretrained(tmp_path / "source")
    errors = check("dinov2_dpt_s", tmp_path / "source", tmp_path / "with_neck", neck_changes())
    assert errors.keys() == {"encoder", "decoder"}
    check("dinov2_s", tmp_path / "source", tmp_path / "without", encoder_changes())


@pytest.mark.parametrize(
    ("encoder", "head", "wrap"),
    [
        ("pretrained.", "depth_head.", lambda weights: weights),
        ("backbone.", "head.", lambda weights: {"model": {f"module.{k}": v for k, v in weights.items()}, "epoch": 1}),
    ],
)
def test_official_dpt(tmp_path, encoder, head, wrap):
    """Depth-Anything-V2 and UniMatch-V2, the latter as its training program saves it."""
    weights = official_dinov2(encoder) | official_neck(head, classes=7 if head == "head." else None)
    source = save_torch(tmp_path / "x.pth", wrap(weights))
    errors = check("dinov2_dpt_s", source, tmp_path / "with_neck", neck_changes())
    assert errors.keys() == {"encoder", "decoder"}
    assert read_json(tmp_path / "with_neck" / "config.json")["model"]["encoder"]["position_offset"] == 0.1
    check("dinov2_s", source, tmp_path / "without", encoder_changes())


def test_training_checkpoints_group_their_blocks(tmp_path):
    weights = {f"backbone.{key.replace('blocks.', 'blocks.0.')}": value for key, value in official_dinov2().items()}
    source = save_torch(tmp_path / "x.pth", {"teacher": weights | {"dino_head.mlp.0.weight": torch.zeros(2)}})
    check("dinov2_s", source, tmp_path / "destination", encoder_changes())


def test_weights_of_another_model_are_not_replaced(tmp_path):
    source = save_torch(tmp_path / "x.pth", official_dinov2("pretrained.") | official_neck("depth_head."))
    folder = tmp_path / "folder"
    convert("dinov2_s", source, folder, encoder_changes())
    convert("dinov2_s", source, folder, encoder_changes())
    held = (folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="folder holds weights of dinov2_s; delete it, or name another folder"):
        convert("dinov2_dpt_s", source, folder, neck_changes())
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="folder holds weights of another origin"):
        convert("dinov2_s", source, folder, encoder_changes())
    assert (folder / "model.safetensors").read_bytes() == held


@pytest.mark.parametrize("content", ['{"mine": 1}', "[1]", "{oops", '{"converted": 3}'])
def test_a_configuration_that_is_not_ours_is_not_replaced(content, tmp_path):
    source = save_torch(tmp_path / "x.pth", official_dinov2("pretrained."))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(content)
    with pytest.raises(UserError, match="folder holds weights of another origin"):
        convert("dinov2_s", source, tmp_path / "folder", encoder_changes())
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["config.json"]
    assert (tmp_path / "folder" / "config.json").read_text() == content


def test_a_student_starts_from_it(tmp_path):
    """What ``config.init`` does: the parts are merged into a student, strictly."""
    source = save_torch(tmp_path / "x.pth", official_dinov2("pretrained.") | official_neck("depth_head."))
    convert("dinov2_dpt_s", source, tmp_path / "destination", neck_changes())
    loaded, _, categories = load_weights(tmp_path / "destination" / "model.safetensors")
    assert categories == ()
    spec = {
        "name": "student_tiny", "encoder": {**ENCODER, "position_offset": 0.1},
        "decoder": {"features": 8, "out_channels": (6, 8, 10, 12)}, "encoder_layers": (0, 1, 2, 3),
    }  # fmt: skip
    student = build_segmenter(spec, "ab", (16, 24)).abstract()
    merged = named_leaves(merge_weights(student, loaded, ("encoder", "decoder"), "x"))
    for name, array in named_leaves(loaded).items():
        np.testing.assert_array_equal(merged[name], array)
    assert set(named_leaves(student)) - set(named_leaves(loaded)) == {
        name for name in merged if name.startswith("mask_decoder/")
    }


def test_converting_again_changes_nothing(tmp_path):
    source = save_torch(tmp_path / "x.pth", official_dinov2())
    convert("dinov2_s", source, tmp_path / "a", encoder_changes())
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    convert("dinov2_s", source, tmp_path / "a", encoder_changes())
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert before.keys() == {"model.safetensors", "config.json", "classes.json"}


def published_size(name: str) -> dict[str, torch.Tensor]:
    """A release in full size that takes no memory; one official key for each parameter of ours."""
    config = MODELS[name]().encoder
    dim = config.embed_dim
    keys = official_dinov2(depth=config.depth, dim=24)
    scale = lambda n: {24: dim, 72: 3 * dim, 96: 4 * dim, 26: 1370, 4: 14}.get(n, n)
    return {key: torch.zeros(1).expand([scale(side) for side in tensor.shape]) for key, tensor in keys.items()}


@pytest.mark.parametrize(("asked", "given"), [("dinov2_s", "dinov2_b"), ("dinov2_b", "dinov2_s")])
def test_a_wrong_variant_is_recognised(tmp_path, monkeypatch, asked, given):
    from cast_jax.convert import command
    from cast_jax.convert.sources import Checkpoint

    shapes = {key: tuple(value.shape) for key, value in published_size(given).items()}
    checkpoint = Checkpoint(tmp_path / "x.pth", shapes, dict.fromkeys(shapes, "F32"), lambda key: None, {})
    monkeypatch.setattr(command, "open_checkpoint", lambda path: checkpoint)
    with pytest.raises(UserError, match=f"by its shapes this is a {given}; you asked for {asked}"):
        convert(asked, tmp_path / "x.pth", tmp_path / "destination")
    assert not (tmp_path / "destination").exists()


@pytest.mark.parametrize("name", ["dinov2_s", "dinov2_b", "dinov2_l"])
def test_published_sizes_fit(name):
    shapes = {key: tuple(value.shape) for key, value in published_size(name).items()}
    placement = place(shapes, RULES)
    assert placement.unmatched == []
    assert {target: placement.shape(target, shapes) for target in placement.origins} == parameter_shapes(MODELS[name]())


def test_hugging_face_configurations_are_held_against_the_model(tmp_path):
    dinov2().save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"config\.json: another model .*: num_attention_heads is 2, not 3"):
        convert("dinov2_s", tmp_path / "source", tmp_path / "destination", encoder_changes(num_heads=3))
    depth_anything().save_pretrained(tmp_path / "depth")
    changes = neck_changes() | {"encoder_layers": [0, 1, 2, 2]}
    with pytest.raises(UserError, match=r"out_indices is \[1, 2, 3, 4\], not \[1, 2, 3, 3\]"):
        convert("dinov2_dpt_s", tmp_path / "depth", tmp_path / "destination", changes)
    assert not (tmp_path / "destination").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensor: tensor * float("nan"), r"norm\.weight \((torch\.)?\w+\) has values that are not finite"),
        (lambda tensor: tensor.to(torch.int8), r"no floats +norm\.weight +int8; dequantise it first"),
    ],
)
def test_spoilt_values_leave_nothing_behind(tmp_path, spoil, message):
    weights = official_dinov2()
    source = save_torch(tmp_path / "x.pth", weights | {"norm.weight": spoil(weights["norm.weight"])})
    with pytest.raises(UserError, match=message):
        convert("dinov2_s", source, tmp_path / "destination", encoder_changes())
    assert not (tmp_path / "destination").exists()
    convert("dinov2_s", save_torch(tmp_path / "y.pth", weights), tmp_path / "destination", encoder_changes())
    before = (tmp_path / "destination" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=message):
        convert("dinov2_s", source, tmp_path / "destination", encoder_changes())
    assert (tmp_path / "destination" / "model.safetensors").read_bytes() == before


def test_compiled_and_distributed_prefixes(tmp_path):
    weights = {f"_orig_mod.module.{key}": value.contiguous() for key, value in official_dinov2().items()}
    check("dinov2_s", save_torch(tmp_path / "x.pth", weights), tmp_path / "destination", encoder_changes())
    save_file(weights, tmp_path / "x.safetensors")
    convert("dinov2_s", tmp_path / "x.safetensors", tmp_path / "again", encoder_changes())
    files = [tmp_path / name / "model.safetensors" for name in ("destination", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_bad_destinations(tmp_path):
    dinov2().save_pretrained(tmp_path / "source")
    before = (tmp_path / "source" / "model.safetensors").read_bytes()
    for source in (tmp_path / "source", tmp_path / "source" / "model.safetensors"):
        with pytest.raises(UserError, match="the destination holds the source"):
            convert("dinov2_s", source, tmp_path / "source", encoder_changes())
    assert (tmp_path / "source" / "model.safetensors").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the destination is a file"):
        convert("dinov2_s", tmp_path / "source", tmp_path / "file", encoder_changes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dinov3_s", "x.pth"], "model 'dinov3_s' is unknown; known: dinov2_s"),
        (["dinov2_s", "nowhere.pth"], "nowhere.pth: no such file"),
        (["dinov2_s", "x.pth", "--config=encoder.dpeth=3"], "--config encoder: unknown key dpeth"),
        (["dinov2_s", "x.pth", "--config=depth"], "--config depth: must be like encoder.depth=3"),
        (["dinov2_s", "other.pth"], "these weights do not make a dinov2_s"),
        (["dinov2_s", "x.pth", "--config=encoder=3"], "--config encoder=3: give its fields"),
        (["dinov2_s", "x.pth", "--config=decoder.features=8"], "dinov2_s has no decoder"),
        (["dinov2_dpt_s", "x.pth", "--config=encoder_layers=[9,10,11,12]"], "encoder_layers is"),
        (["dinov2_dpt_s", "x.pth", "--config=encoder_layers=[3,2,1,0]"], "must be four maps, shallow to deep"),
    ],
)
def test_the_command_ends_with_a_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_torch(tmp_path / "x.pth", official_dinov2())
    save_torch(tmp_path / "other.pth", {"conv1.weight": torch.zeros(2, 3, 7, 7)})
    with pytest.raises(SystemExit) as caught:
        main([*arguments[:2], "destination", *arguments[2:]])
    assert str(caught.value.code).startswith("error: ")
    assert message in str(caught.value.code)
    assert not (tmp_path / "destination").exists()


def test_verification_can_fail(tmp_path, monkeypatch, capsys):
    """A wrong layout of the right shape: a square matrix that is not transposed."""
    from cast_jax.convert import engine

    source = save_torch(tmp_path / "x.pth", official_dinov2())
    arguments = ["dinov2_s", str(source), str(tmp_path / "destination"), "--verify", *as_flags(encoder_changes())]
    main(arguments)
    assert "FAILED" not in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in tmp_path.glob("destination/*")}
    monkeypatch.setitem(engine.LAYOUTS, "linear", lambda weight: weight if len(set(weight.shape)) == 1 else weight.T)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert str(caught.value.code).startswith("error: beyond the tolerance, nothing written: encoder/blocks/0")
    assert "FAILED" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("destination/*")}
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth", "destination"}


def test_a_description_that_is_not_of_the_weights_is_named(tmp_path):
    """Nothing that Hugging Face's loader then raises comes through."""
    source = tmp_path / "source"
    dinov2().save_pretrained(source)
    described = json.loads((source / "config.json").read_text())
    for change in ({"hidden_size": 48}, {"num_hidden_layers": 5}, {"num_attention_heads": "2"}):
        (source / "config.json").write_text(json.dumps(described | change))
        with pytest.raises(SystemExit, match=r"config\.json"):
            main(["dinov2_s", str(source), str(tmp_path / "out"), "--verify", *as_flags(encoder_changes())])
    assert not (tmp_path / "out").exists()
    (source / "config.json").write_text(json.dumps(described | {"num_attention_heads": 3}))
    with pytest.raises(UserError, match="num_attention_heads is 3, not 2"):  # the only file of the folder, by its name
        convert("dinov2_s", source / "model.safetensors", tmp_path / "out", encoder_changes())


def test_another_model_is_named(tmp_path):
    """By what its own config.json says, and by the rules of the model that it is."""
    import transformers

    sizes = {"embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]}
    transformers.ResNetModel(transformers.ResNetConfig(**sizes)).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="by its shapes this is a resnet50; you asked for dinov2_s") as caught:
        convert("dinov2_s", tmp_path / "source", tmp_path / "destination")
    assert "its config.json says model_type 'resnet'" in str(caught.value)


def test_only_what_was_converted_is_described():
    with pytest.raises(UserError, match="model None is unknown"):
        described_config({"model": {"name": "student_tiny"}})


def test_changes_are_parsed():
    assert parse_changes(["encoder.depth=3", "encoder.ffn=swiglu", "encoder_layers=[0, 1]"]) == {
        "encoder": {"depth": 3, "ffn": "swiglu"},
        "encoder_layers": [0, 1],
    }
    assert DinoV2Config(**ENCODER).depth == 4


def test_the_script(tmp_path):
    """As a user runs it: a Hugging Face folder in half precision, verified."""
    dinov2().half().save_pretrained(tmp_path / "source")
    arguments = ["dinov2_s", tmp_path / "source", tmp_path / "destination", "--verify", *as_flags(encoder_changes())]
    result = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "converted to float32 from F16" in result.stdout
    assert "encoder/blocks/3" in result.stdout
    assert json.loads((tmp_path / "destination" / "classes.json").read_text()) == []
    failed = subprocess.run([sys.executable, SCRIPT, *arguments[:3]], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
