"""Questions about scenes: about what is there as often as about what is not."""

from collections import Counter

import prepare_scenes
import pytest
from common import chat_row
from prepare_scenes import QUESTIONS_EACH, there_question, there_rows

THINGS = {"bee": (0, "honeybee"), "cat": (1, "cat"), "owl": (2, "owl"), "ant": (0, "ant"), "dog": (1, "dog")}


@pytest.fixture(autouse=True)
def things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_scenes, "scene_things", lambda: THINGS)
    monkeypatch.setattr(prepare_scenes, "emoji_split", lambda: {"train": ["honeybee", "cat", "fire-engine", "anvil"]})


def test_questions_are_true_and_half_say_yes() -> None:
    scenes = {"0.png": ["honeybee", "cat"], "1.png": ["fire engine"]}
    named = [chat_row("scene_names", "\n".join(shown), "?", images=[path]) for path, shown in scenes.items()]
    rows = [row["messages"] for row in there_rows(named * 20)]
    assert len(rows) == 2 * 20 * QUESTIONS_EACH
    assert Counter(told["content"] for _, told in rows) == {"yes": len(rows) // 2, "no": len(rows) // 2}
    for asked, told in rows:
        picture, question = asked["content"]
        shown = ["bee" if name == "honeybee" else name for name in scenes[picture["path"]]]
        text = question["text"].removesuffix("?").removeprefix("Is this in the picture: ")
        name = text.removeprefix("Is there an ").removeprefix("Is there a ")
        assert (name in shown) == (told["content"] == "yes"), question
        if picture["path"] == "0.png" and told["content"] == "no":
            assert name in ("ant", "dog")  # of the group of something that is there
    assert sum(asked["content"][1]["text"].startswith("Is this in") for asked, _ in rows) == len(rows) // 3


def test_names_of_several_things_have_no_article() -> None:
    assert [there_question(name) for name in ("owl", "dog", "grapes", "broccoli")] == [
        "Is there an owl?", "Is there a dog?", "Are there grapes?", "Is there broccoli?"
    ]  # fmt: skip
