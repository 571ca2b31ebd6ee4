"""What mkdocs does beside building pages: files of the repository that pages link to become pages of the site.

`../examples/trainer.py` is right on the page where the repository is browsed; on the site it is a page with that file.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
SHOWN = ("examples/*.py", "benchmarks/README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile",
         "src/nanoadam/paper/recipes/*.toml")  # fmt: skip
LINK = re.compile(r"(\]\()((?:\.\./)+)([^)#\s]+)(#[^)\s]*)?(\))")
FOLDERS = {"src/nanoadam/paper/recipes": "repository/src/nanoadam/paper/recipes/index.md"}


def _page_of(path: str) -> str:
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def _content(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".md":
        return text
    language = {".py": "python", ".toml": "toml"}.get(path.suffix, "make")
    return f"# {path.name}\n\n````{language}\n{text}````\n"


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file of SHOWN, and one that lists the recipes."""
    paths = sorted(path for pattern in SHOWN for path in ROOT.glob(pattern))
    for path in paths:
        files.append(File.generated(config, _page_of(path.relative_to(ROOT).as_posix()), content=_content(path)))
    for folder, page in FOLDERS.items():
        rows = [f"- [{p.name}]({p.name}.md)" for p in paths if p.parent == ROOT / folder]
        files.append(File.generated(config, page, content=f"# {folder}\n\n" + "\n".join(rows) + "\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave the docs at those pages."""
    here = PurePosixPath(page.file.src_uri).parent
    depth = len(here.parts)
    if here.parts[:1] == ("repository",):
        return _links_of_repository(markdown, here)

    def replace(match: re.Match[str]) -> str:
        ups = match[2].count("../")
        target = match[3].rstrip("/")
        if ups != depth + 1:  # stays within the docs
            return match[0]
        new = FOLDERS.get(target) or _page_of(target)
        return f"{match[1]}{'../' * depth}{new}{match[4] or ''}{match[5]}"

    return LINK.sub(replace, markdown)


def _links_of_repository(markdown: str, here: PurePosixPath) -> str:
    """Links of README-like files are relative to the repository: to docs they go up and out of the folder."""
    up = "../" * len(here.parts)

    def replace(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target.startswith("#"):
            return match[0]
        inside = (PurePosixPath(*here.parts[1:]) / target).as_posix()
        if inside.startswith("docs/"):
            return f"]({up}{inside.removeprefix('docs/')}"
        if (ROOT / inside.partition("#")[0]).is_file() and any(PurePosixPath(inside).match(p) for p in SHOWN):
            return f"]({up}{_page_of(inside)}"
        return "](#" if not (ROOT / inside).exists() else match[0]

    return re.sub(r"(\]\()([^)\s]+)", replace, markdown)
