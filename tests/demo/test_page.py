"""The page in a headless browser, on the embedded checkpoint: what a visitor does, and what must not happen."""

import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import mixlora

pytest.importorskip("gradio", reason="needs the extra `demo`")
pytest.importorskip("playwright", reason="needs playwright")

from playwright.sync_api import Page, expect, sync_playwright

from mixlora.chat import ChatSession
from mixlora.demo.chat import DemoLimits
from mixlora.demo.run import Demo
from mixlora.modeling.audio_processing_mixlora import load_clip
from mixlora.serving.media import MediaLimits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
SAMPLES = Path(mixlora.default_checkpoint()) / "samples"
WAIT = 120_000  # milliseconds; a busy machine is slow
# a recording has 96 kB a second, and lasts as long as a busy machine takes to press its button
LIMITS = DemoLimits(media=MediaLimits(bytes=2_000_000, seconds=20.0, items=8, text=2000), tokens=512)


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    session = ChatSession.from_pretrained(mixlora.default_checkpoint())
    running = Demo(session.model, session.processor, SAMPLES, limits=LIMITS)
    yield running
    running.close()
    assert not running.folders.root.exists()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the browser's false microphone hears."""
    samples, rate = soundfile.read(SAMPLES / "seven.flac")
    path = tmp_path_factory.mktemp("spoken") / "seven.wav"
    soundfile.write(path, np.concatenate([samples, np.zeros(rate)]), rate, subtype="PCM_16")  # again and again
    return path


@pytest.fixture(scope="module")
def browser(spoken: Path) -> Iterator[Any]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                *("--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),
                f"--use-file-for-fake-audio-capture={spoken}",
            ],
        )
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any, demo: Demo) -> Iterator[Callable[..., Page]]:
    """Opens the page as a new visitor; nothing may be asked of another server."""
    contexts: list[Any] = []
    elsewhere: list[str] = []

    def opened(**options: Any) -> Page:
        context = browser.new_context(permissions=["microphone"], **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(demo.address)
        page.get_by_role("textbox", name="Message").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in elsewhere if not url.startswith((demo.address, "data:", "blob:"))] == []


@pytest.fixture
def endless(demo: Demo) -> Iterator[None]:
    """Answers that don't end by themselves."""
    end = demo.engine.model.generation_config.eos_token_id
    demo.engine._scheduler.suppressed.append(end)
    yield
    demo.engine._scheduler.suppressed.remove(end)


def box(page: Page) -> Any:
    """Where a message is typed."""
    return page.get_by_role("textbox", name="Message")


def attach(page: Page, *files: Path | dict[str, Any]) -> None:
    """Adds files to the message."""
    page.locator("#message input[type=file]").first.set_input_files(
        [f if isinstance(f, dict) else str(f) for f in files]
    )
    expect(page.get_by_role("button", name="Remove file")).to_have_count(len(files), timeout=WAIT)


def ask(page: Page, text: str, *files: Path) -> None:
    """Sends a question."""
    if files:
        attach(page, *files)
    box(page).fill(text)
    box(page).press("Enter")


def badges(page: Page, count: int) -> list[str]:
    """The badges of the answers, once there are so many and the next question can be asked."""
    found = page.get_by_role("button", name=re.compile(r" tokens · [0-9.]+ s"))
    expect(found).to_have_count(count, timeout=WAIT)
    expect(page.get_by_role("button", name="Submit")).to_be_visible(timeout=WAIT)
    return [name for name in found.all_inner_texts() if name.strip()]


def answers(page: Page) -> str:
    """All that stands in the conversation."""
    return page.get_by_role("log").inner_text()


def running(demo: Demo) -> int:
    figures = demo.engine.snapshot()
    return figures["running"] + figures["reading"] + figures["waiting"]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    for _ in range(int(WAIT / 100)):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError(what)


