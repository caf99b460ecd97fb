"""Hooks of ``make docs``: pages of the API, and links from the docs to other files of the repository.

The pages of the API list what ``__all__`` of the public packages names. A public object without a docstring, and a link
to a file that does not exist, end the build.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)#\s]+)(#[^)]*)?\)")
_PAGES = {
    "losses": ("Losses", "fsd_fast.losses"),
    "fsd_fast": ("Memory, models and training", "fsd_fast"),
    "fsd_kernels": ("Kernels", "fsd_kernels"),
}
"""Page name -> (title, package)."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each public package."""
    loader = griffe.GriffeLoader(search_paths=[ROOT, ROOT / "kernels"])
    for name in ("fsd_fast", "fsd_kernels"):
        loader.load(name)
    loader.resolve_aliases()
    listed: set[str] = set()
    for page, (title, package) in _PAGES.items():
        module = loader.modules_collection[package]
        lines = [f"# {title}", "", f"`from {package} import ...`"]
        for name in module.exports or ():
            found = module[str(name)]
            if found.canonical_path not in listed:
                listed.add(found.canonical_path)
                for path in _without_docstring(found):
                    raise PluginError(f"{path}: a public object without a docstring")
                lines += ["", f"::: {package}.{name}"]
        files.append(File.generated(config, f"api/{page}.md", content="\n".join(lines) + "\n"))
    return files


def _without_docstring(found: griffe.Object | griffe.Alias) -> Iterator[str]:
    """Paths of an object and its public methods that lack a docstring."""
    if not found.has_docstring and not found.is_attribute:
        yield found.canonical_path
    if found.is_class:
        for name, member in found.members.items():
            if not name.startswith("_") and member.is_function and not member.has_docstring:
                yield member.canonical_path


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files outside of the docs into their paths: the site holds the docs alone."""

    def path_of(link: re.Match[str]) -> str:
        folder = Path(config.docs_dir, page.file.src_uri).parent
        target = Path(os.path.normpath(folder / link["target"]))
        if target.is_relative_to(config.docs_dir):
            return link[0]
        if link["image"] or not target.exists() or not target.is_relative_to(ROOT):
            raise PluginError(f"{page.file.src_uri}: {link[0]}: expected a link to a file of the repository")
        return f"{link['text']} (`{target.relative_to(ROOT).as_posix()}`)"

    return _LINK.sub(path_of, markdown)
