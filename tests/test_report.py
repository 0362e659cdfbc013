"""The report of a generated workdir: whole, escaped, self-contained; and of workdirs where parts are missing."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cast_jax.core.annotations import Category, Detections, Instances
from cast_jax.core.files import write_json
from cast_jax.evaluation.coco_map import MaskAPEvaluator
from cast_jax.report import summary_table, write_report

NASTY = '<script>alert("car")</script>'
SUMMARY = {
    "finetune": {"mask_ap": 28.71, "mask_ap50": 52.1, "images_per_second": 3.214, "seconds": 812.4},
    "pseudo_label": {"seconds": 301},
    "distill": {"mask_ap": 32.2, "mask_ap50": None, "images_per_second": 11.7, "seconds": 40213.2},
    "student_supervised": {"mask_ap": 21.1, "mask_ap50": 40.0, "images_per_second": 12.0, "seconds": 100.0},
}
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects text and every tag with its attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data.strip())

    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def decoded(attributes):
    kind, data = attributes["src"].split(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "street & <i>scenes"
    write_json(workdir / "summary.json", {"steps": SUMMARY, "seed": 17, "environment": {"packages": {}}})
    write_json(workdir / "config.json", {"model": {"name": "student_s", "classes": [NASTY]}, "seed": 17})
    write_json(workdir / "environment.json", {"packages": {"jax": "0.10.1"}})
    lines = [
        {"step": 10 * i, "loss/total": 8.0 / (i + 1), "loss/mask": 1.0, "contrastive/margin": 0.1 * i, "lr": 1e-4}
        for i in range(1, 40)
    ]
    lines[5]["contrastive/false_negative_rate"] = 0.03
    lines.append({"step": 390, "eval/mask_ap": 32.2, "eval/mask_ap50": None, "loss/total": float("nan")})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for step in ("distill", "adapt"):
        (workdir / step / "overlays").mkdir(parents=True)
        # The last line is cut in half, as a kill leaves it.
        (workdir / step / "metrics.jsonl").write_text(text + '{"step": 400, "lo')
    for k in range(12):
        Image.new("RGB", (3000, 100), (10 * k, 0, 0)).save(workdir / "distill" / "overlays" / f"image_{k}.jpg")
    pseudo_labels = workdir / "pseudo_labels" / "adapted"
    stats = {
        "images": 2677,
        "instances": 40211,
        "per_class": {NASTY: 900, "bus": 0},
        "score_histogram": {"edges": [0.3, 0.5, 1.0], "counts": [111, 222]},
    }
    write_json(pseudo_labels / "stats.json", stats)
    bins = [{"from": 0.3, "to": 0.5, "detections": 8, "precision": 0.375, "recall": 0.1, "mean_iou": None}]
    whole = {"detections": 8, "precision": 0.875, "recall": 0.125, "mean_iou": 0.75}
    write_json(workdir / "audit" / "audit.json", {**whole, "by_score": bins})
    Image.new("RGB", (30, 20)).save(workdir / "audit" / "calibration.png")
    Image.new("RGB", (30, 20)).save(pseudo_labels / "contact_sheet.jpg")
    evaluator = MaskAPEvaluator([Category(1, NASTY)])
    nothing = Detections(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32), [])
    evaluator.add(1, (4, 4), Instances.empty(4, 4), nothing)
    evaluator.write(workdir / "evaluation")
    return workdir


@pytest.fixture(scope="module")
def html(workdir):
    path = write_report(workdir)
    assert path == workdir / "report.html"
    return path.read_text(encoding="utf-8")


def test_page_has_the_numbers(html):
    text = Page(html).text
    for expected in (
        "28.7",
        "52.1",
        "3.21",
        "13 min 32 s",
        "11 h 10 min",
        "2,677",
        "40,211",
        "900",
        "222",
        "0.30 - 0.50",
    ):
        assert expected in text, expected
    for expected in ("0.375", "0.875", "model.name", "student_s", "packages.jax", "0.10.1", "n/a"):
        assert expected in text, expected
    # The headline is the method's last step that was evaluated, beside the baseline.
    assert text[text.index("mask AP (%), distill") - 1] == "32.2"
    assert text[text.index("mask AP (%), labels only") - 1] == "21.1"
    assert text.count("distill") == 2  # its row and its curves
    assert "environment" not in text


def test_page_is_escaped(html):
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert NASTY in page.text
    assert "street & <i>scenes" in page.text
    assert "<i>scenes" not in html


def test_page_loads_nothing(html):
    assert not re.search(r"https?://", html)
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "link", "iframe")
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")


def test_images_are_whole_described_and_shrunk(html):
    images = Page(html).images()
    assert all(attributes["alt"] for attributes in images)
    sizes = {attributes["alt"]: decoded(attributes).size for attributes in images}
    # Of twelve overlays the last eight, in numeric order, at most 1600 wide.
    assert [alt for alt in sizes if alt.startswith("image_")] == [f"image_{k}" for k in range(4, 12)]
    assert sizes["image_11"] == (1600, 53)
    charts = [alt for alt in sizes if alt.endswith("of distill over training steps")]
    titles = ["Losses", "Mask AP (%)", "False-negative rate", "Margin between instances", "Learning rate"]
    assert charts == [f"{title} of distill over training steps" for title in titles]
    assert "Precision against recall" in sizes
    assert any("Contact sheet" in alt for alt in sizes)
    assert sizes["Audit of pseudo-labels"] == (30, 20)


def test_charts_are_transparent_and_not_blank(html):
    chart = next(image for image in Page(html).images() if image["alt"].startswith("Losses"))
    alpha = np.asarray(decoded(chart))[..., 3]
    assert 0.5 < (alpha == 0).mean() < 0.99


def test_steps_stand_in_the_order_of_training(html):
    assert html.index("of adapt over") < html.index("of distill over")


@pytest.mark.parametrize("kept", [[], ["summary.json"], ["distill/overlays/a.jpg"], ["pseudo_labels/x/stats.json"]])
def test_missing_parts_are_absent(tmp_path, kept):
    for name in kept:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            Image.new("RGB", (8, 8)).save(path)
        else:
            write_json(path, {"steps": {"distill": {"mask_ap": 1.5}}} if name == "summary.json" else {"images": 3})
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    headings = {
        "summary.json": "Steps",
        "distill/overlays/a.jpg": "distill",
        "pseudo_labels/x/stats.json": "Pseudo-labels: x",
    }
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h2") == len(kept)
    assert all(headings[name] in page.text for name in kept)


def test_a_second_report_replaces_the_first(tmp_path):
    write_report(tmp_path)
    write_json(tmp_path / "summary.json", {"steps": {"refine": {"mask_ap": 41.5, "seconds": 3}}})
    assert "41.5" in write_report(tmp_path).read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "summary.json"]


def test_a_teacher_is_not_held_against_a_student(tmp_path):
    rows = {"finetune": {"mask_ap": 28.7}, "student_supervised": {"mask_ap": 21.1}}
    write_json(tmp_path / "summary.json", {"steps": rows})
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert text[text.index("mask AP (%), student_supervised") - 1] == "21.1"
    assert "mask AP (%), labels only" not in text


def test_summary_table_is_aligned():
    assert summary_table(SUMMARY) == "\n".join(
        [
            "step                mask AP  AP50  images/s  seconds",
            "----------------------------------------------------",
            "finetune               28.7  52.1      3.21      812",
            "pseudo_label              -     -         -      301",
            "distill                32.2     -     11.70   40,213",
            "student_supervised     21.1  40.0     12.00      100",
        ]
    )
