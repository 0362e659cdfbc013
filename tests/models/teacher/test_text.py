"""Prompts from class names: phrases, chunks and the map from classes to tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.mm_grounding_dino.modeling_mm_grounding_dino import (
    SPECIAL_TOKENS,
    generate_masks_with_special_tokens_and_transfer_map,
)

from cast_jax.core.errors import UserError
from cast_jax.models.teacher.text import PHRASE_ENDS, load_tokenizer, make_prompts, tokens_of

WORDS = ("car", "traffic", "light", "bi", "##cycle", "person", "motor", ",", "s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A vocabulary with BERT's marks in their places and a few words."""
    rows = [f"[unused{row}]" for row in range(1040)]
    for row, token in {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1012: ".",
        1029: "?",
    }.items():
        rows[row] = token
    rows[200 : 200 + len(WORDS)] = WORDS
    path = tmp_path_factory.mktemp("bert")
    (path / "vocab.txt").write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


def ids_of(*words: str) -> list[int]:
    marks = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "[PAD]": 0}
    return [marks[word] if word in marks else 200 + WORDS.index(word) for word in words]


def test_a_prompt_by_hand(tokenizer):
    prompts = make_prompts(["Car", " Traffic  LIGHT", "bicycle"], tokenizer)
    words = ["[CLS]", "car", ".", "traffic", "light", ".", "bi", "##cycle", ".", "[SEP]"]
    np.testing.assert_array_equal(prompts.tokens.ids, [ids_of(*words)])
    assert prompts.tokens.ids.tolist() == [tokenizer("car. traffic light. bicycle.")["input_ids"]]
    assert prompts.tokens.mask.all()
    np.testing.assert_array_equal(prompts.tokens.positions, [[0, 0, 1, 0, 1, 2, 0, 1, 2, 0]])
    expected = np.zeros((3, 10))
    expected[0, 1] = expected[1, 3:5] = expected[2, 6:8] = 1
    np.testing.assert_array_equal(prompts.class_map, expected[None])
    blocks = np.eye(10, dtype=bool)
    for start, end in ((1, 3), (3, 6), (6, 9)):
        blocks[start:end, start:end] = True
    np.testing.assert_array_equal(prompts.tokens.blocks, blocks[None])


def test_prompts_are_cut_between_classes(tokenizer):
    """Nine tokens hold two classes of three; a class with synonyms stays whole, and the last prompt is padded."""
    names, synonyms = ["traffic light", "bicycle", "person", "car"], {"person": ["person", "motor"]}
    prompts = make_prompts(names, tokenizer, synonyms=synonyms, max_tokens=9)
    np.testing.assert_array_equal(
        prompts.tokens.ids,
        [
            ids_of(*["[CLS]", "traffic", "light", ".", "bi", "##cycle", ".", "[SEP]"]),
            ids_of(*["[CLS]", "person", ".", "motor", ".", "car", ".", "[SEP]"]),
        ],
    )
    np.testing.assert_array_equal(prompts.class_map.sum(axis=2), [[2, 2, 0, 0], [0, 0, 2, 1]])
    np.testing.assert_array_equal(np.flatnonzero(prompts.class_map[1, 2]), [1, 3])
    smaller = make_prompts(names, tokenizer, synonyms=synonyms, max_tokens=6)
    assert smaller.tokens.ids.shape == (4, 6)
    np.testing.assert_array_equal(smaller.tokens.ids[3], ids_of(*["[CLS]", "car", ".", "[SEP]", "[PAD]", "[PAD]"]))
    np.testing.assert_array_equal(smaller.tokens.mask[3], [True] * 4 + [False] * 2)
    assert smaller.class_map.sum() == prompts.class_map.sum()


def test_phrases_are_hugging_faces():
    """Marks at random places, runs of them, none, and padding."""
    random = np.random.default_rng(0)
    ids = random.choice([*PHRASE_ENDS, 7, 8, 9, 10], size=(40, 12), p=[0.1] * 4 + [0.15] * 4)
    ids[1::2, 8:] = 0
    ids[0] = 7
    tokens = tokens_of(ids)
    blocks, positions = generate_masks_with_special_tokens_and_transfer_map(
        torch.from_numpy(ids), torch.tensor(SPECIAL_TOKENS)
    )
    np.testing.assert_array_equal(tokens.blocks, blocks)
    np.testing.assert_array_equal(tokens.positions, positions)
    np.testing.assert_array_equal(tokens.mask, ids != 0)


@pytest.mark.parametrize(
    ("names", "synonyms", "message"),
    [
        ([], {}, "no class names"),
        (["car", "person", "Car "], {}, "'Car ' already stands for 'car'"),
        (["car", "person"], {"person": ["car"]}, "class 'person': 'car' already stands for 'car'"),
        (["car", " "], {}, "class ' ': '' has no word that the detector knows"),
        (["car", "zebra"], {}, "class 'zebra': 'zebra' has no word that the detector knows"),
        (["car s."], {}, r"class 'car s.': 'car s.' has a mark that ends a phrase"),
        (["car"], {"person": ["motor"]}, "synonyms are given for person, but the classes are car"),
        (["car"], {"car": []}, "class 'car' has no phrase"),
        (["person", " ".join(["car"] * 8)], {}, r"class 'car car .*' takes 9 tokens; a prompt holds 8"),
    ],
)
def test_bad_names(tokenizer, names, synonyms, message):
    with pytest.raises(UserError, match=message):
        make_prompts(names, tokenizer, synonyms=synonyms, max_tokens=10)


def test_a_name_with_one_known_word_is_taken(tokenizer):
    assert make_prompts(["zebra car"], tokenizer).tokens.ids.tolist() == [[101, 100, 200, 1012, 102]]


def test_bad_tokenizers(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match="has another vocabulary than the detector, or none; give a folder with the vocab"
    ):
        load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_text((folder / "vocab.txt").read_text().replace("\n.\n", "\n;\n"))
    with pytest.raises(UserError, match="has another vocabulary"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "no" / "such" / "folder"))


def test_words_need_no_vocabulary():
    """Each name has its own numbers, the same for the same list; what the marks forbid stays forbidden."""
    names = ("car", "traffic light", "light truck")
    prompts = make_prompts(names, load_tokenizer("words"))
    (row,) = prompts.tokens.ids
    car, traffic, light, light_again, truck = (row[i] for i in (1, 3, 4, 6, 7))
    assert row.tolist() == [101, car, 1012, traffic, light, 1012, light_again, truck, 1012, 102]
    assert light == light_again
    assert len({car, traffic, light, truck} - set(PHRASE_ENDS) - {0, 100}) == 4
    np.testing.assert_array_equal(make_prompts(names, load_tokenizer("words")).tokens.ids, prompts.tokens.ids)
    with pytest.raises(UserError, match="has a mark that ends a phrase"):
        make_prompts(["st. bernard"], load_tokenizer("words"))
    with pytest.raises(UserError, match="has no word that the detector knows"):
        make_prompts(["&"], load_tokenizer("words"))
