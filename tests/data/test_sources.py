"""Images are read in one way; folders, lists and subsets say what is wrong with them."""

from __future__ import annotations

import pickle
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cast_jax.core.errors import DataError
from cast_jax.data.sources.base import check_relative, image_size, name_some, read_image, read_list
from cast_jax.data.sources.folder import ImageFolder
from cast_jax.data.sources.subset import Subset

_RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def _save(path, pixels=_RGB, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_rgb_comes_back_exactly(tmp_path):
    np.testing.assert_array_equal(read_image(_save(tmp_path / "a.png")), _RGB)
    assert image_size(tmp_path / "a.png") == (5, 7)


def test_grey_is_repeated_and_alpha_is_dropped(tmp_path):
    grey = read_image(_save(tmp_path / "grey.png", _RGB[..., 0]))
    np.testing.assert_array_equal(grey, np.repeat(_RGB[..., :1], 3, axis=-1))
    rgba = np.concatenate([_RGB, np.zeros((5, 7, 1), np.uint8)], axis=-1)
    np.testing.assert_array_equal(read_image(_save(tmp_path / "rgba.png", rgba)), _RGB)


def test_palette_becomes_its_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([1, 0])
    image.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").tolist() == [[[200, 100, 0], [10, 20, 30]]]


def test_sixteen_bits_keep_their_high_byte(tmp_path):
    path = _save(tmp_path / "deep.png", np.array([[0, 255, 256, 65535]], np.uint16))
    assert read_image(path)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = _save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(path).shape == (5, 7, 3)


def test_floating_point_pixels_are_refused(tmp_path):
    path = _save(tmp_path / "float.tif", np.ones((2, 2), np.float32))
    with pytest.raises(DataError, match=r"float\.tif.*floating-point"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=r"broken\.png"):
            read(tmp_path / "broken.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_is_an_error_though_its_header_is_whole(tmp_path, suffix):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = _save(tmp_path / f"cut.{suffix}", noise)
    path.write_bytes(path.read_bytes()[:-2000])
    assert image_size(path) == (64, 64)
    with pytest.raises(DataError, match=f"cut.{suffix}"):
        read_image(path)


def test_a_missing_image_is_named(tmp_path):
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=r"gone\.png: no such image"):
            read(tmp_path / "gone.png")


@pytest.mark.parametrize(("there", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_in_another_unicode_form_is_told_apart(tmp_path, there, asked):
    file, named = (unicodedata.normalize(form, "Bär/Zähler.png") for form in (there, asked))
    _save(tmp_path / file)
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=f"no such image file; it is there with a name in Unicode's form {there}"):
            read(tmp_path / named)
        with pytest.raises(DataError, match=f"Unicode's form {there}"):
            read((tmp_path / file).with_name(Path(named).name))
        with pytest.raises(DataError, match=r"no such image file$"):
            read(tmp_path / "Bär.png")


def test_a_folder_is_searched_deeply_and_sorted(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a.png", "b/c/0.png"):
        _save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "b" / "._1.jpg").write_bytes(b"left by a Mac")
    source = ImageFolder(tmp_path)
    names = [source.record(i).file_name for i in range(len(source))]
    assert names == ["a.png", "b/1.jpg", "b/2.PNG", "b/c/0.png"]
    assert [source.record(i).image_id for i in range(4)] == names
    assert source.categories == ()
    np.testing.assert_array_equal(source.image(0), _RGB)
    with pytest.raises(DataError, match="no labels"):
        source.instances(0)
    assert source.left_out == ()


def test_images_of_other_formats_are_left_out_by_name(tmp_path):
    for name in ("b/1.HEIC", "2.gif", "labels.json", "notes.txt", "a.xml", "Thumbs.db", ".3.gif", "4.gif/x.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    said = r"2 files with other extensions \(\.gif, \.heic\) are left out; save .*: 2\.gif, b/1\.HEIC"
    with pytest.raises(DataError, match=rf"holds no images; looked for .*; {said}"):
        ImageFolder(tmp_path)
    _save(tmp_path / "a.png")
    assert ImageFolder(tmp_path).left_out == ("2.gif", "b/1.HEIC")
    assert ImageFolder(f"{tmp_path}/**/*").left_out == ("2.gif", "b/1.HEIC")
    assert ImageFolder(f"{tmp_path}/*.png").left_out == ()


def test_a_pattern_chooses_and_its_root_ends_before_the_wildcard(tmp_path):
    for name in ("x/1/left.png", "x/1/right.png", "x/2/left.png"):
        _save(tmp_path / name)
    source = ImageFolder(str(tmp_path / "x" / "*" / "left.png"))
    assert [source.record(i).file_name for i in range(len(source))] == ["1/left.png", "2/left.png"]
    assert source.record(1).path == tmp_path / "x" / "2" / "left.png"


def test_a_list_keeps_its_order(tmp_path):
    for name in ("a.png", "b/c.png"):
        _save(tmp_path / name)
    (tmp_path / "list.txt").write_text("# chosen by hand\nb/c.png\n\na.png\n")
    source = ImageFolder(tmp_path / "list.txt")
    assert [source.record(i).file_name for i in range(2)] == ["b/c.png", "a.png"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("a.png\na.png", "listed twice: a.png"),
        ("../a.png", "inside the folder"),
        ("/a.png", "inside the folder"),
        ("# nothing", "lists no images"),
    ],
)
def test_a_faulty_list_is_refused(tmp_path, lines, problem):
    _save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(DataError, match=problem):
        ImageFolder(tmp_path / "list.txt")


def test_empty_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        ImageFolder(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        ImageFolder(tmp_path / "gone")
    with pytest.raises(DataError, match="holds no images"):
        ImageFolder(str(tmp_path / "*.png"))
    with pytest.raises(DataError, match="cannot be read as a list"):
        read_list(tmp_path / "gone.txt")


@pytest.mark.parametrize(
    "name", ["/etc/x.png", "../x.png", "a/../../x.png", "", "C:\\x.png", "a\\..\\x.png", "\\x.png"]
)
def test_file_names_stay_inside(name):
    with pytest.raises(DataError, match=r"dataset\.json"):
        check_relative(name, "dataset.json")


def test_file_names_are_written_with_forward_slashes():
    assert check_relative("a\\b.png", "x") == "a/b.png"
    assert check_relative("./a//b..c.png", "x") == "a/b..c.png"


def test_long_lists_of_names_are_cut():
    assert name_some(range(3)) == "0, 1, 2"
    assert name_some(range(13), 2) == "0, 1 and 11 more"


def test_a_subset_chooses_in_order_and_survives_pickling(tmp_path):
    for name in "abc":
        _save(tmp_path / f"{name}.png", np.full((2, 2, 3), ord(name), np.uint8))
    subset = pickle.loads(pickle.dumps(Subset(ImageFolder(tmp_path), [2, 0])))
    assert [subset.record(i).file_name for i in range(len(subset))] == ["c.png", "a.png"]
    assert subset.image(0)[0, 0, 0] == ord("c")
    assert subset.categories == ()
    with ThreadPoolExecutor(4) as pool:
        values = [int(image[0, 0, 0]) for image in pool.map(subset.image, [0, 1] * 20)]
    assert values == [ord("c"), ord("a")] * 20
    with pytest.raises(DataError, match="no labels"):
        subset.instances(0)


@pytest.mark.parametrize("indices", [[3], [-1]])
def test_a_subset_knows_its_bounds(tmp_path, indices):
    _save(tmp_path / "a.png")
    with pytest.raises(DataError, match="outside the source"):
        Subset(ImageFolder(tmp_path), indices)
