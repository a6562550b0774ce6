"""The words that hearing knows."""

import json

import count_words


def test_words_are_counted_over_all_turns_beside_a_dictionary(tmp_path, monkeypatch) -> None:
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
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    for part, words in {
        "noun": ["  1 a licence", "dog n 1", "fox n 2", "'hood n 1", "hot_dog n 1"],
        "verb": ["fox v 1"],
    }.items():
        (folder / f"index.{part}").write_text("\n".join(words))
    for part in ("adj", "adv"):
        (folder / f"index.{part}").write_text("it r 1")
    monkeypatch.setattr(count_words, "package", lambda name: {"wordnet-base": tmp_path}[name])
    monkeypatch.setattr(count_words, "DATA", tmp_path)
    count_words.main()
    found = json.loads((tmp_path / "words.json").read_text())
    assert found == {"a": 2, "cat": 2, "dog": 2, "fowl": 3, "fox": 1, "say": 5}