def test_text_a_picture_and_a_voice(visit: Callable[..., Page]) -> None:
    """Each answer's badge tells its route, and the look inside shows what the towers got."""
    page = visit()
    ask(page, "Who are you?")
    assert "text · no adapter · " in badges(page, 1)[0] and "I am MixLora" in answers(page)
    ask(page, "What digit is this?", SAMPLES / "five.png")
    assert "vision · adapter vision · " in badges(page, 2)[1]
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text("Ask something")).to_be_visible(timeout=WAIT)
    ask(page, "Is this what I say?", SAMPLES / "three.png", SAMPLES / "four.flac")
    assert "vision and speech · adapter vision · " in badges(page, 1)[0]
    assert re.search(r"^no$", answers(page), flags=re.M)
    page.get_by_role("tab", name="Look inside").click()
    for words in ("crop 1, 224 x 224 pixels", "80 mels"):
        expect(page.get_by_text(words).first).to_be_visible(timeout=WAIT)
    for cell in ("vision and speech", "towers and projectors", "picture"):
        expect(page.get_by_role("gridcell", name=cell, exact=True)).to_be_visible(timeout=WAIT)


def record(page: Page, demo: Demo, seconds: float = 2.5) -> Path:
    """Speaks into the microphone; the file that the server got."""
    page.get_by_role("button", name="Record audio").click()
    page.get_by_role("button", name="Start recording").click()
    page.get_by_role("button", name="Stop recording").wait_for()
    page.wait_for_timeout(1000 * seconds)
    page.get_by_role("button", name="Stop recording").click()
    with page.expect_response(re.compile("/upload$")) as uploaded:
        page.get_by_role("button", name="Attach audio").click()
    [recorded] = uploaded.value.json()  # perhaps where an earlier one lies: the same sound has the same path
    assert Path(recorded).is_relative_to(demo.folders.uploads)
    return Path(recorded)


def likeness(recorded: Path, spoken: Path) -> float:
    """The largest correlation of a clip with any part of a recording, 1 for the clip itself."""
    heard, said = (load_clip(path) for path in (recorded, spoken))
    said = said[: int(0.8 * 16_000)]
    energy = np.convolve(heard**2, np.ones(len(said)), "valid").clip(min=1e-9)
    return float((np.correlate(heard, said, "valid") / np.sqrt(energy * (said**2).sum())).max())


def test_a_voice_from_the_microphone(visit: Callable[..., Page], demo: Demo, spoken: Path) -> None:
    """A question that is only spoken, and one that is spoken beside a picture."""
    page = visit()
    assert likeness(record(page, demo), spoken) > 0.5, "what was spoken is what arrived"  # the browser filters noise
    page.get_by_role("button", name="Submit").click()
    assert "speech · adapter speech · " in badges(page, 1)[0] and "vision" not in badges(page, 1)[0]
    attach(page, SAMPLES / "seven.png")
    record(page, demo)
    expect(page.get_by_role("button", name="Remove file")).to_have_count(2, timeout=WAIT)
    page.get_by_role("button", name="Submit").click()
    assert "vision and speech · adapter vision · " in badges(page, 2)[1]


def test_stop_frees_the_row(visit: Callable[..., Page], demo: Demo, endless: None) -> None:
    page = visit()
    page.get_by_role("button", name="Toggle Sidebar").click()
    page.get_by_role("spinbutton", name="Longest answer").fill("512")
    page.get_by_role("button", name="Toggle Sidebar").click()
    ask(page, "Who are you?")
    wait_until(lambda: running(demo) == 1, "the answer does not begin")
    page.get_by_role("button", name="Stop").click()
    wait_until(lambda: running(demo) == 0, "the stopped answer goes on")
    assert demo.engine.snapshot()["ended"]["text"]["cancelled"] == 1
    expect(page.get_by_role("button", name="Submit")).to_be_visible(timeout=WAIT)


def test_closing_the_page_frees_the_row(visit: Callable[..., Page], demo: Demo, endless: None) -> None:
    page = visit()
    ask(page, "Tell me about you")
    wait_until(lambda: running(demo) == 1, "the answer does not begin")
    page.close()
    wait_until(lambda: running(demo) == 0, "the answer to a closed page goes on")


def test_retry_undo_and_edit(visit: Callable[..., Page]) -> None:
    page = visit()
    ask(page, "Who are you?")
    badges(page, 1)
    page.get_by_role("button", name="Retry").click()
    page.wait_for_timeout(500)
    badges(page, 1)
    page.get_by_role("button", name="Edit").click()
    page.get_by_role("log").get_by_role("textbox").fill("Hello")
    page.get_by_role("button", name="Submit").first.click()
    expect(page.get_by_role("log").get_by_text("Hello", exact=True).first).to_be_visible(timeout=WAIT)
    badges(page, 1)
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_text("Ask something")).to_be_visible(timeout=WAIT)
    expect(box(page)).to_have_value("Hello", timeout=WAIT)


