"""How the game's lines are cleaned and split."""

import pytest
from game_archive import HERO, Line
from prepare_game import (
    HELD_OUT_CHARACTERS,
    HELD_OUT_SIZE,
    SCENE_SHARE,
    held_out_characters,
    held_out_scenes,
    is_speech,
    known_words,
    part_of,
    tidy,
)

KNOWN = frozenset("that guy is a joe thanks uh well i of where it".split())


@pytest.mark.parametrize(
    ("written", "heard"),
    [
        ('It\'s "The Great Escape".', "It's The Great Escape."),
        ("Well, well... if it isn't Joseph King.", "Well, well, if it isn't Joseph King."),
        ("Sparky... That guy is a CROOK!!!", "Sparky. That guy is a crook!"),
        ("...twice!", "twice!"),
        ("What?!", "What?"),
        ("Yeah, ID.", "Yeah, ID."),
        ("the Treatment^_.", "the Treatment."),
    ],
)
def test_tidy(written: str, heard: str) -> None:
    assert tidy(written, frozenset({"crook"})) == heard


@pytest.mark.parametrize("text", ["That guy is a joe.", "That guy's a Joe.", "Well, where is Azura?"])
def test_speech_is_kept(text: str) -> None:
    assert is_speech(text, KNOWN)


@pytest.mark.parametrize(
    "text",
    ["Ha ha ha!", "Grrrrr!", "Chunga warunga!", "Well, ungh!", "It is 19:00", "<koff>", "&#($!!, it is", "", "!"],
)
def test_noise_and_signs_are_not_speech(text: str) -> None:
    assert not is_speech(text, KNOWN | {"ha", "grrrrr", "ungh"}), text


def lines(character: str, count: int) -> list[Line]:
    """Lines of a character and as many of the hero's, over two dialogues."""
    return [
        Line(f"{character}{index}{who}", f"{character}{index % 2 + 1}.DOG", who, "Hello.")
        for index in range(count)
        for who in (character, HERO)
    ]


def test_held_out_characters_have_the_right_size_and_are_drawn_alike() -> None:
    spoken = [line for index in range(20) for line in lines(f"C{chr(65 + index)}", HELD_OUT_SIZE.start + index)]
    spoken += lines("SMALL", HELD_OUT_SIZE.start - 1) + lines("LARGE", HELD_OUT_SIZE.stop)
    drawn = held_out_characters(spoken)
    assert len(drawn) == HELD_OUT_CHARACTERS and drawn == held_out_characters(spoken[::-1])
    assert not drawn & {HERO, "SMALL", "LARGE"}


def test_a_share_of_the_scenes_is_held_out() -> None:
    spoken = [Line(f"C{index}", f"C{index:03d}.CUT", f"C{index:03d}", "Hello.") for index in range(100)]
    assert len(held_out_scenes(spoken + lines("APE", 3))) == round(100 * SCENE_SHARE)


def test_all_dialogues_of_a_held_out_character_leave_training() -> None:
    held = ({"APE"}, {"C1A.CUT"})
    assert part_of(Line("x", "APE2.DOG", "APE", ""), *held) == "game_voices"
    assert part_of(Line("x", "APE.DOG", "JOE", ""), *held) == "game_joe"
    assert part_of(Line("x", "C1A.CUT", "C1A", ""), *held) == "game_scenes"
    for source in ("BOB1.DOG", "C1B.CUT", "QUEEN2.JAS"):
        assert part_of(Line("x", source, "JOE", ""), *held) == "game", source


def test_a_strange_word_counts_where_three_files_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "prepare_game.wordnet_entries", lambda: iter([("noun", "cat", "a small animal", ["the cat sat"])])
    )
    spoken = [
        Line("x", source, "JOE", f"Yeah {word}")
        for source, word in zip("ABCA", ("hup",) * 2 + ("no",) * 2, strict=True)
    ]
    assert known_words(spoken) == {"cat", "a", "small", "animal", "the", "sat", "yeah"}
