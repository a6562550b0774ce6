"""Systems that others made, measured on the same files; each needs a package of the extra `references`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from mixlora.evaluation.run import Result, evaluate
from mixlora.evaluation.tasks import EvalRow
from mixlora.modeling.audio_processing_mixlora import RATE, load_clip
from mixlora.modeling.image_processing_mixlora import load_picture
from mixlora.rows import Row

Groups = dict[tuple[str, str], list[EvalRow]]
INSTALL = "pip install 'mixlora-multimodal[references]'"


@dataclass(frozen=True)
class Said:
    """An answer, as `evaluate` reads it."""

    text: str


class Reference(ABC):
    """A system that answers some tasks, once it is loaded."""

    name: str
    package: str
    """What it imports."""

    @classmethod
    @abstractmethod
    def applies(cls, task: str, metric: str, rows: Sequence[EvalRow]) -> bool:
        """Whether the task asks for what the system does, in every row."""

    @abstractmethod
    def load(self) -> None:
        """Loads what `answer` needs; apart from it, so that seconds per row count answers alone."""

    @abstractmethod
    def answer(self, row: Row) -> str:
        """The system's answer to a row that it applies to."""

    def answer_batch(self, rows: list[Row]) -> list[Said]:
        """One answer a row, so that a reference is measured as a chat session is."""
        return [Said(self.answer(row)) for row in rows]


class Transcriber(Reference):
    """A system that writes down what one clip says."""

    @classmethod
    def applies(cls, task: str, metric: str, rows: Sequence[EvalRow]) -> bool:
        return metric == "wer" and all(len(row.question.audio) == 1 and not row.question.images for row in rows)

    @staticmethod
    def samples(row: Row) -> np.ndarray:
        """float32 `[n]` at 16 kHz, as our own model gets them."""
        return load_clip(row.audio[0], where=f"{row.where}: {row.audio[0]}")


class Whisper(Transcriber):
    """Whisper by faster-whisper, from a CTranslate2 folder; the beam of five is the package's default."""

    package = "faster_whisper"

    def __init__(self, size: str, folder: Path, spell_numbers: bool) -> None:
        """
        Args:
            size: what the report calls it. folder: holds model.bin, config.json and the vocabulary.
            spell_numbers: never write figures, where the expected transcripts hold none.
        """
        if not (folder / "model.bin").is_file():
            raise ValueError(f"Whisper {size}: {folder} is no CTranslate2 folder: it has no model.bin")
        self.name, self.folder, self.spell_numbers = f"Whisper {size}", folder, spell_numbers

    def load(self) -> None:
        from faster_whisper import WhisperModel

        self.model = WhisperModel(str(self.folder), local_files_only=True)
        self.suppressed = self._suppressed()

    def _suppressed(self) -> list[int]:
        """Token ids that are never said; -1 stands for Whisper's own list."""
        vocabulary = self.model.hf_tokenizer.get_vocab() if self.spell_numbers else {}
        written = (number for token, number in vocabulary.items() if not token.startswith("<|") and _has_figure(token))
        return [-1, *sorted(written)]

    def answer(self, row: Row) -> str:
        # One temperature: the others, tried after a poor result, are sampled and would change from run to run.
        options = {"language": "en", "temperature": 0.0, "suppress_tokens": self.suppressed}
        segments, _ = self.model.transcribe(self.samples(row), **options)
        return " ".join(segment.text.strip() for segment in segments)


class PocketSphinx(Transcriber):
    """PocketSphinx with the English model and language model that its package holds."""

    name = package = "pocketsphinx"

    def load(self) -> None:
        from pocketsphinx import Decoder

        self.decoder = Decoder(samprate=RATE, loglevel="FATAL")

    def answer(self, row: Row) -> str:
        pcm = (self.samples(row).clip(-1, 1) * 32767).astype("int16")
        self.decoder.start_utt()
        self.decoder.process_raw(pcm.tobytes(), full_utt=True)
        self.decoder.end_utt()
        found = self.decoder.hyp()
        return found.hypstr if found else ""


class RapidOcr(Reference):
    """RapidOCR with the models that its package holds."""

    name, package = "rapidocr", "rapidocr_onnxruntime"
    tasks = ("digits", "numbers", "words")
    """Tasks of one picture to be read begin so; what another picture shows is no matter of reading."""

    @classmethod
    def applies(cls, task: str, metric: str, rows: Sequence[EvalRow]) -> bool:
        one_picture = all(len(row.question.images) == 1 and not row.question.audio for row in rows)
        return one_picture and (metric == "wer" or (metric == "exact" and task.startswith(cls.tasks)))

    def load(self) -> None:
        from rapidocr_onnxruntime import RapidOCR

        self.engine = RapidOCR()

    def answer(self, row: Row) -> str:
        picture = load_picture(row.images[0], where=f"{row.where}: {row.images[0]}")
        lines, _ = self.engine(np.asarray(picture)[..., ::-1])  # [h, w, 3], blue first
        return " ".join(text for *_, text, _ in lines or [])


def folders(named: Sequence[str]) -> dict[str, Path]:
    """Name -> folder, of texts `NAME=FOLDER`.

    Raises:
        ValueError: a text of another form.
    """
    found = {}
    for text in named:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise ValueError(f"--whisper takes NAME=FOLDER, got {text!r}")
        found[name] = Path(folder).expanduser()
    return found


def choose(groups: Groups, whisper: Mapping[str, Path]) -> tuple[list[Reference], list[str]]:
    """The references that are at hand and apply to any of the groups, and a line for each that is skipped.

    Args:
        whisper: size -> CTranslate2 folder.

    Raises:
        ValueError: a folder without a model.
    """
    chosen: list[Reference] = []
    skipped: list[str] = []
    kinds: tuple[type[Reference], ...] = (Whisper, PocketSphinx, RapidOcr)
    for kind in kinds:
        if not any(kind.applies(*key, rows) for key, rows in groups.items()):
            continue
        if find_spec(kind.package) is None:
            skipped.append(f"{kind.__name__} skipped: it is not installed ({INSTALL})")
        elif kind is not Whisper:
            chosen.append(kind())
        elif whisper:
            spell = not any(_has_figure(text) for rows in groups.values() for row in rows for text in row.answers)
            chosen += [Whisper(size, folder, spell) for size, folder in whisper.items()]
        else:
            skipped.append("Whisper skipped: name a CTranslate2 folder (--whisper tiny.en=FOLDER)")
    return chosen, skipped


def measure(reference: Reference, groups: Groups) -> Iterable[Result]:
    """The results of a reference on the groups that it applies to."""
    reference.load()
    return evaluate(reference, {key: rows for key, rows in groups.items() if reference.applies(*key, rows)})


def _has_figure(text: str) -> bool:
    return any(char.isdigit() for char in text)
