"""Every kind of bad image and annotation: used as it should be, counted, or refused by name before a run."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cast_jax.core.annotations import Instances
from cast_jax.core.errors import DataError
from cast_jax.data.checks import check_source, check_sources
from cast_jax.data.findings import SeenImages
from cast_jax.data.inspection import inspect
from cast_jax.data.sources.base import (
    ImageHeader,
    image_size,
    leaves_folder,
    orientation,
    read_header,
    read_image,
    read_label_map,
)
from cast_jax.data.sources.coco import Coco
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.data.views import ViewConfig, make_views

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
CONFIG = ViewConfig(image_size=(16, 24), max_instances=4)


def truncated(path: Path) -> None:
    Image.fromarray(NOISE).save(path)
    path.write_bytes(path.read_bytes()[:-700])


def bomb(path: Path) -> None:
    """A PNG of a few hundred bytes that says that it is 30,000 x 30,000 pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE).save(path, exif=exif)


USABLE = {
    "deep.png": lambda path: Image.fromarray(NOISE[..., 0].astype(np.uint16) << 8).save(path),
    "palette.png": lambda path: Image.fromarray(NOISE).quantize(16).save(path),
    "cmyk.jpg": lambda path: Image.fromarray(NOISE).convert("CMYK").save(path),
    "turned.jpg": turned,
    "grey_alpha.png": lambda path: Image.fromarray(NOISE[..., :2], "LA").save(path),
    "one_pixel.png": lambda path: Image.fromarray(NOISE[:1, :1]).save(path),
    "wide.png": lambda path: Image.fromarray(np.resize(NOISE, (3, 30_000, 3))).save(path),
    "high.png": lambda path: Image.fromarray(np.resize(NOISE, (30_000, 2, 3))).save(path),
}
UNUSABLE = {
    "truncated.png": (truncated, "truncated"),
    "truncated.jpg": (truncated, "truncated"),
    "empty.png": (lambda path: path.write_bytes(b""), "cannot identify"),
    "text.jpg": (lambda path: path.write_text("not an image"), "cannot identify"),
    "bomb.png": (bomb, "decompression bomb"),
    "long.png": (lambda path: Image.fromarray(np.zeros((1, 40_000), np.uint8)).save(path), "a side of 40000 pixels"),
    "large.png": (lambda path: Image.new("1", (30_000, 3_000)).save(path), "90000000 pixels; 89478485 are the most"),
    "nowhere.png": (lambda path: path.symlink_to("not_there.png"), "no such image file"),
}


@pytest.mark.parametrize("name", USABLE)
def test_unusual_images_go_all_the_way_to_a_view(name, tmp_path):
    USABLE[name](tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8
    assert image.shape == (*image_size(tmp_path / name), 3)
    views = make_views(image, Instances.empty(*image.shape[:2]), np.random.default_rng(0), CONFIG)
    assert views["weak"]["image"].shape == (16, 24, 3)
    assert orientation(tmp_path / name) == (6 if name == "turned.jpg" else 1)


def test_what_becomes_black_or_is_left_unread_is_a_warning(tmp_path):
    """16 bits that do not fill their range, grey and coloured; pages and frames behind the first; also when seen."""
    few, rest = NOISE.astype(np.uint16) << 4, [Image.fromarray(NOISE[:, ::-1])]  # 12 bits
    cv2.imwrite(str(tmp_path / "colour.png"), few)
    cv2.imwrite(str(tmp_path / "full.png"), few[::-1] << 4)
    cv2.imwrite(str(tmp_path / "grey.tif"), few[..., 0])
    for number, name in enumerate(("pages.tif", "frames.webp", "frames.png")):
        Image.fromarray(NOISE[number + 1 :]).resize((60, 40)).save(tmp_path / name, save_all=True, append_images=rest)
    Image.fromarray(NOISE[:, :29]).save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=rest)
    expected = (
        "unlabelled: 2 images are black or nearly so, without a value of 32 of 255 or more: colour.png, grey.tif "
        "(values of 16-bit images are taken as parts of 65535: scale them to the full range, or save 8 bits)",
        "unlabelled: 3 files hold several pages or frames, of which only the first is read; save each as a file of its "
        "own to use them: frames.png, frames.webp, pages.tif",
    )
    source, seen = ImageFolder(tmp_path), SeenImages(tmp_path / "seen")
    assert tuple(inspect({"unlabelled": source}, 10)["warnings"]) == expected
    assert check_sources(None, source, None, 10, seen=seen).warnings == expected
    seen.save()
    assert check_sources(None, source, None, 10, seen=SeenImages(tmp_path / "seen")).warnings == expected


