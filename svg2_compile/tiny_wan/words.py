"""Prompts made of words: what is in the picture, how it moves, what the camera and the light do, and their embedding.

>>> words = parse("mountains, camera pans left, large cat moves right, ball circles", VOCABULARY)
>>> str(words)
'mountains, camera pans left, light steady, large cat moves right, medium ball circles'

A prompt is a list of clauses: a background first, then what the camera does, what the light does, and up to four
objects from back to front, each with a size and a motion. What is left out is still, steady, medium, or at rest. Every
word has a fixed random vector, and so has every row of the embedding; a row is the sum of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NewType

import torch
from torch import Tensor

MAX_OBJECTS = 4
ROWS_BEFORE_OBJECTS = 3
ROWS_OF_AN_OBJECT = 3
PROMPT_ROWS = ROWS_BEFORE_OBJECTS + ROWS_OF_AN_OBJECT * MAX_OBJECTS + 1
"""Rows of an embedding: background, camera, light, three for each object, and how many objects there are."""

Entry = NewType("Entry", str)
"""A word with its kind before it, such as ``motion moves left``."""

KINDS = ("background", "camera", "light", "size", "object", "motion", "count")
NOTHING = Entry("nothing")
"""Fills the rows of objects that are not there."""
NULL = Entry("null")
"""Fills every row of the embedding that stands for no prompt."""


class PromptError(ValueError):
    """A prompt says what the model has no word for."""


@dataclass(frozen=True, slots=True)
class ObjectWords:
    """What a prompt says of one object."""

    name: str
    motion: str = "rests"
    size: str = "medium"

    def __str__(self) -> str:
        return f"{self.size} {self.name} {self.motion}"


@dataclass(frozen=True, slots=True)
class SceneWords:
    """What a prompt says of a whole video."""

    background: str
    camera: str = "still"
    light: str = "steady"
    objects: tuple[ObjectWords, ...] = ()
    """From back to front."""

    def __str__(self) -> str:
        clauses = (self.background, f"camera {self.camera}", f"light {self.light}", *map(str, self.objects))
        return ", ".join(clauses)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words that a model was trained on."""

    background: tuple[str, ...]
    object: tuple[str, ...]
    camera: tuple[str, ...] = (
        "still",
        "pans left",
        "pans right",
        "tilts up",
        "tilts down",
        "zooms in",
        "zooms out",
        "turns left",
        "turns right",
    )
    light: tuple[str, ...] = ("steady", "brightens", "darkens", "sweeps")
    size: tuple[str, ...] = ("small", "medium", "large")
    motion: tuple[str, ...] = (
        "rests",
        "moves left",
        "moves right",
        "rises",
        "falls",
        "circles",
        "swings",
        "grows",
        "shrinks",
        "spins",
    )

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All words with their kinds, in the order in which their vectors are kept."""
        counts = tuple(str(count) for count in range(MAX_OBJECTS + 1))
        words = {kind: counts if kind == "count" else getattr(self, kind) for kind in KINDS}
        return (*(Entry(f"{kind} {word}") for kind in KINDS for word in words[kind]), NOTHING, NULL)

    @classmethod
    def of_entries(cls, entries: Iterable[str]) -> Vocabulary:
        """Return the vocabulary whose ``entries`` these are."""
        by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for entry in entries:
            kind, _, word = entry.partition(" ")
            if word:
                by_kind[kind].append(word)
        del by_kind["count"]
        return cls(**{kind: tuple(words) for kind, words in by_kind.items()})


def parse(text: str, vocabulary: Vocabulary) -> SceneWords:
    """Return what a prompt says.

    Args:
        text: clauses separated by commas, a background among them; ``str`` of the result says all that may be said.
        vocabulary: of the model that gets the prompt.

    Raises:
        PromptError: a clause has an unknown word, comes twice, or is missing.

    """
    told: dict[str, str] = {}
    objects = []
    for clause in filter(None, (" ".join(part.split()) for part in text.split(","))):
        first, _, rest = clause.partition(" ")
        if first in ("camera", "light"):
            _tell(told, first, rest, vocabulary)
        elif clause in vocabulary.background:
            _tell(told, "background", clause, vocabulary)
        else:
            objects.append(_object_of(clause, vocabulary))
    if "background" not in told:
        raise PromptError(f"a prompt needs one background of {', '.join(vocabulary.background)}; got {text!r}")
    if len(objects) > MAX_OBJECTS:
        raise PromptError(f"a prompt may have {MAX_OBJECTS} objects at most, got {len(objects)} in {text!r}")
    return SceneWords(objects=tuple(objects), **told)


def _tell(told: dict[str, str], kind: str, word: str, vocabulary: Vocabulary) -> None:
    known: tuple[str, ...] = getattr(vocabulary, kind)
    if word not in known:
        raise PromptError(f"{kind} must be one of {', '.join(known)}; got {word!r}")
    if kind in told:
        raise PromptError(f"a prompt has one {kind}, got {told[kind]!r} and {word!r}; leave one out")
    told[kind] = word


def _object_of(clause: str, vocabulary: Vocabulary) -> ObjectWords:
    words = clause.split()
    size = words.pop(0) if words[0] in vocabulary.size else "medium"
    name, motion = (words[0] if words else ""), " ".join(words[1:]) or "rests"
    if name not in vocabulary.object:
        known = ", ".join((*vocabulary.background, *vocabulary.object))
        raise PromptError(f"a clause begins with camera, light, a size, or one of {known}; got {clause!r}")
    if motion not in vocabulary.motion:
        raise PromptError(f"an object {', '.join(vocabulary.motion[:-1])} or {vocabulary.motion[-1]}; got {clause!r}")
    return ObjectWords(name, motion, size)


def entries_of(words: SceneWords) -> tuple[Entry, ...]:
    """Return the words of an embedding, one a row."""
    rows = [f"background {words.background}", f"camera {words.camera}", f"light {words.light}"]
    for each in words.objects:
        rows += [f"size {each.size}", f"object {each.name}", f"motion {each.motion}"]
    rows += [NOTHING] * (PROMPT_ROWS - 1 - len(rows))
    return tuple(Entry(row) for row in (*rows, f"count {len(words.objects)}"))


class WordVectors:
    """The fixed vectors of all words and rows, and embeddings made of them.

    ``words`` is ``[entries, D]`` and ``rows`` ``[16, D]``, fp32, each number of about unit variance.
    """

    def __init__(self, vocabulary: Vocabulary, words: Tensor, rows: Tensor) -> None:
        entries = vocabulary.entries
        if words.shape[0] != len(entries) or rows.shape != (PROMPT_ROWS, words.shape[1]):
            expected = f"[{len(entries)}, D] and [{PROMPT_ROWS}, D]"
            raise PromptError(f"vectors must be {expected}, got {tuple(words.shape)} and {tuple(rows.shape)}")
        self.vocabulary = vocabulary
        self.words, self.rows = words, rows
        self._numbers = {entry: number for number, entry in enumerate(entries)}

    @classmethod
    def drawn(cls, vocabulary: Vocabulary, dimension: int, seed: int = 0) -> WordVectors:
        """Return normal vectors that depend on ``seed`` alone."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        count = len(vocabulary.entries)
        both = torch.randn(count + PROMPT_ROWS, dimension, generator=generator, dtype=torch.float32, device="cpu")
        return cls(vocabulary, both[:count].clone(), both[count:].clone())

    def numbers(self, words: SceneWords | None) -> list[int]:
        """Return the number of each row's word; ``None`` is no prompt.

        Raises:
            PromptError: the vocabulary lacks a word.

        """
        entries = (NULL,) * PROMPT_ROWS if words is None else entries_of(words)
        missing = [entry for entry in entries if entry not in self._numbers]
        if missing:
            raise PromptError(f"the model has no word for {', '.join(missing)}")
        return [self._numbers[entry] for entry in entries]

    def embed(self, numbers: Tensor) -> Tensor:
        """Return ``[..., 16, D]`` from the numbers of words ``[..., 16]``."""
        return (self.words[numbers] + self.rows) * math.sqrt(0.5)

    def embedding(self, words: SceneWords | None) -> Tensor:
        """Return the embedding of one prompt, ``[16, D]``; ``None`` is no prompt."""
        return self.embed(torch.tensor(self.numbers(words), dtype=torch.int64, device=self.words.device))

    def to(self, device: torch.device | str) -> WordVectors:
        """Return the vectors on a device."""
        return WordVectors(self.vocabulary, self.words.to(device), self.rows.to(device))

    def save(self, path: Path) -> None:
        """Write vocabulary and vectors as safetensors, a name an entry."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {entry: self.words[number].clone() for entry, number in self._numbers.items()}
        tensors["rows"] = self.rows.contiguous()
        save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> WordVectors:
        """Read what ``save`` wrote; the order of words of a kind is the alphabet's."""
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(str(path))
        rows = tensors.pop("rows")
        vocabulary = Vocabulary.of_entries(sorted(tensors))
        return cls(vocabulary, torch.stack([tensors[entry] for entry in vocabulary.entries]), rows)
