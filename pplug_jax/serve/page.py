"""The page that shows what a plug does for somebody: a client of the server like any other."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

HERE = Path(__file__).parent


def page(about: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the page, and the headers that keep the browser from anything else.

    Args:
        about: `model` and `task`, names; `fields`, those of an item, and which are `required`.
    """
    script = (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True)
    css = (HERE / "page.css").read_text()
    html = environment.get_template("page.html").render(
        about=about, css=Markup(css), script=Markup(script)
    )
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return html, {"Content-Security-Policy": policy}
