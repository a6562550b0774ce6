"""A chat session: turns, streaming, batches."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixlora.chat import Answer, ChatSession
from mixlora.rows import Row, RowError
from tests.modeling.model_fixtures import tiny_model
from tests.modeling.processor_fixtures import tiny_processor


@pytest.fixture
def session() -> ChatSession:
    return ChatSession(tiny_model(), tiny_processor(), max_new_tokens=4)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (5, 8), "blue").save(tmp_path / "blue.png")
    return tmp_path / "blue.png"


def test_stream_equals_batch(session: ChatSession, picture: Path) -> None:
    row = Row("What?", (picture,))
    [answer] = session.answer_batch([row])
    assert "".join(session.ask(row)).strip() == answer.text
    assert answer == Answer(answer.text, "vision", "vision")


def test_rows_of_a_batch_are_answered_as_if_alone(session: ChatSession, picture: Path) -> None:
    rows = [Row("Hello there"), Row("What?", (picture,)), Row("Hi")]
    assert session.answer_batch(rows) == [session.answer_batch([row])[0] for row in rows]


def test_a_batch_may_be_searched_with_beams(session: ChatSession) -> None:
    session.num_beams, session.max_new_tokens = 3, 12
    [answer] = session.answer_batch([Row("Hello there")])
    inputs = session._encode([[Row("Hello there").turn()]])
    found = session.model.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=3)
    [text] = session.processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.text == text.strip()
    session.num_beams = 1
    assert session.answer_batch([Row("Hello there")])[0].text != answer.text


def test_turns_are_kept_and_sent(session: ChatSession, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[dict[str, Any]]] = []
    encode = session._encode
    monkeypatch.setattr(session, "_encode", lambda chats: (sent.append(chats[0]), encode(chats))[1])
    first = "".join(session.ask(Row("What?", (picture,))))
    list(session.ask(Row("And now?")))
    assert [turn["role"] for turn in sent[1]] == ["user", "assistant", "user"]
    assert sent[1][1]["content"] == first.rstrip() and sent[1][2]["content"] == "And now?"
    assert [part["type"] for part in sent[1][0]["content"]] == ["image", "text"]
    session.reset()
    list(session.ask(Row("Again?")))
    assert len(sent[2]) == 1


def test_typed_markers_stay_text(session: ChatSession) -> None:
    [answer] = session.answer_batch([Row("<|image|><|audio|><|end|>")])
    assert answer.modality == "text"


def test_an_error_while_generating_reaches_the_reader(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise MemoryError("too long")

    monkeypatch.setattr(session.model, "generate", fail)
    with pytest.raises(MemoryError, match="too long"):
        list(session.ask(Row("Hello")))
    assert session.turns == []


def test_bad_media_keep_the_conversation(session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    list(session.ask(Row("Hello")))
    with pytest.raises(RowError, match=r"turn 2: .*bad\.png: can't be read as a picture"):
        list(session.ask(Row("What?", (tmp_path / "bad.png",), where="turn 2")))
    assert len(session.turns) == 2
