"""Whole casts of toy models in two processes: as good as one, and nothing is lost when one of them dies."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
from runs import ROOT, Runs
from safetensors.numpy import load_file, save_file
from test_kill import results

STEPS = ("finetune", "adapt", "distill", "refine", "student_supervised")
COMMAND = ("--config", "configs/coco.py:cast,smoke", "--config.distributed.timeout=120")
COMMAND += tuple(f"--config.steps.{step}.data.batch_labelled=4" for step in STEPS)
COMMAND += tuple(f"--config.steps.{step}.data.batch_unlabelled=4" for step in ("adapt", "distill"))
COMMAND += ("--config.pseudo_labels.shard_size=3", "--config.evaluate.batch_size=4")
COMMAND += ("--config.steps.distill.train.save_every=1",)  # more than are kept


def check_same(folder: Path, name: str, other: str) -> None:
    """The same files; their contents may differ by how devices and processes add numbers up."""
    one, two = results(folder / name), results(folder / other)
    assert one.keys() == two.keys()
    rounded = (".safetensors", ".jsonl", ".json", ".csv", ".png", ".jpg")
    assert [path for path in one if not path.endswith(rounded) and one[path] != two[path]] == []
    for step in STEPS:
        path = f"{step}/exported/last.safetensors"
        weights, others = load_file(folder / name / path), load_file(folder / other / path)
        for key, value in weights.items():
            np.testing.assert_allclose(others[key], value, rtol=1e-5, atol=1e-6, err_msg=f"{step}: {key}")
        lines = [run[f"{step}/metrics.jsonl"] for run in (one, two)]
        losses = [[line["loss/total"] for line in run if "loss/total" in line] for run in lines]
        np.testing.assert_allclose(*losses, rtol=1e-5, err_msg=step)
        scores = [json.loads(run[f"{step}/evaluation/results.json"]) for run in (one, two)]
        assert scores[0] == scores[1]


def test_two_processes_end_as_one_does_whoever_dies_and_whoever_continues(tmp_path):
    two = {"processes": 2, "devices": 2}
    with Runs(tmp_path, *COMMAND) as runs:
        runs("one", devices=4)
        runs("two", **two)
        check_same(tmp_path, "one", "two")
        for kill, victim in ((("shard-", 1, 0.0), 1), (("adapt/checkpoints", 4, 0.0), 0)):
            answer = runs("killed", kill=kill, victim=victim, **two)
            assert answer["codes"][victim] == -signal.SIGKILL
            assert answer["codes"][1 - victim] > 0 or answer["codes"][1 - victim] == -signal.SIGABRT
            assert answer["seconds"] < 60, "the survivor lived on for too long"
            said = runs.log("killed", 1 - victim)
            assert "another task died" in said or "another process is gone" in said
        # One that fails alone, with old checkpoints to be removed, does not wait for the other one's help with that.
        answer = runs("killed", fails=True, full="distill/overlays", **two)
        assert answer["codes"][0] == 1
        assert "No space left on device" in runs.log("killed")
        assert answer["codes"][1] != 0
        assert answer["seconds"] < 60
        runs("killed", devices=4)
        check_same(tmp_path, "one", "killed")


def test_processes_that_would_train_on_different_things_are_refused(tmp_path):
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    two = {"processes": 2, "hosts": tuple(map(str, hosts)), "fails": True}
    own = ("--config.data.labelled=coco/labelled.json", "--config.data.val=coco/val.json")
    own += ("--config.data.unlabelled=coco/unlabelled", "--config.init.teacher=exported/last.safetensors")
    own += ("--config.distributed.timeout=60",)
    with Runs(tmp_path, "--config", f"{ROOT}/configs/coco.py:finetune,smoke") as runs:
        runs("made")
        for host in hosts:
            for part in ("data/coco", "finetune/exported"):
                shutil.copytree(tmp_path / "made" / part, host / Path(part).name)

        def refused(name: str, what: str, *arguments: str, **options) -> None:
            answer = runs(name, *arguments, **two, **options)
            assert answer["codes"] == [1, 1], runs.log(name)
            for number in range(2):
                assert f"{what} must be the same in all processes" in runs.log(name, number)

        refused("steps", "the configuration", *own, others=("--config.step=check_data",))
        weights = hosts[1] / "exported" / "last.safetensors"
        save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
        refused("weights", f"what {tmp_path / 'weights' / 'finetune'} is made from", *own)
        shutil.copy(hosts[0] / "exported" / "last.safetensors", weights)
        labels = hosts[1] / "coco" / "labelled.json"
        content = json.loads(labels.read_text())
        labels.write_text(json.dumps(content | {"annotations": content["annotations"][::2]}))
        refused("labels", "the images, their labels and the classes", *own)
