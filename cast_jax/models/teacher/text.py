"""Class names as the detector reads them: ``"car. traffic light."`` in BERT's tokens, each phrase for itself.

Phrases end at ``[CLS]``, ``[SEP]``, ``.`` and ``?``. A token sees those of its own phrase, and positions start again
with each (Grounding DINO's sub-sentence representation, Liu et al., 2023). All of it is numpy: it happens once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cast_jax.core.errors import UserError

CLS, SEP, STOP, QUESTION = PHRASE_ENDS = (101, 102, 1012, 1029)  # [CLS], [SEP], "." and "?" of bert-base-uncased
PAD = 0
MAX_TOKENS = 256  # of a prompt, [CLS] and [SEP] included: what the detectors were trained with


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Prompts as a text encoder takes them; by ``tokens_of`` from ids alone.

    Attributes:
      ids: ``[prompts, tokens]``, rows of the vocabulary.
      mask: ``[prompts, tokens]``, False on padding.
      blocks: ``[prompts, tokens, tokens]``, True between tokens of one phrase.
      positions: ``[prompts, tokens]``, counted from the phrase's beginning.
    """

    ids: Int[Array, "prompts tokens"]
    mask: Bool[Array, "prompts tokens"]
    blocks: Bool[Array, "prompts tokens tokens"]
    positions: Int[Array, "prompts tokens"]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Class names cut into prompts of limited length.

    Attributes:
      tokens: one prompt a row, padded to the longest.
      class_map: ``[prompts, classes, tokens]``, one where a token belongs to a phrase of the class, else zero. A class
        is in one prompt only.
    """

    tokens: Tokens
    class_map: Float[np.ndarray, "prompts classes tokens"]


class WordTokenizer:
    """Numbers words as it meets them: for small models that are trained from scratch on one list of classes."""

    unk_token_id = 100
    _FIRST = 1030  # beyond all special tokens

    def __init__(self) -> None:
        self._ids = {".": STOP, "?": QUESTION}

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        del add_special_tokens  # there are none
        words = re.findall(r"\w+|[.?]", text)
        number = lambda word: self._ids.setdefault(word, self._FIRST + len(self._ids) - 2)
        return {"input_ids": [number(word) for word in words]}


def load_tokenizer(source: str) -> Any:
    """The tokenizer of ``bert-base-uncased``, from a folder with its ``vocab.txt`` or by its name on the hub.

    "words" is the one that needs no file, :class:`WordTokenizer`; published weights do not know its numbers.

    Raises:
      UserError: it cannot be loaded, or has another vocabulary.
    """
    if source == "words":
        return WordTokenizer()
    from transformers import BertTokenizer  # seconds to import, and only needed here

    advice = "give a folder with the vocab.txt of bert-base-uncased, or that name where the hub can be reached"
    try:
        tokenizer = BertTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"tokenizer {source!r} cannot be loaded ({reason}); {advice}") from error
    if tuple(tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"])) != PHRASE_ENDS:
        raise UserError(f"tokenizer {source!r} has another vocabulary than the detector, or none; {advice}")
    return tokenizer


def make_prompts(
    names: Sequence[str],
    tokenizer: Any,
    *,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Prompts:
    """The prompts that ask for all classes, in their order, as few as keep each class whole.

    Args:
      names: of the classes.
      tokenizer: by :func:`load_tokenizer`.
      synonyms: the phrases that stand for a class instead of its name; list the name too to keep it.
      max_tokens: of a prompt.

    Raises:
      UserError: no names, synonyms of no class, a phrase of two classes or twice of one, a phrase without known words
        or with a full stop or question mark in it, or a class that exceeds a prompt.
    """
    if not names:
        raise UserError("no class names: there is nothing to look for")
    synonyms = synonyms or {}
    if unknown := [name for name in synonyms if name not in names]:
        raise UserError(f"synonyms are given for {', '.join(unknown)}, but the classes are {', '.join(names)}")
    owner: dict[str, str] = {}
    phrases = []
    for name in names:
        encoded = []
        for phrase in synonyms.get(name, [name]):
            text = " ".join(phrase.lower().split())
            if text in owner:
                raise UserError(f"class {name!r}: {phrase!r} already stands for {owner[text]!r}; names must differ")
            owner[text] = name
            encoded.append(_encode(text, name, tokenizer))
        if not encoded:
            raise UserError(f"class {name!r} has no phrase: leave its synonyms out to look for its name")
        length = sum(map(len, encoded))
        if length > max_tokens - 2:
            raise UserError(f"class {name!r} takes {length} tokens; a prompt holds {max_tokens - 2}; shorten it")
        phrases.append(encoded)
    return _assemble(phrases, max_tokens - 2)


def tokens_of(ids: Int[np.ndarray, "prompts tokens"]) -> Tokens:
    """Finds the phrases in token ids; zeros are padding.

    A phrase includes the mark that ends it. The first token and the last one, and what no mark ends, see only
    themselves.
    """
    ids = np.asarray(ids, np.int32)
    prompts, length = ids.shape
    blocks = np.broadcast_to(np.eye(length, dtype=bool), (prompts, length, length)).copy()
    positions = np.zeros_like(ids)
    for prompt, row in enumerate(ids):
        start = 0
        for end in np.flatnonzero(np.isin(row, PHRASE_ENDS)).tolist():
            if 0 < end < length - 1:
                blocks[prompt, start : end + 1, start : end + 1] = True
                positions[prompt, start : end + 1] = np.arange(end + 1 - start)
            start = end + 1
    return Tokens(ids, ids != PAD, blocks, positions)  # type: ignore[arg-type]  # numpy arrays are arrays too


def _encode(text: str, name: str, tokenizer: Any) -> list[int]:
    """A phrase's tokens and the full stop after it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not set(ids) - {tokenizer.unk_token_id}:
        raise UserError(f"class {name!r}: {text!r} has no word that the detector knows; give it a synonym")
    if set(ids) & {*PHRASE_ENDS, PAD}:
        raise UserError(f"class {name!r}: {text!r} has a mark that ends a phrase (. or ?) in it; give it a synonym")
    return [*ids, STOP]


def _assemble(phrases: list[list[list[int]]], space: int) -> Prompts:
    """Fills prompts with the classes' phrases, one class after the other."""
    prompts: list[list[int]] = [[]]
    spans = []  # (prompt, class, first token, token after the last)
    for number, encoded in enumerate(phrases):
        if len(prompts[-1]) + sum(map(len, encoded)) > space:
            prompts.append([])
        for ids in encoded:
            first = 1 + len(prompts[-1])
            spans.append((len(prompts) - 1, number, first, first + len(ids) - 1))
            prompts[-1] += ids
    rows = np.full((len(prompts), 2 + max(map(len, prompts))), PAD, np.int32)
    for row, ids in zip(rows, prompts, strict=True):
        row[: len(ids) + 2] = [CLS, *ids, SEP]
    class_map = np.zeros((len(prompts), len(phrases), rows.shape[1]), np.float32)
    for prompt, number, first, after in spans:
        class_map[prompt, number, first:after] = 1.0
    return Prompts(tokens_of(rows), class_map)
