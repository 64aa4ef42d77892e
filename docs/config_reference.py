"""A hook of mkdocs: the page of all settings, made of `pplug_jax/settings.py` and its comments."""

import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SOURCE = Path(__file__).parent.parent / "pplug_jax" / "settings.py"
INTRODUCTION = """# Settings

To change a setting, give it as `--config.FIELD=VALUE`. The defaults below are those of
`pplug_jax/settings.py`, which are the paper's where it states them; a task's config or a preset may
set others. A run prints what it uses and keeps it in `WORKDIR/config.json`.
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
    """Read the fields of `Settings` and of its groups, in their order."""
    comments = {
        token.start[0]: (token.string.removeprefix("#").strip(), token.line.lstrip()[0] == "#")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    fields = []
    for statement in classes["Settings"].body:
        if not isinstance(statement, ast.AnnAssign):
            continue
        name, group = ast.unparse(statement.target), classes.get(ast.unparse(statement.annotation))
        if group is None:
            fields.append(_setting("", statement, comments))
            continue
        inner = (node for node in group.body if isinstance(node, ast.AnnAssign))
        fields += [_setting(name, node, comments) for node in inner]
    return fields


def _setting(section: str, node: ast.AnnAssign, comments: dict[int, tuple[str, bool]]) -> Setting:
    first = node.lineno
    while comments.get(first - 1, ("", False))[1]:  # lines of comment above
        first -= 1
    lines = range(first, node.end_lineno + 1)
    about = " ".join(comments[line][0] for line in lines if line in comments)
    name = f"{section}.{ast.unparse(node.target)}".lstrip(".")
    return Setting(section, name, ast.unparse(node.value), about[:1].upper() + about[1:])


def page(source: str) -> str:
    """Write the settings as Markdown, a table for each section."""
    lines, section = [INTRODUCTION], None
    for setting in settings(source):
        if setting.section != section:
            section = setting.section
            lines += [f"\n## {section or 'The run'}\n", "| field | default | |", "|---|---|---|"]
        default = setting.default.replace("|", "\\|")
        lines.append(f"| `{setting.name}` | `{default}` | {setting.about} |")
    return "\n".join(lines) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to the site."""
    content = page(SOURCE.read_text(encoding="utf-8"))
    files.append(File.generated(config, "config.md", content=content))
    return files