def test_a_dark_picture_of_8_bits_is_not_said_to_have_16(tmp_path):
    for level in (31, 32):
        Image.new("RGB", (8, 8), (0, level, 0)).save(tmp_path / f"{level}.png")
    cv2.imwrite(str(tmp_path / "deep.png"), NOISE.astype(np.uint16) << 8)
    (text,) = check_sources(None, ImageFolder(tmp_path), None, 10).warnings
    assert text == "unlabelled: 1 images are black or nearly so, without a value of 32 of 255 or more: 31.png"


def test_pages_behind_a_damaged_one_do_not_count(tmp_path):
    """A TIFF that is cut behind its first page still has that page."""
    Image.fromarray(NOISE).save(tmp_path / "one.tif")
    Image.fromarray(NOISE).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(NOISE)])
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: (tmp_path / "one.tif").stat().st_size + 20])
    assert read_header(tmp_path / "a.tif") == ImageHeader(orientation=1, frames=1, bits=8)


def test_many_copies_are_counted_as_images(tmp_path):
    for number in range(24):
        Image.fromarray(NOISE).save(tmp_path / f"{number:02}.png")
    for name in ("x.png", "y.png"):
        Image.fromarray(NOISE[::-1]).save(tmp_path / name)
    (text,) = inspect({"unlabelled": ImageFolder(tmp_path)}, 10)["warnings"]
    some = "00.png = 01.png = 02.png = ... (24 files), x.png = y.png"
    assert text == f"unlabelled: 26 images show the same pixels as another: {some}"


