"""All of CAST with the fused teacher, from random weights and without a vocabulary: a smoke run."""

from __future__ import annotations

import json

import pytest

from cast_jax import pipeline
from configs import ade20k, cityscapes, coco, demo, nuclei


@pytest.mark.full  # minutes: two programs of two networks are compiled, and those of the student
def test_the_whole_pipeline(tmp_path):
    config = cityscapes.get_config("cast,smoke,teacher=grounded_sam2_tiny").to_dict()
    config["model"]["teacher"] |= {
        "detector": {"encoder_layers": 1, "decoder_layers": 1, "num_queries": 24},
        "num_queries": 16,
    }
    summary = pipeline.run(config, tmp_path)
    assert list(summary["steps"]) == ["finetune", "adapt", "distill", "refine", "student_supervised"]
    logged = json.loads((tmp_path / "adapt/metrics.jsonl").read_text().splitlines()[0])
    assert {"loss/supervised_giou", "loss/pseudo_label_iou", "contrastive/false_negative_rate"} <= set(logged)
    assert logged["contrastive/loss"] > 0
    for which in ("finetuned", "adapted"):
        lines = (tmp_path / "pseudo_labels" / which / "shard-00000.jsonl").read_text().splitlines()
        for instance in (instance for line in lines for instance in json.loads(line)["instances"]):
            assert 0 <= instance["score"] <= instance["mask_quality"] <= 1  # the IoU that SAM 2 expects


@pytest.mark.parametrize("file", [ade20k, cityscapes, coco, demo, nuclei])
def test_every_configuration_takes_it(file):
    for smoke in ("", ",smoke"):
        config = file.get_config(f"cast{smoke},teacher=grounded_sam2_tiny")
        assert config.model.teacher.name == "grounded_sam2_tiny"
        assert config.steps.adapt.optimizer.learning_rate_rules == ((".*", 1.0),)
    large = file.get_config("cast,teacher=grounded_sam2_l")
    assert large.model.teacher.tokenizer == "bert-base-uncased"
    assert large.init.teacher.to_dict() == {"detector": "", "segmenter": ""}
    assert len(large.steps.adapt.optimizer.learning_rate_rules) == 3
    with pytest.raises(ValueError, match="leave teacher=grounded_sam2_l out, or use grounded_sam2_tiny"):
        file.get_config("cast,smoke,teacher=grounded_sam2_l")
