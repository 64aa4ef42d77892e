"""A hook of mkdocs: the page of all settings, made of `configs/common.py` and its comments."""

import ast
import io
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SOURCE = Path(__file__).parent.parent / "configs" / "common.py"
INTRODUCTION = """# Settings

To change a setting, give it as `--config.FIELD=VALUE`. The defaults below are those of
`configs/common.py`, which are the paper's where it states them; a task's config or a preset may set
others. A run prints what it uses and keeps it in `WORKDIR/config.json`.
"""


class Setting(NamedTuple):
    """A field of the config.

    Args:
        section: its part of the config, such as `plug`; empty for the first fields.
        name: as it is given in a command, such as `plug.temperature`.
        default: its value, as Python.
        about: its comment.
    """

    section: str
    name: str
    default: str
    about: str


def settings(source: str) -> list[Setting]:
    """Read the fields that `base_config` sets, in its order."""
    comments = {
        token.start[0]: (token.string.removeprefix("#").strip(), token.line.lstrip()[0] == "#")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "base_config"
    )
    fields = []
    for statement in function.body:
        if not isinstance(statement, ast.Assign) or not isinstance(
            statement.targets[0], ast.Attribute
        ):
            continue
        name = ast.unparse(statement.targets[0]).removeprefix("c.")
        default = ast.unparse(statement.value)
        if default.endswith("ConfigDict()"):
            continue
        first = statement.lineno
        while comments.get(first - 1, ("", False))[1]:  # lines of comment above
            first -= 1
        lines = range(first, statement.end_lineno + 1)
        about = " ".join(comments[line][0] for line in lines if line in comments)
        about = about[:1].upper() + about[1:]
        section = name.rpartition(".")[0]
        fields.append(Setting(section, name, default, about))
    return fields


def page(source: str) -> str:
    """Write the settings as Markdown, a table for each section."""
    lines, section = [INTRODUCTION], None
    for setting in settings(source):
        if setting.section != section:
            section = setting.section
            lines += [f"\n## {section or 'The run'}\n", "| field | default | |", "|---|---|---|"]
        default = re.sub(r"placeholder\((\w+)\)", "None", setting.default).replace("|", "\\|")
        lines.append(f"| `{setting.name}` | `{default}` | {setting.about} |")
    return "\n".join(lines) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to the site."""
    content = page(SOURCE.read_text(encoding="utf-8"))
    files.append(File.generated(config, "config.md", content=content))
    return files