def test_cmyk_has_its_colours(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "red.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "red.tif"), np.broadcast_to((255, 0, 0), (4, 4, 3)))


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_images_are_found_before_a_run(name, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "sound.png")
    make, problem = UNUSABLE[name]
    make(tmp_path / name)
    source = ImageFolder(tmp_path)
    with pytest.raises(DataError, match=rf"(?s)1 unreadable images of 2.*{name}.*{problem}"):
        check_source("unlabelled", source, None)
    report = check_source("unlabelled", source, None, "skip")
    assert [report.source.record(i).file_name for i in range(len(report.source))] == ["sound.png"]
    assert [problem in fault for fault in report.look.faults] == [True]
    inspected = inspect({"unlabelled": source}, 10)  # finds what a run would
    assert inspected["sets"]["unlabelled"]["unreadable"] == 1
    (error,) = inspected["errors"]
    assert re.search(f"{name}.*{problem}", error)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for read in (read_image, image_size, read_label_map):
        with pytest.raises(DataError, match=r"pipe\.png.*not a file"):
            read(tmp_path / "pipe.png")


def test_folders_and_patterns_find_the_same(tmp_path):
    """Linked folders too, each once; and nothing beside the folder."""
    inside, outside = tmp_path / "pool", tmp_path / "more"
    for folder in (inside / "a", outside):
        folder.mkdir(parents=True)
        Image.fromarray(NOISE).save(folder / "1.png")
    (inside / "linked").symlink_to(outside)
    found = [ImageFolder(images) for images in (inside, f"{inside}/**/*.png")]
    names = [[source.record(index).file_name for index in range(len(source))] for source in found]
    assert names == [["a/1.png", "linked/1.png"]] * 2
    (inside / "a" / "round").symlink_to(inside)
    assert len(ImageFolder(inside)) == 2
    with pytest.raises(DataError, match="after a wildcard"):
        ImageFolder(f"{inside}/*/../../more/*.png")


def damaged(path: Path, rng: np.random.Generator) -> None:
    """Changes some bytes, most of them in the header, and sometimes cuts the end off."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 6)):
        content[rng.integers(min(len(content), 120) if rng.random() < 0.7 else len(content))] = rng.integers(256)
    path.write_bytes(content[: rng.integers(len(content))] if rng.random() < 0.3 else content)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp"])
@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_in_a_file_is_a_data_error_or_nothing(name, tmp_path):
    whole = tmp_path / f"whole_{name}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE[:12, :17]).save(whole, exif=exif)
    rng, refused = np.random.default_rng(0), []
    for _ in range(100):
        (tmp_path / name).write_bytes(whole.read_bytes())
        damaged(tmp_path / name, rng)
        for read in (read_image, image_size, orientation, read_label_map):
            try:
                read(tmp_path / name)
            except DataError as error:
                refused.append(str(error))
    assert len(refused) > 20
    assert all(name in text for text in refused)


def test_links_that_leave_their_folder_are_named(tmp_path):
    outside, folder = tmp_path / "outside.png", tmp_path / "images"
    Image.fromarray(NOISE).save(outside)
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(NOISE[::-1]).save(folder / "own.png")
    (folder / "sub" / "link.png").symlink_to(outside)
    (folder / "sub" / "inner.png").symlink_to(folder / "own.png")
    source = ImageFolder(folder)
    assert [leaves_folder(source.record(i)) for i in range(3)] == [False, False, True]
    report = inspect({"unlabelled": source}, 10)
    assert report["errors"] == []
    assert report["warnings"] == [
        "unlabelled: 2 images show the same pixels as another: own.png = sub/inner.png",
        "unlabelled: 1 images are links that leave their folder: sub/link.png",
    ]
    # A folder that is a link itself is where its images are.
    (tmp_path / "linked").symlink_to(folder)
    assert not leaves_folder(ImageFolder(tmp_path / "linked").record(0))


@pytest.mark.parametrize("name", ["../outside.png", "sub/../../outside.png", "/etc/outside.png", "C:\\outside.png"])
def test_file_names_that_climb_out_are_refused(name, tmp_path):
    (tmp_path / "set").mkdir()
    image = {"id": 1, "file_name": name, "height": 4, "width": 4}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"set\.json: images\[\]\.file_name: .* must be a path inside the folder"):
        Coco(tmp_path / "set.json")


def coco(folder: Path, name: str, pictures: dict[str, np.ndarray], annotations: list[dict]) -> Coco:
    """A set of pictures by file name; annotations name their picture's position as ``image_id``."""
    (folder / name).mkdir()
    images = []
    for number, (file, pixels) in enumerate(pictures.items()):
        Image.fromarray(pixels).save(folder / name / file)
        images.append({"id": number, "file_name": file, "height": pixels.shape[0], "width": pixels.shape[1]})
    categories = [{"id": 4, "name": "box"}, {"id": 9, "name": "ring"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return Coco(folder / f"{name}.json", on_fault="skip")


def square(number: int, image: int, side: int = 4, **more) -> dict:
    corners = [0, 0, side, 0, side, side, 0, side]
    return {"id": number, "image_id": image, "category_id": 4, "segmentation": [corners], **more}


def test_an_inspection_counts_and_compares(tmp_path):
    pictures = {f"{i}.png": np.roll(NOISE, i, axis=1) for i in range(6)}
    of = lambda *numbers: {f"{i}.png": pictures[f"{i}.png"] for i in numbers}
    annotations = [square(i, 0, bbox=[0, 0, 4, 4]) for i in range(3)]
    annotations += [square(3, 1, bbox=[58, 0, 9, 4]), square(4, 99), square(5, 2, iscrowd=1)]
    labelled = coco(tmp_path, "labelled", of(0, 1, 2), annotations)
    val = coco(tmp_path, "val", of(2, 3), [square(0, 0), square(1, 1)])
    (tmp_path / "pool").mkdir()
    for name in ("1.png", "4.png"):
        Image.fromarray(pictures[name]).save(tmp_path / "pool" / f"copy_of_{name}", compress_level=0)
    bomb(tmp_path / "pool" / "bomb.png")
    Image.fromarray(pictures["4.png"][:20]).save(tmp_path / "pool" / "5.png")
    # The same bytes in another shape are another picture.
    Image.fromarray(pictures["4.png"][:20].reshape(40, 30, 3)).save(tmp_path / "pool" / "6.png")

    report = inspect({"labelled": labelled, "unlabelled": ImageFolder(tmp_path / "pool"), "val": val}, max_instances=2)
    json.dumps(report)
    assert report["sets"]["labelled"] == {
        "images": 3,
        "unreadable": 0,
        "sizes": {"different": 1, "smallest": (40, 60), "largest": (40, 60), "commonest": (40, 60)},
        "instances": 4,
        "images_without_instances": 1,
        "largest_number_of_instances": 3,
        "over_cap": 1,
        "instances_cut": 1,
        "classes": [
            {"id": 4, "name": "box", "instances": 4, "images": 2},
            {"id": 9, "name": "ring", "instances": 0, "images": 0},
        ],
    }
    pool = report["sets"]["unlabelled"]
    assert (pool["images"], pool["unreadable"], pool["sizes"]["different"]) == (5, 1, 3)
    assert report["shared_images"] == [
        {"labelled": ["1.png"], "unlabelled": ["copy_of_1.png"]},
        {"labelled": ["2.png"], "val": ["2.png"]},
    ]
    texts = [
        "labelled: .*annotation 4 has image_id 99",
        r"unlabelled: .*bomb\.png",
        r"labelled and val share 1 .*2\.png",
    ]
    for text, pattern in zip(report["errors"], texts, strict=True):
        assert re.search(pattern, text)
    assert report["warnings"] == [
        "labelled: 1 images have more than 2 instances, which cuts 1; raise data.max_instances to keep them",
        "labelled: 1 annotations have a bbox outside their image, which is not used: 3",
        "labelled: 2 annotations are exact copies of another in their image: 1, 2",
        "labelled: 1 classes have no instance: ring",
        "val: 1 classes have no instance: ring",
        "labelled and unlabelled share 1 images (1.png): their pseudo-labels compete with their labels; take them out "
        "of unlabelled",
    ]
