"""The model card of a plug that is handed on, made from plug_config.json alone."""

from pathlib import Path
from typing import Any

import jinja2

from pplug_jax.methods.table import CONTROLS
from pplug_jax.scoring.summary import metric_columns
from pplug_jax.scoring.tables import markdown
from pplug_jax.storage.hub import HUB_ID

TEMPLATE = Path(__file__).with_name("card.md.jinja")


def card(about: dict[str, Any]) -> str:
    """Return the card of a plug in Markdown.

    Args:
        about: the content of plug_config.json.
    """
    results, name = about["results"], about["llm"]["name"]
    controls = CONTROLS.get(about["method"])
    table, lacking = "", []
    if results and results["methods"]:
        header, cells = metric_columns(results)
        rows = [[method, *row] for method, row in zip(results["methods"], cells, strict=True)]
        table = markdown(["method", *header], rows)
        lacking = [control for control in controls or () if control not in results["methods"]]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        about,
        base_model=name if HUB_ID.fullmatch(name) and not name.startswith("assets/") else None,
        table=table,
        lacking=lacking,
        controls=controls,
    )
