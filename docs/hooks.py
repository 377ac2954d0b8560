"""MkDocs hooks: what the site shows beside the Markdown files in docs/, and links that leave docs/.

- README.md, CONTRIBUTING.md and CHANGELOG.md become pages; their links, which start at the root, are rewritten.
- A link to any other file of the repository (`../jobs/configs/digits.yaml`) leads to a page that shows that file.
- The navigation entries `decisions/` and `api/` become one page per decision and one per module of mae_core.
- configuration.md lists every field of a run's configuration, as `mae config` does.
- A path in backticks that names a file of the repository must exist: code moves, prose forgets.

Every problem is logged as a warning, which `mkdocs build --strict` turns into a failure.
"""

import logging
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
HISTORY = ("changelog.md", "decisions/")
"""Pages that speak of earlier versions, whose files may be gone."""
AFTER_PROSE = "---\nsearch: {boost: 0.2}\n---\n"
"""Front matter: in the search, such a page comes after the written ones."""
LINK = re.compile(r"""(\]\(|src=")(?![a-z]+:|#|/)([^)\s#"]+)(#[^)\s"]*)?([)"])""")
PATH = re.compile(r"`((?:mae_core|pipeline|jobs|infra|tests|benchmarks|docs)/[\w./-]*)`")

log = logging.getLogger("mkdocs.hooks.links")


def on_config(config: Any) -> Any:
    """Replace the entries `decisions/` and `api/` of the navigation with the pages they stand for."""
    found = {"decisions/": _decisions(), "api/": _modules()}
    for section in config.nav:
        for entries in section.values():
            for entry in entries:
                if isinstance(entry, dict):
                    entry.update({title: found[page] for title, page in entry.items() if page in found})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that have no Markdown file in docs/."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    lines = [f"- [{title}]({posixpath.basename(page)})" for entry in _decisions()[1:] for title, page in entry.items()]
    files.append(File.generated(config, "configuration.md", content=_configuration()))
    about = "What was chosen and could have been otherwise: context, choice, and what it costs."
    files.append(
        File.generated(config, "decisions/index.md", content="\n".join(["# Decisions", "", about, "", *lines]))
    )
    for entry in _modules():
        for module, page in entry.items():
            path = f"{module.replace('.', '/')}.py"
            text = f"{AFTER_PROSE}# {module}\n\n[{path}](../../{path})\n\n::: {module}\n"
            files.append(File.generated(config, page, content=text))
    for page in [file for file in files if file.is_documentation_page()]:
        for target in _linked(page.content_string, _place(page.src_uri)):
            shown = _page_of(target)
            if shown.startswith("files/") and shown not in files.src_uris:
                files.append(File.generated(config, shown, content=_listing(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ at pages of the site, and check paths in backticks."""
    here = page.file.src_uri
    if not here.startswith(HISTORY):
        for path in PATH.findall(markdown):
            if not (ROOT / path).exists():
                log.warning("%s: `%s` is not in the repository", here, path)

    def turned(match: re.Match[str]) -> str:
        opening, link, anchor, closing = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(_place(here)), link))
        if not (ROOT / target).exists():
            if opening != "](":  # of broken Markdown links mkdocs itself complains
                log.warning("%s: %s is not in the repository", here, target)
            return match[0]
        to = os.path.relpath(_page_of(target), posixpath.dirname(here) or ".")
        return f"{opening}{to}{anchor or ''}{closing}"

    return LINK.sub(turned, markdown)


def _place(page: str) -> str:
    """Where a page's Markdown lies in the repository."""
    return {shown: name for name, shown in ROOT_PAGES.items()}.get(page, f"docs/{page}")


def _page_of(path: str) -> str:
    """The page, from docs/, that shows a file of the repository."""
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return f"{inside}/index.md" if (ROOT / path).is_dir() else inside
    return f"files/{path}.md"


def _linked(markdown: str, place: str) -> Iterator[str]:
    """Files of the repository that a page at this place links to."""
    for _, link, _, _ in LINK.findall(markdown):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
        if (ROOT / target).is_file():
            yield target


def _listing(path: str) -> str:
    language = {".py": "python", ".yaml": "yaml", ".toml": "toml"}.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{language}\n{(ROOT / path).read_text()}\n````\n"


def _decisions() -> list[Any]:
    """The index, then each decision under its own heading."""
    pages: list[Any] = ["decisions/index.md"]
    for file in sorted((ROOT / "docs/decisions").glob("[0-9]*.md")):
        number, title = re.split(r"[.:]\s", file.read_text().splitlines()[0].removeprefix("# "), maxsplit=1)
        pages.append({f"{int(number)}. {title}": f"decisions/{file.name}"})
    return pages


def _configuration() -> str:
    """Every field with its type, default and meaning: a table per section."""
    # Imported here and not above: it imports torch, which takes seconds.
    sys.path.insert(0, str(ROOT))
    from pipeline.config.reference import field_references

    lines = [
        "# Configuration",
        "",
        "Every field of a run's YAML file. `mae config` prints the same list, `mae config pretrain` a section of it, and "
        "`mae init SOURCE` writes a file to start from. A field is set for one run with `--set pretrain.epochs=100`.",
    ]
    table = ""
    for one in field_references():
        if one.section:
            lines += ["", f"## {one.name}", "", f"{one.meaning} ({one.type})"]
            table = ""
            continue
        section = one.name.rpartition(".")[0]
        if table != (section or "top"):
            table = section or "top"
            lines += ["", "| Field | Type | Default | Meaning |", "|---|---|---|---|"]
        cells = (f"`{one.name}`", one.type, f"`{one.default}`", one.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _modules() -> list[dict[str, str]]:
    """The modules of mae_core; a package is one page."""
    files = sorted(file for file in (ROOT / "mae_core").glob("**/*.py") if file.name != "__init__.py")
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [{name: f"api/{name}.md"} for name in names]
