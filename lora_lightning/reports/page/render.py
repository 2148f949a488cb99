"""One HTML file that needs no other: templates, style and script of this folder, put together."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lora_lightning import __version__
from lora_lightning.errors import AdapterError
from lora_lightning.reports.texts import printable
from lora_lightning.reports.whole import write_whole

PAGE = "report.html"
_GENERATOR = '<meta name="generator" content="lora_lightning'
_HERE = Path(__file__).parent


def write(folder: Path, template: str, **content: Any) -> Path:
    """Write a folder's page: the whole of it, or what was there before.

    Args:
        folder: Where; the file is ``report.html``.
        template: Its name in this folder.
        **content: What the template shows.

    Raises:
        AdapterError: There is a file of that name that is not ours.
    """
    path = folder / PAGE
    if path.is_file() and _GENERATOR not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise AdapterError(f"{path} was not written by lora_lightning and is left alone: move it away for a page here")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    text = (
        _environment()
        .get_template(template)
        .render(
            **content,
            version=__version__,
            style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            # The browser runs this script and no other, and fetches nothing, whatever a text on the page says.
            policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{_hash(script)}'",
        )
    )
    return write_whole(path, text)


def picture(png: Path) -> str:
    """A picture as part of a page, its colours counted out where that makes it smaller."""
    content = png.read_bytes()
    try:
        from PIL import Image

        smaller = io.BytesIO()
        with Image.open(png) as image:
            image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
        content = min(content, smaller.getvalue(), key=len)
    except (ImportError, OSError):  # as it is, then
        pass
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def link(path: str | os.PathLike[str]) -> str:
    """The address of a file or folder/ beside the page; a name with a colon in it is no scheme.

    >>> link("0/report.html"), link("javascript:alert(1)")
    ('./0/report.html', './javascript%3Aalert%281%29')
    """
    return f"./{quote(os.fspath(path).replace(os.sep, '/'))}"


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("lora_lightning.reports", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"printable": lambda text: printable(str(text)), "link": link}
    return made


def _hash(script: str) -> str:
    # A browser hashes what stands between the tags.
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
