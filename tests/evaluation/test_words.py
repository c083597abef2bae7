"""Prompts of words: what is written is what is read, and every word changes the embedding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from svg2_compile.tiny_wan.words import (
    MAX_OBJECTS,
    PROMPT_ROWS,
    ObjectWords,
    PromptError,
    SceneWords,
    Vocabulary,
    WordVectors,
    parse,
)

VOCABULARY = Vocabulary(background=("mountains", "sea"), object=("cat", "ball", "cup"))
VECTORS = WordVectors.drawn(VOCABULARY, 32)


@st.composite
def scenes(draw):
    def word(kind):
        return draw(st.sampled_from(getattr(VOCABULARY, kind)))

    count = draw(st.integers(0, MAX_OBJECTS))
    objects = tuple(ObjectWords(word("object"), word("motion"), word("size")) for _ in range(count))
    return SceneWords(word("background"), word("camera"), word("light"), objects)


@given(scenes())
def test_what_a_scene_says_is_read_as_that_scene(scene):
    assert parse(str(scene), VOCABULARY) == scene


@given(scenes(), scenes())
def test_scenes_have_the_same_embedding_only_if_they_are_the_same(one, other):
    assert torch.equal(VECTORS.embedding(one), VECTORS.embedding(other)) == (one == other)


def test_what_is_left_out_is_still_steady_medium_and_at_rest():
    expected = SceneWords("sea", "still", "steady", (ObjectWords("cat", "rests", "medium"),))
    assert parse(" sea ,  cat,", VOCABULARY) == expected


def test_an_embedding_says_word_and_row():
    embedding = VECTORS.embedding(parse("sea, cat spins, cat spins", VOCABULARY))
    assert embedding.shape == (PROMPT_ROWS, 32)
    assert not torch.equal(embedding[4], embedding[7])
    # the same word in another row differs by the rows' vectors alone
    assert_close(embedding[4] - embedding[7], (VECTORS.rows[4] - VECTORS.rows[7]) * 0.5**0.5)


def test_no_prompt_is_like_no_scene():
    null = VECTORS.embedding(None)
    assert not torch.isclose(null, VECTORS.embedding(parse("sea", VOCABULARY))).all(dim=1).any()


def test_numbers_have_about_unit_variance():
    assert 0.8 < VECTORS.embedding(parse("sea, cat, ball", VOCABULARY)).std().item() < 1.2


def test_embeddings_of_many_prompts_are_those_of_each():
    scenes = [parse("sea, cat", VOCABULARY), parse("mountains", VOCABULARY), None]
    together = VECTORS.embed(torch.tensor([VECTORS.numbers(scene) for scene in scenes]))
    assert torch.equal(together, torch.stack([VECTORS.embedding(scene) for scene in scenes]))


def test_saved_vectors_give_the_same_embeddings(tmp_path):
    VECTORS.save(tmp_path / "words.safetensors")
    loaded = WordVectors.load(tmp_path / "words.safetensors")
    for text in ("sea, camera zooms in, light sweeps, large cat circles, ball", "mountains"):
        scene = parse(text, loaded.vocabulary)
        assert torch.equal(loaded.embedding(scene), VECTORS.embedding(scene))
    assert torch.equal(loaded.embedding(None), VECTORS.embedding(None))


def test_vectors_depend_on_the_seed_alone():
    torch.manual_seed(3)
    assert torch.equal(WordVectors.drawn(VOCABULARY, 32).words, VECTORS.words)
    assert not torch.equal(WordVectors.drawn(VOCABULARY, 32, seed=1).words, VECTORS.words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat", "needs one background of mountains, sea; got 'cat'"),
        ("sea, mountains", "has one background, got 'sea' and 'mountains'"),
        ("sea, camera flies", "camera must be one of still, .* got 'flies'"),
        ("sea, light", "light must be one of steady, .* got ''"),
        ("sea, whale", "got 'whale'"),
        ("sea, large", "got 'large'"),
        ("sea, cat sleeps", "an object rests, .* or spins; got 'cat sleeps'"),
        ("sea, cat, cat, cat, cat, cat", "4 objects at most, got 5"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_told_why(text, message):
    with pytest.raises(PromptError, match=message):
        parse(text, VOCABULARY)


def test_a_scene_with_a_word_of_another_vocabulary_is_refused():
    with pytest.raises(PromptError, match="no word for background moon"):
        VECTORS.numbers(SceneWords("moon"))


def test_vectors_must_fit_the_vocabulary():
    with pytest.raises(PromptError, match="vectors must be"):
        WordVectors(VOCABULARY, VECTORS.words[1:], VECTORS.rows)
