"""All of CAST end to end, on generated data in COCO format: the smoke run of `configs/coco.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cast_jax import pipeline
from cast_jax.core.errors import MissingStepError, UserError
from cast_jax.core.logging import setup_logging
from cast_jax.preflight import TEACHERS
from cast_jax.provenance import KINDS
from configs import coco

STEPS = ["finetune", "adapt", "distill", "refine", "student_supervised"]


def config(step: str = "cast", **changes):
    values = coco.get_config(f"{step},smoke").to_dict()
    return {**values, **changes}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    setup_logging(workdir / "log.txt")
    pipeline.run(config(), workdir)
    return workdir


def test_every_step_is_in_the_summary(run):
    steps = json.loads((run / "summary.json").read_text())["steps"]
    assert list(steps) == STEPS
    for row in steps.values():
        assert set(row) == {"mask_ap", "mask_ap50", "images_per_second", "seconds"}
        assert 0 <= row["mask_ap"] <= row["mask_ap50"] <= 100
        assert row["images_per_second"] > 0
    assert "student_supervised" in (run / "log.txt").read_text().split("mask AP")[-1]
    report = (run / "report.html").read_text()
    for step, row in steps.items():
        assert f"<td>{step}</td><td>{row['mask_ap']:.1f}</td>" in report
    assert f"<b>{steps['refine']['mask_ap']:.1f}</b><span>mask AP (%), refine</span>" in report


def test_a_step_that_the_pipeline_leaves_out_is_in_the_summary_too(run, tmp_path):
    settings = config()
    settings["pipeline"] = ("finetune",)
    for name in ("student_supervised", "refine"):
        (tmp_path / name).mkdir()
        shutil.copy(run / name / "done.json", tmp_path / name)
    assert list(pipeline.Pipeline(settings, tmp_path).summarise()["steps"]) == ["student_supervised", "refine"]


def test_the_workdir_is_what_the_readme_says(run):
    files = [
        "config.json",
        "classes.json",
        "environment.json",
        "log.txt",
        "report.html",
        "evaluation/coco_results.json",
    ]
    files += ["splits/labelled.txt", "splits/unlabelled.txt", "splits/val.txt", "evaluation/per_class_ap.csv"]
    for which in ("finetuned", "adapted"):
        files += [f"pseudo_labels/{which}/{name}" for name in ("shard-00000.jsonl", "stats.json", "contact_sheet.jpg")]
    for step in STEPS:
        files += [f"{step}/exported/{name}" for name in ("last.safetensors", "config.json", "classes.json")]
        files += [f"{step}/metrics.jsonl", f"{step}/evaluation/pr_curve.png"]
        assert list((run / step / "overlays").glob("*.jpg"))
        assert list((run / step).glob("events.out.tfevents.*"))
    assert [name for name in files if not (run / name).is_file()] == []


def test_steps_write_down_what_they_were_made_from(run):
    kinds = {step: {kind for kind in KINDS if (run / step / f"{kind}.json").is_file()} for step in STEPS}
    assert kinds["distill"] >= {"pseudo_labels", "images"}
    assert kinds["adapt"] >= {"pseudo_labels", "images"}
    assert kinds["refine"] == {"weights", "images"}
    stores = [json.loads((run / "pseudo_labels" / which / "manifest.json").read_text()) for which in TEACHERS]
    assert len({store["pixels_hash"] for store in stores}) == 1
    assert all(len(store["pixels_hash"]) == 16 for store in stores)


def test_original_ids_come_back_everywhere(run):
    ids = {entry["id"] for entry in json.loads((run / "classes.json").read_text())}
    assert ids == {24, 25, 26, 27, 28, 31, 32, 33}  # sparse, so not the positions
    results = json.loads((run / "distill/evaluation/coco_results.json").read_text())
    assert {result["category_id"] for result in results} <= ids
    assert {result["image_id"] for result in results} <= {1, 2, 3, 4}
    shard = (run / "pseudo_labels/adapted/shard-00000.jsonl").read_text().splitlines()
    found = [instance for line in shard for instance in json.loads(line)["instances"]]
    assert found
    assert {instance["category_id"] for instance in found} <= ids
    assert json.loads((run / "refine/exported/classes.json").read_text()) == json.loads(
        (run / "classes.json").read_text()
    )


def test_the_semi_supervised_steps_log_what_the_method_watches(run):
    for step in ("adapt", "distill"):
        logged = json.loads((run / step / "metrics.jsonl").read_text().splitlines()[0])
        assert {
            "loss/supervised",
            "loss/pseudo_label",
            "contrastive/loss",
            "contrastive/false_negative_rate",
            "contrastive/margin",
            "pseudo_labels/per_image",
            "pseudo_labels/per_image/car",
            "data/instances_cut_labelled",
            "optimizer/learning_rate",
            "speed/images_per_second",
            "speed/waiting_for_data",
        } <= set(logged)


def test_how_models_are_looked_at_does_not_change_the_pseudo_labels(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    shard = workdir / "pseudo_labels" / "adapted" / "shard-00000.jsonl"
    before = shard.read_bytes()
    assert before.count(b"category_id") > before.count(b"\n")  # more than one an image
    shutil.rmtree(shard.parent)
    looked = {**config()["evaluate"], "min_score": 0.9, "max_detections": 1}
    pipeline.run(config("pseudo_label", evaluate=looked), workdir)
    assert shard.read_bytes() == before


def test_running_again_does_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    before |= {path: path.stat().st_mtime_ns for path in run.rglob("shard-*.jsonl")}
    pipeline.run(config(), run)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_evaluate_repeats_the_result_of_the_last_step(run):
    before = json.loads((run / "refine/evaluation/results.json").read_text())
    pipeline.run(config("evaluate"), run)
    assert json.loads((run / "refine/evaluation/results.json").read_text()) == before


def test_another_configuration_is_refused_with_the_difference(run):
    with pytest.raises(UserError, match=r"config\.seed: 0 -> 7"):
        pipeline.run(config(seed=7), run)


@pytest.mark.parametrize(
    ("step", "needed"),
    [("pseudo_label", "finetune"), ("distill", "adapt"), ("refine", "distill"), ("evaluate", "finetune")],
)
def test_a_missing_step_is_named_with_its_command(step, needed, tmp_path):
    setup_logging()
    with pytest.raises(MissingStepError, match=rf"configs/coco\.py:{needed} "):
        pipeline.run(config(step), tmp_path)


def test_only_steps_that_read_unlabelled_images_need_some(run, tmp_path, monkeypatch):
    paths = {"labelled": str(run / "data" / "coco" / "labelled.json"), "val": str(run / "data" / "coco" / "val.json")}
    with pytest.raises(
        UserError, match=r"config\.data\.unlabelled is not set, whose images step 'pseudo_label/finetuned' reads"
    ):
        pipeline.run(with_paths("cast", paths), tmp_path / "cast")
    ran = []
    monkeypatch.setattr(pipeline.Pipeline, "run_step", lambda self, name: ran.append(name))
    for step in ("finetune", "student_supervised"):
        pipeline.run(with_paths(step, paths), tmp_path / step)
    assert ran == ["finetune", "student_supervised"]


def with_paths(step: str, paths: dict[str, str]):
    values = config(step)
    values["data"].update(paths)
    return values


def test_missing_paths_are_named_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.labelled is not set"):
        pipeline.run(coco.get_config("cast").to_dict(), tmp_path)
    assert not (tmp_path / "finetune").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, r"config\.seed is -1"),
        ("step", "nope", r"config\.step 'nope' is unknown; known: cast, "),
        ("pipeline", ("finetune", "nope"), r"config\.pipeline 'nope' is unknown"),
        ("init", {"teacher": "nowhere", "student": ""}, r"config\.init\.teacher: no weights at nowhere"),
    ],
)
def test_faulty_names_are_found_before_the_workdir_is_claimed(key, value, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pipeline.run({**config(), key: value}, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_faulty_settings_are_found_before_all_images_are_read(tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("images were read")

    monkeypatch.setattr(pipeline, "check_sources", read)
    values = config()
    values["steps"]["refine"]["optimizer"]["warmup_steps"] = 1_000
    with pytest.raises(UserError, match="warmup_steps is 1000"):
        pipeline.run(values, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("model", "techer"), ("source", "nope"), ("start", "nope"), ("pseudo_labels", "nope")]
)
def test_a_step_that_names_what_is_not_there_is_refused(key, value, tmp_path):
    values = config()
    values["steps"]["refine"][key] = value
    with pytest.raises(UserError, match=rf"config\.steps\.refine\.{key} '{value}' is unknown; known: "):
        pipeline.run(values, tmp_path)


def test_a_workdir_without_results_takes_a_mended_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.Pipeline, "run_step", lambda self, name: None)
    pipeline.run(config(seed=1), tmp_path)
    pipeline.run(config(seed=2), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2
    (tmp_path / "finetune" / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"config\.seed: 2 -> 3"):
        pipeline.run(config(seed=3), tmp_path)


def test_a_later_step_may_be_corrected_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.Pipeline, "run_step", lambda self, name: None)
    pipeline.run(config(), tmp_path)
    (tmp_path / "finetune" / "checkpoints" / "2").mkdir(parents=True)
    corrected = config()
    corrected["steps"]["distill"]["optimizer"]["learning_rate"] = 0.5
    pipeline.run(corrected, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["steps"]["distill"]["optimizer"]["learning_rate"] == 0.5
    corrected["steps"]["finetune"]["optimizer"]["learning_rate"] = 0.5
    with pytest.raises(UserError, match=r"config\.steps\.finetune\.optimizer\.learning_rate: 0\.002 -> 0\.5"):
        pipeline.run(corrected, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == stored


@pytest.mark.parametrize("text", ['{"seed":', "[1]", "3"])
def test_a_damaged_configuration_of_a_run_is_named(text, tmp_path):
    (tmp_path / "finetune" / "exported" / "x").mkdir(parents=True)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: is not the configuration of a run"):
        pipeline.run(config(), tmp_path)
