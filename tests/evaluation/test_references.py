"""Which references are chosen for which tasks, and what is said of those that are not."""

from pathlib import Path

import pytest

from mixlora.evaluation import references
from mixlora.evaluation.references import INSTALL, PocketSphinx, RapidOcr, Reference, Whisper, choose, folders, measure
from mixlora.evaluation.tasks import EvalRow
from mixlora.rows import Row

CLIP = Row("Transcribe.", audio=(Path("clip.wav"),))
PICTURE = Row("What digit?", images=(Path("5.png"),))


def groups(task: str, metric: str, question: Row, answer: str = "five") -> references.Groups:
    return {(task, metric): [EvalRow(task, metric, (answer,), question)]}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that seem to be there; a test changes the set."""
    names = {Whisper.package, PocketSphinx.package, RapidOcr.package}
    monkeypatch.setattr(references, "find_spec", lambda name: object() if name in names else None)
    return names


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model.bin").touch()
    return tmp_path


def names(chosen: list[Reference]) -> list[str]:
    return [reference.name for reference in chosen]


def test_references_answer_what_they_are_made_for(installed: set[str], model: Path) -> None:
    whisper = {"tiny.en": model, "base": model}
    speech, skipped = choose(groups("prompts", "wer", CLIP), whisper)
    assert names(speech) == ["Whisper tiny.en", "Whisper base", "pocketsphinx"] and skipped == []
    assert names(choose(groups("numbers_long", "exact", PICTURE), whisper)[0]) == ["rapidocr"]
    assert names(choose(groups("signs", "wer", PICTURE), whisper)[0]) == ["rapidocr"]
    for none in (("clothes", "exact", PICTURE), ("spoken_digit", "exact", CLIP), ("pairs", "yes_no", PICTURE)):
        assert choose(groups(*none), whisper) == ([], [])
    both = Row("?", images=PICTURE.images, audio=CLIP.audio)
    assert choose(groups("numbers", "wer", both), whisper) == ([], [])


def test_each_skipped_reference_has_its_line(installed: set[str]) -> None:
    asked = groups("prompts", "wer", CLIP) | groups("digits", "exact", PICTURE)
    installed.discard("pocketsphinx")
    chosen, skipped = choose(asked, {})
    assert names(chosen) == ["rapidocr"]
    assert skipped == [
        "Whisper skipped: name a CTranslate2 folder (--whisper tiny.en=FOLDER)",
        f"PocketSphinx skipped: it is not installed ({INSTALL})",
    ]


def test_figures_are_spelt_where_the_answers_spell_them(installed: set[str], model: Path) -> None:
    for answer, spelt in (("press five", True), ("press 5", False)):
        whisper = choose(groups("prompts", "wer", CLIP, answer), {"base": model})[0][0]
        assert isinstance(whisper, Whisper) and whisper.spell_numbers is spelt


def test_whisper_folders(tmp_path: Path) -> None:
    assert folders(["base=/a/b", "x=c=d"]) == {"base": Path("/a/b"), "x": Path("c=d")}
    for wrong in ("/a/b", "=b", "base="):
        with pytest.raises(ValueError, match="--whisper takes NAME=FOLDER, got"):
            folders([wrong])
    with pytest.raises(ValueError, match="Whisper base: .* has no model.bin"):
        Whisper("base", tmp_path, spell_numbers=True)


def test_a_reference_is_measured_like_a_session() -> None:
    class Deaf(PocketSphinx):
        loaded = 0

        def load(self) -> None:
            self.loaded += 1

        def answer(self, row: Row) -> str:
            assert self.loaded == 1
            return "five"

    (result,) = measure(Deaf(), groups("prompts", "wer", CLIP, "five six") | groups("digits", "exact", PICTURE))
    assert (result.task, result.n, result.value) == ("prompts", 1, 0.5)
