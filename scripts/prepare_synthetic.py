"""Write build/data/synthetic_more.jsonl: sentences of the game and of WordNet in the voices of several synthesisers.

Run: python scripts/prepare_synthetic.py     (after scripts/fetch.py; needs onnxruntime for hibari's voice)
Clips go to build/data/speech/synthetic_more/. A killed run goes on where it was.
"""

from __future__ import annotations

import random

from audio_files import Utterance, clip_name, synthesise_all, training_voices
from common import DATA, SEED, TRANSCRIBE_PROMPTS, chat_row, plain, run_main, sentence, write_jsonl
from prepare_game import held_out_texts, train_texts
from prepare_speech import held_out_prompt_texts, relative, spoken_examples

SENTENCES = 8000
GAME_SHARE = 0.4
"""Share of the sentences that the game's training clips say; the others are WordNet's examples."""
LONGEST = 12
"""Words in an example."""
STRETCHES = (0.85, 1.0, 1.15)


def sentences(count: int, rng: random.Random) -> list[str]:
    """That many different sentences in a drawn order; no held-out text is among them."""
    held = held_out_texts() | held_out_prompt_texts()
    spoken = {plain(text): text for text in train_texts()}
    examples = {plain(text): sentence(text) for text in spoken_examples(LONGEST)}
    from_game = rng.sample(sorted(spoken.keys() - held), round(GAME_SHARE * count))
    from_wordnet = rng.sample(sorted(examples.keys() - spoken.keys() - held), count - len(from_game))
    chosen = [spoken[key] for key in from_game] + [examples[key] for key in from_wordnet]
    rng.shuffle(chosen)
    return chosen


def utterances(texts: list[str], rng: random.Random) -> list[Utterance]:
    """A voice for each text: the engines take turns, and in each engine its voices do."""
    engines = list(training_voices().values())
    spoken: list[Utterance] = []
    for serial, text in enumerate(texts):
        voices = engines[serial % len(engines)]
        voice, stretch = voices[serial // len(engines) % len(voices)], rng.choice(STRETCHES)
        spoken.append((voice, text, stretch, DATA / "speech/synthetic_more" / clip_name(voice, text, stretch)))
    return spoken


def main() -> None:
    """Speak the sentences and write their rows."""
    rng = random.Random(SEED)
    spoken = utterances(sentences(SENTENCES, rng), rng)
    synthesise_all(spoken, "synthetic sentences of several engines")
    rows = [
        chat_row("transcribe", text, rng.choice(TRANSCRIBE_PROMPTS), audio=[relative(path)])
        for _, text, _, path in spoken
    ]
    write_jsonl(DATA / "synthetic_more.jsonl", rows)


if __name__ == "__main__":
    run_main(main)
