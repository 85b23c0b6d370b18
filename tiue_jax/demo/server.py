"""Serves the page: to this machine unless asked, with a limited queue, no files, and no requests to other servers."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiue_jax.demo import page, panels
from tiue_jax.demo.studio import Studio
from tiue_jax.temporary import temporary_folder

MAX_FILE_BYTES = 8 * 2**20  # of a dropped PNG
LOCAL = "127.0.0.1"

# What the page asks for. Gradio has many more routes, among them those that read files of the server or fetch URLs.
_ALLOWED = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/[\w./-]+"
    r"|/gradio_api/(info|queue/(join|data)|heartbeat/\w+|upload|upload_progress|startup-events|app_id|cancel|reset"
    r"|user|login_check)/?"
)
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'"
)
_HEADERS = {
    "content-security-policy": _POLICY,  # the browser refuses requests to other servers
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class OnlyThePage:
    """Answers 404 to requests that the page does not make, and adds headers of security to all answers."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request, see the ASGI specification."""
        if scope["type"] == "http" and not is_allowed(scope["path"]):
            await PlainTextResponse("not found", status_code=404)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def is_allowed(path: str) -> bool:
    """Says whether the page asks for a path of the server."""
    return _ALLOWED.fullmatch(path) is not None and ".." not in path


@contextlib.contextmanager
def serving(studio: Studio, *, host: str = LOCAL, port: int | None = None, max_queue: int = 64) -> Iterator[str]:
    """Serves the page in threads until the block ends. Yields its address, such as "http://127.0.0.1:7860/".

    Args:
        studio: draws.
        host: the address to listen at. "0.0.0.0" is every address of this machine.
        port: None is the first free one from 7860.
        max_queue: requests that may wait. Further ones are answered with a message.

    Raises:
        OSError: the port is taken, or the host is no address of this machine.
    """
    with temporary_folder(tempfile.gettempdir(), "demo") as uploads, _environment(GRADIO_TEMP_DIR=str(uploads)):
        blocks = page.build(studio, uploads)
        blocks.queue(max_size=max_queue, default_concurrency_limit=1, api_open=False)
        address = _launch(
            blocks,
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            show_error=False,
            allowed_paths=[],
            max_file_size=MAX_FILE_BYTES,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            theme=theme(),
            css=panels.STYLE,
            app_kwargs={"middleware": [Middleware(OnlyThePage)], "docs_url": None, "redoc_url": None},
        )
        try:
            yield address
        finally:
            blocks.close(verbose=False)


def _launch(blocks: gr.Blocks, **settings: Any) -> str:
    """Starts the server. Returns its address. OSError, naming the address, if it cannot listen there."""
    try:
        _, address, _ = blocks.launch(**settings)
    except OSError as error:
        where = f"{settings['server_name']}, port {settings['server_port'] or 'any from 7860'}"
        raise OSError(f"cannot listen at {where}: taken, or no address of this machine; choose others") from error
    return address


def theme() -> gr.themes.Base:
    """Gradio's soft theme with fonts of the user's machine: the fonts of the default come from a server of Google."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "monospace"]
    return gr.themes.Soft(font=sans, font_mono=mono, primary_hue="blue")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Sets variables of the environment during the block: Gradio reads them while it works."""
    before: dict[str, Any] = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
