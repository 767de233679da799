"""Phrases as characters, and which of them a record is told by."""

import dataclasses

import jax
import numpy as np
import pytest

from dit_jax import DiTConfig
from dit_jax.data.loader import Loader
from dit_jax.data.sources import open_source
from dit_jax.data.words import ALPHABET, Words, open_context
from dit_jax.errors import InputError
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.sharding import batch_sharding

DIGITS = tuple(map(str, range(10)))
MODEL = DiTConfig(context_features=len(ALPHABET), context_tokens=16)


@pytest.fixture(scope="module")
def words():
    return Words(DIGITS, 16)


def read(context: np.ndarray, mask: np.ndarray) -> str:
    """The phrase that one-hot characters (L, F) spell."""
    assert (context.sum(axis=-1) == mask).all()
    return "".join(ALPHABET[character] for character in context[mask].argmax(axis=-1))


def test_characters_are_one_hot_and_the_rest_is_masked(words):
    context, mask = words.tokens(["a five", "three", "draw  zz"])
    assert context.shape == (3, 16, 27) and context.dtype == np.float32 and mask.dtype == bool
    assert [read(*row) for row in zip(context, mask, strict=True)] == ["a five", "three", "draw  zz"]
    assert mask.sum(axis=1).tolist() == [6, 5, 8] and not context[~mask].any()


@pytest.mark.parametrize(
    ("phrase", "told"),
    [
        ("Three!", "'Three!' has '!T': expected small letters"),
        ("trois ou quatre x", "has 17 characters: expected 1 to 16"),
        ("", "'' has 0 characters"),
    ],
)
def test_what_cannot_be_spelt_is_refused(words, phrase, told):
    with pytest.raises(InputError, match=told):
        words.tokens(["three", phrase])


def test_classes_are_named_by_their_phrases_and_no_other(words):
    for label, phrases in enumerate(words.phrases):
        assert len(set(phrases)) == 6 and {words.class_of(phrase) for phrase in phrases} == {label}
    assert {"three", "a three", "the digit three"} < set(words.phrases[3]) and "draw an eight" in words.phrases[8]
    assert words.class_of("please not two") == 2
    assert [words.class_of(phrase) for phrase in ("", "twofold", "three or four")] == [-1, -1, -1]


def test_other_classes_are_named_too_if_their_names_can_be_spelt():
    pets = Words(("Golden_Retriever", "owl"), 24)
    assert pets.phrases[0] == [f"{begin}golden retriever" for begin in ("", "a ", "the ", "draw ", "draw a ")]
    assert pets.phrases[1][1] == "an owl" and pets.class_of("an old owl") == 1
    with pytest.raises(InputError, match="'draw a golden retriever' has 23 characters"):
        Words(("golden_retriever",), 22)


def test_phrases_in_turn_cover_all_of_a_class(words):
    labels = np.arange(70) % 10
    phrases = words.in_turn(labels)
    assert [words.class_of(phrase) for phrase in phrases] == labels.tolist()
    assert phrases[3:60:10] == words.phrases[3] and phrases[63] == "three"


def batches(devices: int, context: Words | None, start: int = 0, count: int = 6) -> list[dict]:
    with Loader(
        open_source("digits"),
        image_size=8,
        batch_size=32,
        seed=3,
        flip=True,
        context=context,
        sharding=batch_sharding(make_mesh(devices=jax.devices()[:devices])),
    ).batches(start) as read_ahead:
        return [jax.tree.map(np.asarray, next(read_ahead)) for _ in range(count)]


def test_a_phrase_depends_on_seed_and_place_only_and_changes_nothing_else(words):
    alone = batches(1, words)
    for other in (batches(8, words), batches(1, words)[:4] + batches(2, words, start=4, count=2)):
        jax.tree.map(np.testing.assert_array_equal, alone, other)
    for batch, plain in zip(alone, batches(1, None), strict=True):
        assert batch.keys() - plain.keys() == {"context", "context_mask"}
        for name in plain:
            np.testing.assert_array_equal(batch[name], plain[name])


def test_every_phrase_of_a_class_comes_and_no_other(words):
    told = {}
    for batch in batches(1, words, count=25):
        for label, *row in zip(batch["y"], batch["context"], batch["context_mask"], strict=True):
            told.setdefault(int(label), []).append(read(*row))
    assert {label: set(phrases) for label, phrases in told.items()} == dict(enumerate(map(set, words.phrases)))
    share = sum(phrase.startswith("the digit") for phrases in told.values() for phrase in phrases) / 800
    assert share == pytest.approx(1 / 6, abs=0.06)


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        ("text", {}, "context='text': expected words, or nothing"),
        ("words", {"context_features": 8}, "set --config.model.context_features=27, and context_tokens"),
        ("words", {"context_features": 0, "context_tokens": 0}, "the model takes 0: set"),
        ("", {}, "the model takes 27: set --config.model.context_features=0"),
        ("words", {"context_tokens": 10}, "'draw a zero' has 11 characters: expected 1 to 10"),
    ],
)
def test_a_model_that_takes_something_else_is_refused(kind, fields, told):
    with pytest.raises(InputError, match=told):
        open_context(kind, DIGITS, dataclasses.replace(MODEL, **fields))


def test_nothing_is_nothing():
    assert open_context("", DIGITS, DiTConfig()) is None
