"""Takes the pictures of the demo page for its documentation, in headless Chromium.

python scripts/screenshots.py [--output docs/demo] [--chromium PATH]

The page answers from the embedded checkpoint; a clip of its samples is what the browser's false microphone hears.
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import soundfile
from playwright.sync_api import Page, expect, sync_playwright

import mixlora
from mixlora.chat import ChatSession
from mixlora.demo.run import Demo

SAMPLES = Path(mixlora.default_checkpoint()) / "samples"
WAIT = 60_000
"""Milliseconds."""


def ask(page: Page, text: str, *names: str) -> None:
    """Sends a question with samples, and waits for the end of its answer."""
    before = page.get_by_role("button", name=re.compile(r" tokens · [0-9.]+ s")).count()
    if names:
        page.locator("#message input[type=file]").first.set_input_files([str(SAMPLES / name) for name in names])
        expect(page.get_by_role("button", name="Remove file")).to_have_count(len(names), timeout=WAIT)
    page.get_by_role("textbox", name="Message").fill(text)
    page.get_by_role("textbox", name="Message").press("Enter")
    answered(page, before + 1)


def answered(page: Page, count: int) -> None:
    """Waits until so many answers are whole."""
    badges = page.get_by_role("button", name=re.compile(r" tokens · [0-9.]+ s"))
    expect(badges).to_have_count(count, timeout=WAIT)
    expect(page.get_by_role("button", name="Submit")).to_be_visible(timeout=WAIT)
    page.wait_for_timeout(1000)  # scrolled to its end


def at_a_desk(page: Page, output: Path) -> None:
    """A conversation with a spoken question, and the look inside its last answer."""
    ask(page, "Who are you?")
    ask(page, "What digit is this?", "five.png")
    page.get_by_role("button", name="Record audio").click()
    page.get_by_role("button", name="Start recording").click()
    page.get_by_role("button", name="Stop recording").wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=output / "recording.png")
    page.get_by_role("button", name="Stop recording").click()
    page.get_by_role("button", name="Attach audio").click()
    expect(page.get_by_role("button", name="Remove file")).to_have_count(1, timeout=WAIT)
    page.get_by_role("button", name="Submit").click()
    answered(page, 3)
    ask(page, "Is this what I say?", "seven.png", "seven.flac")
    page.screenshot(path=output / "chat.png")
    page.get_by_role("tab", name="Look inside").click()
    expect(page.get_by_text("80 mels").first).to_be_visible(timeout=WAIT)
    page.wait_for_timeout(1000)
    page.screenshot(path=output / "inside.png", full_page=True)


def on_a_phone(page: Page, output: Path) -> None:
    """A picture that is asked about by voice."""
    ask(page, "", "seven.png", "seven.flac")
    page.screenshot(path=output / "phone.png")


def main() -> None:
    """Opens the page twice, as two visitors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/demo"))
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser"))
    args = parser.parse_args()
    output = args.output.resolve()  # the page works in a folder of its own
    output.mkdir(parents=True, exist_ok=True)
    session = ChatSession.from_pretrained(mixlora.default_checkpoint())
    demo = Demo(session.model, session.processor, SAMPLES)
    views: list[tuple[Any, dict[str, Any]]] = [
        (at_a_desk, {"viewport": {"width": 1000, "height": 900}}),
        (on_a_phone, {"viewport": {"width": 390, "height": 800}, "color_scheme": "dark", "has_touch": True}),
    ]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        heard = Path(folder, "heard.wav")
        soundfile.write(heard, *soundfile.read(SAMPLES / "seven.flac"))
        flags = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        browser = playwright.chromium.launch(
            executable_path=args.chromium, args=[*flags, f"--use-file-for-fake-audio-capture={heard}"]
        )
        for show, options in views:
            page = browser.new_context(permissions=["microphone"], **options).new_page()
            page.set_default_timeout(WAIT)
            page.goto(demo.address)
            page.get_by_role("textbox", name="Message").wait_for()
            show(page, output)
        browser.close()
    demo.close()


if __name__ == "__main__":
    main()
