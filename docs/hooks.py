"""What the site has beside ``docs/*.md``, and what becomes of two notations of its pages.

* ``README.md`` is the home page; files of the repository that pages link to, and the sources that they
  name, come along, so that every link stays inside the site.
* A fence of the language ``math`` holds LaTeX and becomes MathML, which browsers draw themselves: no
  script, no font and no network, and GitHub reads the same fence.
* ``losses.py:OtterLoss`` in backticks becomes a link to that line; a name that is not there ends the
  build.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "otter_openclip"
LINKED = ("benchmarks/results/*", "configs/*", "patches/README.md", "LICENSE")
IN_REPOSITORY = r"\]\((?:\.\./)+(benchmarks|configs|patches|LICENSE)"
NAMED_CODE = re.compile(r"((?:\w+/)*\w+\.py):([A-Za-z_][\w.]*)")
SOURCE_PAGE = (
    "---\nsearch:\n  exclude: true\n---\n# {name}\n\n~~~~ {{.python linenums=1}}\n{code}~~~~\n"
)


@cache
def line_of(file: str, name: str) -> int:
    """The line of ``otter_openclip/FILE`` on which ``name`` (dotted: of a class) is defined."""
    body: list[ast.stmt] = ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)]
            if part in names:
                line, body = node.lineno, getattr(node, "body", [])
                break
        else:
            raise LookupError(f"otter_openclip/{file} has no {name}")
    return line


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the fence ``math``."""
    fence = {"name": "math", "class": "math", "format": _mathml}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def _mathml(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{convert(source, display="block")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page, linked files and sources."""
    home = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text(encoding="utf-8"))
    files.append(File.generated(config, "index.md", content=home))
    for path in sorted(path for pattern in LINKED for path in ROOT.glob(pattern)):
        name = str(path.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for name in sorted({file for page in files.documentation_pages() for file in _sources(page)}):
        code = (PACKAGE / name).read_text(encoding="utf-8")
        content = SOURCE_PAGE.format(name=name, code=code)
        files.append(File.generated(config, _source_page(name), content=content))
    return files


def _sources(page: File) -> set[str]:
    named = NAMED_CODE.findall(page.content_string)
    return {file for file, _ in named if (PACKAGE / file).exists()}


def _source_page(file: str) -> str:
    return f"source/{file.removesuffix('.py')}.md"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links out of ``docs/`` find the files that came along."""
    markdown = markdown.replace("](../README.md", "](/index.md")
    return re.sub(IN_REPOSITORY, r"](/\1", markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link every ``file.py:name``."""

    def link(match: re.Match[str]) -> str:
        file, name = match.groups()
        try:
            line = line_of(file, name)
        except (LookupError, OSError) as error:
            raise PluginError(f"{page.file.src_uri} names {file}:{name}: {error}") from error
        target = files.get_file_from_path(_source_page(file)).url
        url = f"{get_relative_url(target, page.url)}#__codelineno-0-{line}"
        return f'<a href="{url}"><code>{file}:{name}</code></a>'

    return re.sub(f"<code>{NAMED_CODE.pattern}</code>", link, html)