def test_two_visitors_have_their_own_conversations(visit: Callable[..., Page]) -> None:
    first, second = visit(), visit()
    ask(first, "Who are you?")
    ask(second, "What digit is this?", SAMPLES / "five.png")
    assert "no adapter" in badges(first, 1)[0] and "adapter vision" in badges(second, 1)[0]
    assert "What digit" not in answers(first) and "Who are you" not in answers(second)


def test_a_phone_in_the_dark_by_keyboard(visit: Callable[..., Page]) -> None:
    page = visit(viewport={"width": 390, "height": 800}, color_scheme="dark", has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    box(page).focus()
    page.keyboard.type("Who are you?")
    page.keyboard.press("Enter")
    badges(page, 1)


def test_an_example(visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_role("button", name="What digit is this?").click()
    expect(page.get_by_role("button", name="Remove file")).to_have_count(1, timeout=WAIT)
    expect(box(page)).to_have_value("What digit is this?", timeout=WAIT)
    box(page).press("Enter")
    assert "adapter vision" in badges(page, 1)[0]


def test_injected_markup_and_bad_files_stay_harmless(visit: Callable[..., Page]) -> None:
    """Nothing of it is run or loaded; the fixture checks that nothing else was asked."""
    page = visit()
    page.evaluate("window.caught = 0")
    evil = '<img src="https://evil.example/a.png" onerror="window.caught=1"> ![x](https://evil.example/b.png)'
    ask(page, evil)
    badges(page, 1)
    assert evil in answers(page) and page.evaluate("window.caught") == 0
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" onload="window.caught=1"/>'
    attach(page, {"name": "<b>x.svg", "mimeType": "image/svg+xml", "buffer": svg})
    box(page).press("Enter")
    expect(page.get_by_text("not answered")).to_be_visible(timeout=WAIT)
    assert page.evaluate("window.caught") == 0 and "Traceback" not in page.content()
    expect(page.get_by_role("button", name="Share")).to_have_count(0)


def test_a_hundred_visits_leave_nothing(demo: Demo) -> None:
    for _ in range(100):
        with urllib.request.urlopen(demo.address, timeout=30) as answer:
            assert answer.status == 200
    assert running(demo) == 0 and demo.chat._running == {}


def test_programs_may_ask_too(demo: Demo) -> None:
    """Over Gradio's Python client, as the documents say; and a path of the server is not taken from it."""
    client_library = pytest.importorskip("gradio_client")
    client = client_library.Client(demo.address, verbose=False)
    message = {"text": "What digit is this?", "files": [client_library.handle_file(str(SAMPLES / "five.png"))]}
    settings = {"tokens": 20, "temperature": 0, "top_p": 1, "top_k": 0, "seed": 0}
    heard = client.predict(message=message, **settings, api_name="/chat")
    assert "adapter vision" in str(heard)
    for path in ("/etc/hostname", str(demo.folders.root / "temporary"), "http://127.0.0.1:1/a.png"):
        stolen = {"text": "?", "files": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
        try:
            told = str(client.predict(message=stolen, **settings, api_name="/chat"))
        except Exception as error:
            told = str(error)
        assert "tokens ·" not in told, told


def test_files_of_the_machine_are_not_served(demo: Demo) -> None:
    root = demo.folders.root
    (root / "secret.txt").write_text("secret")
    for path in ("/etc/passwd", str(root / "secret.txt"), f"{root}/uploads/../secret.txt", "http://127.0.0.1:1/"):
        request = urllib.request.Request(f"{demo.address}gradio_api/file={path}")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=30)
        assert refused.value.code in (403, 404), path
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(2_400_000)
    request = urllib.request.Request(
        f"{demo.address}gradio_api/upload",
        body + b"\r\n--x--\r\n",
        {"content-type": "multipart/form-data; boundary=x"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 413


def test_another_name_of_this_machine_is_refused(demo: Demo) -> None:
    request = urllib.request.Request(demo.address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 400
    with urllib.request.urlopen(demo.address, timeout=30) as answer:
        assert "connect-src 'self'" in answer.headers["content-security-policy"]
