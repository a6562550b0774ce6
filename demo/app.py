"""The page, in Gradio: layout and events. What a message means is in `chat`, what is shown of it in `inside`."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from mixlora.demo.chat import ChatError, DemoChat
from mixlora.demo.inside import badge, look_inside
from mixlora.demo.plain import show_plain
from mixlora.serving.sampling import Sampling

TITLE = "mixlora"
INTRODUCTION = (
    "Type, drop pictures, or speak. The badge under an answer tells what was seen and which adapter answered."
)
CSS = """
footer, button[aria-label="Share"] { display: none !important } /* sharing would send a picture to another server */
.gallery-item img { image-rendering: pixelated }
/* a clip's waveform lies in the middle of much empty height */
.message .waveform-wrapper { height: 48px !important; overflow: hidden; display: flex; align-items: center }
.message .waveform-wrapper > div { flex: 1 0 100% }
"""
# For those who don't see the page: the chat takes the box's placeholder away, which was its name, and Gradio's
# pictures and buttons of pictures have none.
JS = """() => {
  const name = () => {
    document.querySelector('#message textarea')?.setAttribute('aria-label', 'Message')
    document.querySelectorAll('img:not([alt]), img[alt=""]').forEach(one => one.alt = 'Picture')
    document.querySelectorAll('audio:not([aria-label])').forEach(one => one.setAttribute('aria-label', 'Clip'))
    document.querySelectorAll('button:not([aria-label]), button[data-named]').forEach(one => {
      const shows = one.querySelector('img') ? 'Show the picture' : one.querySelector('audio') ? 'Use it' : 'Details'
      const bare = !one.textContent.trim() && !one.title
      if (bare && !one.ariaLabel) { one.ariaLabel = shows; one.dataset.named = shows }
      if (!bare && one.ariaLabel === one.dataset.named) one.removeAttribute('aria-label') // its text came late
    })
  }
  new MutationObserver(name).observe(document.body, {childList: true, characterData: true, subtree: true})
  name()
}"""
FACTS, PLACES, SECONDS = ["what", "value"], ["tokens", "what"], ["stage", "seconds"]
LOOK = 4  # components of the panel


def theme() -> Any:
    """System fonts: nothing is loaded from elsewhere."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def examples(folder: Path) -> list[dict[str, Any]]:
    """Questions that the samples of a checkpoint's folder answer."""
    rows = [
        ("Who are you?", ()),
        ("What digit is this?", ("five.png",)),
        ("", ("seven.flac",)),
        ("Transcribe the audio.", ("hello-world.flac",)),
        ("Is this what I say?", ("seven.png", "seven.flac")),
    ]
    return [
        {"text": text, "files": [str(folder / name) for name in names]}
        for text, names in rows
        if all((folder / name).is_file() for name in names)
    ]


def build_page(chat: DemoChat, samples: Path | None = None) -> gr.Blocks:
    """The page of a chat.

    Args:
        samples: a folder with the example files.
    """
    limits = chat.limits
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_height=True, delete_cache=(600, 3600)) as page:
        with gr.Sidebar(label="Settings", open=False, position="right"):
            tokens = gr.Slider(1, limits.tokens, min(128, limits.tokens), step=1, label="Longest answer (tokens)")
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: always the likeliest)")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p")
            top_k = gr.Slider(0, 100, 0, step=1, label="Top k (0: all)")
            seed = gr.Number(0, label="Seed (0: a new one each time)", precision=0, minimum=0)
        with gr.Tabs():
            with gr.Tab("Chat"):
                gr.Markdown(f"# {TITLE}\n{INTRODUCTION}")
                look: list[Any] = []
                with gr.Tab("Look inside", render=False) as inside:
                    gr.Markdown("The last answer: what the router decided, and what the towers got.")
                    look = [
                        gr.Gallery(label="What the towers got", format="png", columns=3, object_fit="contain"),
                        gr.Dataframe(headers=FACTS, label="Route and tokens", interactive=False, wrap=True),
                        gr.Dataframe(headers=PLACES, label="Where they stand", interactive=False),
                        gr.Dataframe(headers=SECONDS, label="Time of each stage", interactive=False),
                    ]
                interface = gr.ChatInterface(
                    _answers(chat),
                    multimodal=True,
                    chatbot=show_plain(
                        gr.Chatbot(
                            label="Conversation",
                            render_markdown=False,
                            allow_tags=False,
                            sanitize_html=True,
                            buttons=["copy"],
                            height="50vh",
                            placeholder="Ask something",
                        )
                    ),
                    textbox=gr.MultimodalTextbox(
                        label="Message",
                        elem_id="message",
                        placeholder="Type, add pictures or speak",
                        sources=["upload", "microphone"],
                        file_types=["image", "audio"],
                        file_count="multiple",
                        max_plain_text_length=limits.media.text,
                        stop_btn=True,
                        autofocus=True,
                    ),
                    additional_inputs=[tokens, temperature, top_p, top_k, seed],
                    additional_outputs=look,
                    editable=True,
                    flagging_mode="never",
                    save_history=False,
                    analytics_enabled=False,
                    concurrency_limit=chat.engine.limits.rows * 2,
                    api_name="chat",
                    api_description="Ask a question: text, and files that were uploaded before.",
                )
                if samples is not None and (found := examples(samples)):
                    gr.Examples(found, [interface.textbox], label="Try these", cache_examples=False)
            inside.render()

        def leave(request: gr.Request) -> None:
            chat.leave(_visitor(request))

        page.unload(leave)
    return page.queue(max_size=chat.engine.limits.waiting, api_open=False)


def _visitor(request: gr.Request) -> str:
    """Who asks: one open page."""
    return str(request.session_hash)


def _answers(chat: DemoChat) -> Any:
    """The function behind the chat; the page shows its parameters to programs."""

    async def ask(
        message: dict[str, Any] | str,
        history: list[dict[str, Any]],
        tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Answers a question of text and files, and tells what happened to it."""
        unchanged = [gr.skip()] * LOOK
        if isinstance(message, str):  # an edited question
            message = {"text": message, "files": []}
        try:
            tokens = min(int(tokens), chat.limits.tokens)
            sampling = Sampling(tokens, float(temperature), float(top_p), int(top_k), seed=int(seed) or None)
            text, last = "", None
            async for text, last in chat.answer(message, history, sampling, _visitor(request)):
                if not last.ended:
                    yield text, *unchanged
        except (ChatError, ValueError, TypeError) as error:
            yield [_aside("not answered", str(error))], *unchanged
            return
        assert last is not None
        seen = look_inside(last, chat.engine.model, chat.engine.processor)
        answer = {"role": "assistant", "content": text or "(nothing)"}
        yield (
            [answer, _aside(badge(last), _details(last.timing))],
            seen.pictures,
            seen.facts,
            seen.places,
            seen.seconds,
        )

    return ask


def _details(timing: Any) -> str:
    return f"first token after {timing.first_token:.2f} s; more under 'Look inside'"


def _aside(title: str, text: str) -> dict[str, Any]:
    """A message of ours beside the conversation, folded up where it has a long text."""
    return {"role": "assistant", "content": text, "metadata": {"title": title, "status": "done"}}
