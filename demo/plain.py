"""Texts in the chat window are shown as they were typed."""

from html import escape, unescape
from typing import Any


def show_plain(chatbot: Any) -> Any:
    """Makes a `gr.Chatbot` show markup in a text, not render it: a picture in it would be loaded from elsewhere.

    Gradio leaves harmless HTML in texts also where Markdown is off. So texts are escaped on their way to the browser
    and brought back on their way from it. Done to one object: for a subclass Gradio would write a file beside ours.
    """
    take, give = chatbot._preprocess_content, chatbot._postprocess_content

    def taken(part: Any) -> Any:
        part = take(part)
        is_text = isinstance(part, dict) and part.get("type") == "text"
        return {**part, "text": unescape(part["text"])} if is_text else part

    def given(part: Any) -> Any:
        part = give(part)
        is_text = getattr(part, "type", None) == "text"
        return part.model_copy(update={"text": escape(part.text, quote=False)}) if is_text else part

    chatbot._preprocess_content, chatbot._postprocess_content = taken, given
    return chatbot
