"""The words that hearing knows."""

import json

import count_words


def test_words_are_counted_over_all_turns_and_spoken_ones_more(tmp_path, monkeypatch) -> None:
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "It\u2019s a fowl."}]}]}
    chat["messages"].append({"role": "assistant", "content": "A 'fowl' - is it?"})
    clip = {
        "messages": [{"role": "user", "content": [{"type": "audio", "path": "a"}, {"type": "text", "text": "Say."}]}]
    }
    picture = {"role": "user", "content": [{"type": "image", "path": "a"}, {"type": "text", "text": "Read it."}]}
    picture = {"messages": [picture, {"role": "assistant", "content": "cat\ndog"}]}
    for name in count_words.SOURCES:
        rows = {"text": [chat, {"text": "Plain fowl"}], "game": [clip], "words": [picture]}.get(name, [])
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(count_words, "DATA", tmp_path)
    count_words.main()
    found = json.loads((tmp_path / "words.json").read_text())
    assert found == {"a": 2, "cat": 2, "dog": 2, "fowl": 3, "say": 5}
