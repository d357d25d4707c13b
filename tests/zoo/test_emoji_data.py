"""The packaged model's data: scenes, captions, what is held out, the atlas, the tokenizer."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest

from fasttrace.prompts import Prompt
from fasttrace.zoo.emoji import data
from fasttrace.zoo.emoji.model import WEIGHTS
from fasttrace.zoo.emoji.tokenizer import MAX_LENGTH, build_tokenizer, learn_merges


def a_scene(**values: str) -> data.Scene:
    chosen = {"object": "penguin", "style": "flat style", "colour": "red", "count": "one", "background": "snow"}
    chosen |= {"pose": "upright", **values}
    return data.Scene(**{name: data.ATTRIBUTES[name].index(value) for name, value in chosen.items()})


def some_scenes(number: int) -> list[data.Scene]:
    return random.Random(random.SystemRandom().randrange(2**32)).sample(list(data.all_scenes()), number)


def test_there_are_as_many_values_as_promised() -> None:
    assert len(data.ATTRIBUTES["object"]) >= 24
    assert [len(data.ATTRIBUTES[n]) for n in ("style", "count", "background", "pose")] == [4, 3, 4, 4]
    assert len(data.TINTS) == 6
    assert len(set(itertools.chain(*data.ATTRIBUTES.values()))) == sum(data.SIZES)


def test_some_combinations_of_every_pair_of_attributes_are_never_trained_on() -> None:
    pairs = data.held_out_pairs()
    assert set(pairs) == set(itertools.combinations(data.NAMES, 2))
    for (a, b), values in pairs.items():
        seen = {(getattr(scene, a), getattr(scene, b)) for scene in data.training_scenes()}
        assert values
        assert not values & seen
        # One more may be unseen on account of two others: an object never upside down, on a ground that only then is.
        assert len(seen) + len(values) >= len(data.ATTRIBUTES[a]) * len(data.ATTRIBUTES[b]) - 1


def test_every_scene_is_either_trained_on_or_held_out_and_says_why() -> None:
    trained, held_out = set(data.training_scenes()), set(data.held_out_scenes())
    assert not trained & held_out
    assert len(trained) + len(held_out) == np.prod(data.SIZES)
    assert not any(data.broken_pairs(scene) for scene in trained)
    assert all(data.broken_pairs(scene) for scene in held_out)


def test_a_caption_holds_the_words_of_every_attribute_that_it_names() -> None:
    for scene in some_scenes(200):
        for template in range(data.FULL_TEMPLATES):
            said = data.caption(scene, template)
            coloured = scene.values["colour"] != data.NO_COLOUR
            assert set(said.words) == set(data.NAMES) - (set() if coloured else {"colour"})
            for name, words in said.words.items():
                assert words == scene.values[name]
                assert Prompt(said.text, words, attribute=name).spans
            assert data.NO_COLOUR not in said.text
            assert "  " not in said.text


def test_short_captions_are_only_for_scenes_at_the_defaults() -> None:
    assert data.caption(a_scene(), data.FULL_TEMPLATES).text == "a red penguin in flat style"
    owl = a_scene(object="owl", colour=data.NO_COLOUR)
    assert data.caption(owl, data.FULL_TEMPLATES).text == "an owl in flat style"
    with pytest.raises(ValueError, match="leaves out"):
        data.caption(a_scene(count="two"), data.FULL_TEMPLATES)


def test_captions_of_different_scenes_differ_within_a_template() -> None:
    for template in range(data.FULL_TEMPLATES):
        scenes = some_scenes(300)
        assert len({data.caption(scene, template).text for scene in scenes}) == len(scenes)


def test_the_same_scene_gives_the_same_pixels_and_every_attribute_changes_them() -> None:
    for scene in some_scenes(20):
        for layout in range(data.layouts(scene)):
            picture = data.render(scene, layout)
            assert picture.shape == (64, 64, 3)
            assert np.array_equal(picture, data.render(scene, layout))
        for name, size in zip(data.NAMES, data.SIZES, strict=True):
            changed = scene.change(name, (getattr(scene, name) + 1) % size)
            assert np.abs(data.render(changed).astype(int) - data.render(scene)).max() > 8, (scene.values, name)


def test_a_pose_is_a_quarter_turn() -> None:
    for scene in some_scenes(20):
        upright = a_scene(**scene.values | {"style": "flat style", "count": "one", "pose": "upright"})
        for turns, pose in enumerate(data.ATTRIBUTES["pose"]):
            turned = upright.change("pose", data.ATTRIBUTES["pose"].index(pose))
            assert np.array_equal(data.render(turned), np.rot90(data.render(upright), turns))


def drawn(scene: data.Scene) -> np.ndarray:
    side = 48 if scene.values["count"] == "one" else 32
    return data._sprite(scene.object, scene.style, scene.colour, scene.pose, side)


def beside(plane: np.ndarray) -> list[np.ndarray]:
    """The four neighbours of every pixel that has four; the margin of a sprite is empty."""
    return [np.roll(plane, step, axis) for axis in (0, 1) for step in (1, -1)]


def ends_here(sprite: np.ndarray) -> np.ndarray:
    """Pixels that cover two thirds more than one beside them."""
    alpha: np.ndarray = sprite[..., 3]
    return alpha - np.min(beside(alpha), axis=0) > 0.67


def is_even_here(sprite: np.ndarray) -> np.ndarray:
    """Drawn pixels whose neighbours are drawn and as light as they."""
    alpha, light = sprite[..., 3], sprite[..., :3] @ data.LUMINANCE * sprite[..., 3]
    steps = np.max([np.abs(light - other) for other in beside(light)], axis=0)
    return (alpha > 0.999) & (np.min(beside(alpha), axis=0) > 0.999) & (steps < 0.11)


def test_styles_do_what_they_say() -> None:
    for scene in some_scenes(20):
        flat, outline, mosaic, striped = (drawn(scene.change("style", i)) for i in range(4))
        edge, even = ends_here(flat), is_even_here(flat)
        tint = data.TINTS.get(scene.values["colour"])
        ink = data.NATURAL_INK if tint is None else np.asarray(tint, np.float32) / 255 * np.float32(0.7)
        assert edge.any()
        np.testing.assert_allclose(outline[edge][:, :3], np.broadcast_to(ink, (edge.sum(), 3)), atol=1e-6)
        np.testing.assert_allclose(outline[even][:, :3], 1 - 0.2 * (1 - flat[even][:, :3]), atol=1e-6)
        assert np.array_equal(outline[..., 3], flat[..., 3])
        assert np.array_equal(striped[..., 3], flat[..., 3])
        tiles = mosaic.reshape(len(mosaic) // 4, 4, len(mosaic) // 4, 4, 4)
        assert np.array_equal(tiles, np.broadcast_to(tiles[:, :1, :, :1], tiles.shape))
        assert set(np.unique(mosaic[..., 3])) == {0, 1}
        light = np.arange(len(flat)) // 4 % 2 == 0
        assert (striped[light] >= flat[light] - 1e-6).all()
        assert (striped[~light] <= flat[~light] + 1e-6).all()


def test_a_tint_leaves_one_hue() -> None:
    for scene in some_scenes(20):
        on_snow = a_scene(**scene.values | {"background": "snow", "colour": "blue"})
        picture = data.render(on_snow).astype(int)
        drawn = np.abs(picture - picture[0, 0]).sum(-1) > 60
        assert (picture[drawn][:, 2] >= picture[drawn][:, 0]).all()


def test_the_atlas_has_every_sprite_and_says_whose_they_are() -> None:
    table = json.loads((data.HERE / "atlas.json").read_text())
    assert table["credit"]["license"] == "CC-BY-4.0"
    assert table["credit"]["author"]
    assert table["credit"]["license_url"].startswith("https://")
    for obj, style in itertools.product(range(data.SIZES[0]), range(data.SIZES[1])):
        for side in (48, 32):
            sprite = data._sprite(obj, style, 0, 0, side)
            assert sprite.shape == (side, side, 4)
            assert 0.05 < sprite[..., 3].mean() < 0.95


def test_merges_make_each_word_one_piece() -> None:
    words = ["carrot", "rose", "art", "a"]
    merges = learn_merges(words)
    pieces = {"".join(pair) for pair in merges}
    assert {"carrot</w>", "rose</w>", "art</w>"} <= pieces


def test_caption_words_are_single_tokens_and_unknown_words_fall_to_pieces(tmp_path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = build_tokenizer(tmp_path)
    texts = list(data.corpus())[::97]
    encoded = tokenizer(texts)["input_ids"]
    assert max(map(len, encoded)) <= MAX_LENGTH
    for text, ids in zip(texts, encoded, strict=True):
        assert len(ids) == len(text.replace(",", " ,").replace(":", " :").split()) + 2
    committed = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    text = "A Zebra, two red ice cream: émeu"
    assert tokenizer(text)["input_ids"] == committed(text)["input_ids"]
    tokens = Prompt("a photo of a red zebra in flat style", "zebra").tokenize(committed)
    assert len(tokens.subject) > 1
    assert "".join(tokens.tokens[i] for i in tokens.subject) == "zebra"
    padded = committed("", padding="max_length", max_length=MAX_LENGTH)["input_ids"]
    assert padded == [committed.bos_token_id] + [committed.eos_token_id] * (MAX_LENGTH - 1)
