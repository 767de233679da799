"""Phrases that name what an image shows, as sequences of characters for a model to look at."""

from collections.abc import Sequence

import numpy as np

from dit_jax.config import DiTConfig
from dit_jax.errors import InputError

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = ("{noun}", "{a} {noun}", "the {noun}", "draw {noun}", "draw {a} {noun}")
PHRASES_OF_NUMBERS = (*PHRASES, "the digit {noun}")


class Words:
    """What a model with `config.context = "words"` is told of an image: one of the phrases that name its class.

    A phrase is a sequence of characters, each one of `ALPHABET` as a one-hot vector. Training takes phrases by chance;
    sampling takes any phrase.

    class_names: of the data. Digits are spelt out, underscores are spaces: "3" is a "three".
    length: characters of a phrase, at most.
    Raises InputError for a name that cannot be written so.
    """

    features = len(ALPHABET)

    def __init__(self, class_names: Sequence[str], length: int):
        self.length = length
        self.nouns = [noun_of(name) for name in class_names]
        self.phrases = [phrases(noun) for noun in self.nouns]
        self._tokens = [self.tokens(own) for own in self.phrases]

    def tokens(self, phrases: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(B, length, features) float32 characters, and (B, length) bool, where there is one.

        Raises InputError for a phrase that is empty, too long, or has other characters.
        """
        context = np.zeros((len(phrases), self.length, self.features), np.float32)
        for row, phrase in zip(context, phrases, strict=True):
            if unknown := "".join(sorted(set(phrase) - set(ALPHABET))):
                raise InputError(f"{phrase!r} has {unknown!r}: expected small letters from a to z, and spaces")
            if not 0 < len(phrase) <= self.length:
                raise InputError(f"{phrase!r} has {len(phrase)} characters: expected 1 to {self.length}")
            row[np.arange(len(phrase)), [ALPHABET.index(character) for character in phrase]] = 1
        return context, context.any(axis=-1)

    def of_record(self, label: int, chance: int) -> dict[str, np.ndarray]:
        """What training is told of an image: a phrase of its class, which one by the number `chance`."""
        context, mask = self._tokens[label]
        chosen = chance % len(mask)
        return {"context": context[chosen], "context_mask": mask[chosen]}

    def in_turn(self, labels: np.ndarray) -> list[str]:
        """A phrase for each label (B,), which one by how many labels are before it."""
        classes = len(self.phrases)
        return [self.phrases[y][i // classes % len(self.phrases[y])] for i, y in enumerate(labels)]

    def class_of(self, phrase: str) -> int:
        """The class whose name stands in a phrase; -1 if that is none, or several."""
        found = [label for label, noun in enumerate(self.nouns) if f" {noun} " in f" {phrase} "]
        return found[0] if len(found) == 1 else -1


def noun_of(class_name: str) -> str:
    """The name of a class as it stands in a phrase."""
    if class_name in map(str, range(len(NUMBERS))):
        return NUMBERS[int(class_name)]
    return class_name.lower().replace("_", " ")


def phrases(noun: str) -> list[str]:
    """What training is told of images of a class, each as likely."""
    a = "an" if noun[0] in "aeio" and noun != "one" else "a"
    return [phrase.format(noun=noun, a=a) for phrase in (PHRASES_OF_NUMBERS if noun in NUMBERS else PHRASES)]


CONTEXTS = {"words": Words}


def open_context(kind: str, class_names: Sequence[str], model: DiTConfig) -> Words | None:
    """What `config.context` names, or None for nothing. Raises InputError if the model does not take just that."""
    if kind and kind not in CONTEXTS:
        raise InputError(f"context={kind!r}: expected {' or '.join(CONTEXTS)}, or nothing")
    features = CONTEXTS[kind].features if kind else 0
    if model.context_features != features:
        raise InputError(
            f"context={kind!r} is {features} features wide, the model takes {model.context_features}: "
            f"set --config.model.context_features={features}"
            + (", and context_tokens to the longest phrase" if kind else " and context_tokens=0, or name a context")
        )
    return CONTEXTS[kind](class_names, model.context_tokens) if kind else None
