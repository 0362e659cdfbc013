"""A system that CAST is compared with, end to end on generated data: Guided Distillation has all that is not CAST's."""

from __future__ import annotations

import json

from cast_jax import pipeline
from configs import coco


def test_guided_distillation(tmp_path):
    """A teacher of the student's kind, its labels for the burn-in, then those of the student's own average."""
    config = coco.get_config("cast,smoke,system=guided_distillation").to_dict()
    config["steps"]["distill"]["online_labels"] = {"class_threshold": 0.0, "min_area": 1}  # a student of a few updates
    summary = pipeline.run(config, tmp_path)
    assert list(summary["steps"]) == ["finetune", "burn_in", "distill"]
    lines = [json.loads(line) for line in (tmp_path / "distill" / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss/pseudo_label" in line]
    assert len(updates) == 2
    for line in updates:
        assert line["loss/pseudo_label_mask"] > 0
        assert line["pseudo_labels/per_image"] > 0
        assert "contrastive/loss" not in line
    assert json.loads((tmp_path / "burn_in" / "pseudo_labels.json").read_text())["pseudo_labels"] == "finetuned"
    assert not (tmp_path / "distill" / "pseudo_labels.json").exists()
    report = (tmp_path / "report.html").read_text()
    assert f"<b>{summary['steps']['distill']['mask_ap']:.1f}</b><span>mask AP (%), distill</span>" in report
    assert (tmp_path / "evaluation" / "results.json").read_bytes() == (
        tmp_path / "distill" / "evaluation" / "results.json"
    ).read_bytes()
