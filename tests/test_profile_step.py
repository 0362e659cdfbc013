"""The script that profiles a step, on a segmenter that compiles in a moment."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver
from tiny import Linear

from cast_jax.core import target
from cast_jax.core.errors import UserError
from cast_jax.core.runtime import as_size
from cast_jax.models.functional import Functional
from cast_jax.pipeline import Pipeline
from cast_jax.settings import RunConfig
from configs import coco, demo

SCRIPT = Path(__file__).parents[1] / "scripts" / "profile_step.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("profile_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(RunConfig, "segmenter", lambda *_: Functional(lambda rngs: Linear(rngs, classes=8)))
    config = coco.get_config("student_supervised,smoke").to_dict()
    config["data"]["generated"]["train"] = 0
    return config


def run(script, config, folder: Path, *options: str) -> dict:
    flags.FLAGS(["profile_step", f"--json={folder / 'figures.json'}", "--noabstract", *options])
    script.profile(config, folder, folder / "trace")
    return json.loads((folder / "figures.json").read_text())


def test_a_step_is_compiled_timed_and_traced(script, config, tmp_path, capsys):
    figures = run(script, config, tmp_path, "--steps=2", "--peak=0.5", f"--hlo={tmp_path / 'step.txt'}")
    shown = capsys.readouterr().out
    programs = re.findall(r"^HloModule (\w+)", (tmp_path / "step.txt").read_text(), re.MULTILINE)
    assert programs == ["jit__differentiate", "jit__optimize"]
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert figures["devices"] == 1
    assert figures["seconds"] > 0
    assert figures["mfu"] == pytest.approx(figures["flops"] / figures["seconds"] / 0.5e12)
    assert figures["images_per_second"] == pytest.approx(2 / figures["seconds"])
    assert {"criterion", "matching", "optimizer"} <= set(figures["seconds_by_part"])
    assert all(row in shown for row in ("devices     1 x cpu", "| optimizer |", "8 updates take 0:00:00"))
    assert "% of the peak (MFU)" in shown
    assert figures["seconds_at_peak"] == {"operations": pytest.approx(figures["flops"] / 0.5e12), "traffic": None}
    assert sum(figures["traffic"].values()) > figures["memory"]["arguments"]
    assert f"moved       {as_size(sum(figures['traffic'].values()))} read and written (a device)" in shown


def test_abstract_says_what_running_would_without_running(script, config, tmp_path, capsys):
    figures = run(script, config, tmp_path, "--abstract")
    assert "seconds" not in figures
    assert figures["flops"] > 0
    assert figures["memory"]["arguments"] > 2 * 64 * 128 * 3  # at least the two images
    assert "| matching |" in capsys.readouterr().out
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("flag", ["hlo", "json", "trace"])
def test_where_nothing_can_be_written_is_said_before_compiling(script, config, tmp_path, flag):
    (tmp_path / "file").touch()
    flags.FLAGS(["profile_step", "--json=", "--hlo=", "--noabstract"])
    place = tmp_path / "file" / "x"
    if flag != "trace":
        flags.FLAGS(["profile_step", f"--{flag}={place}"])
    with pytest.raises(UserError, match=rf"--{flag} {place} cannot be written to \(.+\); name another"):
        script.profile(config | {"step": ""}, tmp_path, place if flag == "trace" else tmp_path / "trace")


def test_nothing_is_traced_that_does_not_run(script, config, tmp_path):
    with (
        flagsaver.flagsaver(trace=str(tmp_path / "trace"), abstract=True),
        pytest.raises(UserError, match="--trace needs an update that runs: leave out --abstract"),
    ):
        script.profile(config, tmp_path, tmp_path / "trace")


def test_a_step_is_compiled_for_one_kind_of_absent_devices(script, monkeypatch):
    flags.FLAGS(["profile_step"])
    for kind, flag in (("gpus", {"gpu": "l4"}), ("tpu_slice", {"tpu": "v5e:2x2"})):
        monkeypatch.setattr(target, kind, lambda name: name)
        with flagsaver.flagsaver(**flag):
            assert [script.machine()] == list(flag.values())
    with flagsaver.flagsaver(gpu="l4", tpu="v5e:2x2"), pytest.raises(UserError, match="--gpu and --tpu: name one"):
        script.machine()


def test_only_trained_steps_have_a_profile(script, config, tmp_path):
    config["step"] = "cast"
    with pytest.raises(UserError, match=r"config\.step is 'cast'; name a step that is trained: adapt, distill, "):
        run(script, config, tmp_path)


def test_labels_made_during_training_need_no_stored_ones(script, tmp_path):
    """The pool as it is, not labelled images in its place."""
    pipeline = Pipeline(demo.get_config("distill,smoke,system=pais").to_dict(), tmp_path)
    batch, _ = script.first_batch(pipeline, "distill")
    assert batch["labelled"]["strong"]["instance_valid"].any()
    assert not batch["unlabelled"]["strong"]["instance_valid"].any()
