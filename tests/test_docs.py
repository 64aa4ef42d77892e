"""The documentation says what the code has."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from pplug_jax.settings import Settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_setting_is_described() -> None:
    pytest.importorskip("mkdocs")
    path = ROOT / "docs" / "config_reference.py"
    spec = importlib.util.spec_from_file_location("config_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.settings(module.SOURCE.read_text(encoding="utf-8"))
    assert [s.name for s in settings if not s.about] == []
    assert {setting.name for setting in settings} == Settings().flat().keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_settings_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    known = Settings().flat()
    groups = {name.partition(".")[0] for name in known if "." in name}
    for name in re.findall(r"--config\.([a-z_.]+[a-z_])", text):
        assert name in known, name
    for group, field in re.findall(r"`([a-z]+)\.([a-z_]+)(?:=[^`]*)?`", text):
        if group in groups:
            assert f"{group}.{field}" in known, f"{group}.{field}"
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists() or link.endswith(("config.md", "api.md")), link
    for file in re.findall(r"`([a-z_]+/[\w/.]+\.(?:py|sh|md|ipynb))[`:]", text):
        assert (ROOT / file).exists() or (ROOT / "pplug_jax" / file).exists(), file


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


def messages() -> str:
    """Return all texts of the package's code, with `...` where values stand."""
    texts = []
    for path in (ROOT / "pplug_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(getattr(part, "value", "")) for part in node.values]
                literal = [isinstance(part, ast.Constant) for part in node.values]
                texts.append(
                    "".join(p if ok else "..." for p, ok in zip(parts, literal, strict=True))
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r"^\| (`[^|]+`) \|", page, re.MULTILINE)
    assert len(quotes) > 20
    said = messages()
    for quote in re.findall(r"`([^`]+)`", " ".join(quotes)):
        for part in re.split(r"\.\.\.|\bnan\b", quote):
            assert part.strip(" ,") in said, part
