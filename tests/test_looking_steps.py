"""The steps that look at a run: ``:evaluate`` on Cityscapes data, and ``:audit``; with weights that nobody trained."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import drawn

from cast_jax import pipeline, provenance
from cast_jax.core.annotations import Detections, encode_mask
from cast_jax.core.errors import UserError
from cast_jax.core.files import write_json
from cast_jax.data.pseudo_labels import PseudoLabelWriter
from cast_jax.data.review import export_labels, import_labels
from cast_jax.evaluation import cityscapes
from cast_jax.export import save_weights
from cast_jax.pipeline import Pipeline
from configs import cityscapes as configuration


def config(step: str, **data) -> dict:
    values = configuration.get_config(f"{step},smoke").to_dict()
    values["data"].update(data)
    values["evaluate"]["overlays"] = 0
    return values


def leave_weights(workdir: Path, step: str) -> None:
    """What a finished step leaves: random weights of its model."""
    made = Pipeline(config(step), workdir)
    segmenter = made.config.segmenter("student", made.categories)
    model = {"model": made.config.model["student"], "image_size": list(made.config.data.image_size)}
    save_weights(workdir / step / "exported" / "last.safetensors", drawn(segmenter.abstract()), model, made.categories)
    metrics = {"loss/total": 1.0}
    done = {"step": 3, "metrics": metrics, "seconds": 1.0, "images": 6, "images_per_second": 6.0}
    write_json(workdir / step / "done.json", done)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    leave_weights(folder, "refine")
    leave_weights(folder, "audit")
    return folder


@pytest.fixture(scope="module")
def audited(workdir) -> Path:
    """The same, after an audit."""
    pipeline.run(config("audit"), workdir)
    return workdir


def test_evaluate_leaves_the_official_ap(workdir, monkeypatch):
    seen = []

    def perfect(self, params, source, indices=None, label=""):
        seen.append(label)
        yield from ((index, truth_as_detections(source.instances(index))) for index in range(len(source)))

    monkeypatch.setattr("cast_jax.predict.Predictor.__call__", perfect)
    pipeline.run(config("evaluate"), workdir)
    assert seen == ["evaluating"]
    results = json.loads((workdir / "refine" / "evaluation" / "cityscapes.json").read_text())
    assert (results["ap"], results["ap50"]) == pytest.approx((100, 100))
    assert results == json.loads((workdir / "evaluation" / "cityscapes.json").read_text())
    exported = workdir / "refine" / "cityscapes_predictions"
    assert len(list(exported.glob("*_pred.txt"))) == 4
    with open(workdir / "refine" / "evaluation" / "per_class_ap.csv") as file:
        instances = {row["class"]: int(row["instances"]) for row in csv.DictReader(file)}
    for name, scores in results["per_class"].items():
        if not instances[name]:
            assert scores["ap"] is None

    # Without the scorer, predictions are there for it all the same, and old ones are gone.
    (exported / "old_pred.txt").write_text("")
    monkeypatch.setattr(cityscapes, "official_scorer_installed", lambda: False)
    pipeline.run(config("evaluate"), workdir)
    assert len(list(exported.glob("*_pred.txt"))) == 4


def truth_as_detections(truth):
    ones = np.ones(len(truth), np.float32)
    return Detections(truth.labels, ones, ones, [encode_mask(mask) for mask in truth.masks])


def test_a_step_records_its_pseudo_labels_and_goes_on_with_no_others(workdir, tmp_path, caplog):
    made = Pipeline(config("adapt"), tmp_path)
    folder, pool = tmp_path / "pseudo_labels" / "finetuned", made.datasets.unlabelled
    writer = PseudoLabelWriter(folder, pool, made.categories, "abc", threshold=0.0)
    truth = made.datasets.labelled.instances(0)
    writer.write_shard(0, [truth_as_detections(truth) for _ in range(len(pool))])
    writer.finish()
    before = len(made._unlabelled("adapt").instances(0))
    provenance.record(tmp_path / "adapt", made._made_from("adapt"))
    recorded = json.loads((tmp_path / "adapt" / "pseudo_labels.json").read_text())
    assert (recorded["pseudo_labels"], recorded["model_hash"], recorded["reviewed"]) == ("finetuned", "abc", "")
    provenance.record(tmp_path / "adapt", made._made_from("adapt"))  # going on with the same ones
    content = export_labels(folder)
    content["annotations"] = content["annotations"][1:]
    write_json(tmp_path / "labels.json", content)
    import_labels(folder, tmp_path / "labels.json")
    (tmp_path / "adapt" / "exported").mkdir()
    (tmp_path / "adapt" / "exported" / "last.safetensors").touch()
    write_json(tmp_path / "adapt" / "done.json", {"step": 1})
    made.train("adapt")
    assert "adapt was made from other pseudo-labels than" in caplog.text
    (tmp_path / "adapt" / "done.json").unlink()
    (tmp_path / "adapt" / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"(?s)began with other pseudo-labels; delete it.*labels\.reviewed: '' -> '"):
        made.train("adapt")
    shutil.rmtree(tmp_path / "adapt")
    provenance.record(tmp_path / "adapt", made._made_from("adapt"))
    assert len(made._unlabelled("adapt").instances(0)) == before - 1
    assert len(json.loads((tmp_path / "adapt" / "pseudo_labels.json").read_text())["reviewed"]) == 16


def test_an_audit_of_an_untrained_teacher(audited):
    workdir, folder = audited, audited / "audit"
    report = json.loads((folder / "audit.json").read_text())
    assert "Audit: pseudo-labels against hidden labels" in (workdir / "report.html").read_text()
    assert report["images"] == len(report["hidden_images"]) == 1
    labelled = (workdir / "splits" / "labelled.txt").read_text().split()
    assert set(report["hidden_images"]) < set(labelled)
    assert report["by_score"][0]["from"] == 0.0
    assert sum(row["detections"] for row in report["by_score"]) == report["detections"] > 0
    assert report["precision"] < 0.5
    for name in ("calibration.png", "contact_sheet.jpg"):
        assert min(Image.open(folder / name).size) > 50


def test_the_audited_teacher_never_sees_what_is_hidden(workdir):
    for share, hidden in ((0.01, 1), (0.5, 2), (0.99, 3)):
        values = config("audit")
        values["audit"]["share"] = share
        made = Pipeline(values, workdir)
        kept, audited = made._hidden_share()
        ids = [{part.record(i).image_id for i in range(len(part))} for part in (kept, audited)]
        assert (len(audited), ids[0] & ids[1]) == (hidden, set())
        everything = {made.datasets.labelled.record(i).image_id for i in range(4)}
        assert ids[0] | ids[1] == everything


def test_an_audit_is_of_its_share_and_its_teacher(audited, tmp_path):
    values = config("audit")
    values["audit"]["share"] = 0.5
    with pytest.raises(UserError, match=r"config\.audit\.share: 0\.25 -> 0\.5"):
        pipeline.run(values, audited)
    values = config("audit")
    values["steps"]["finetune"]["optimizer"]["learning_rate"] = 0.5
    with pytest.raises(UserError, match=r"config\.steps\.finetune\.optimizer\.learning_rate"):
        pipeline.run(values, audited)
    with pytest.raises(UserError, match="it needs two labelled images"):
        pipeline.run(config("audit", labelled=1), tmp_path)
    values = config("audit")
    values["audit"]["share"] = 1.0
    with pytest.raises(UserError, match=r"config\.audit\.share is 1\.0; it must lie in \(0, 1\)"):
        pipeline.run(values, tmp_path)
