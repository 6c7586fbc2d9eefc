"""What makes the site out of pages that also read well as plain files of the repository.

`mkdocs.yml` names this file. Pages that stand outside of docs/ come in without a copy, and links
between files of the repository become links between pages. A line such as
`<!-- file: configs/demo.yaml -->` becomes that file, `<!-- the keys -->` the list of all keys of the
configuration. What is said only to those who read the file itself goes.
"""

from __future__ import annotations

import dataclasses
import html
import posixpath
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import docstring_parser
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from agrivision.config import Config

ROOT = Path(__file__).parents[1]

_CODE = re.compile(r"^(```+)[^\n]*\n.*?^\1[ \t]*$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_KEPT = re.compile(r"\0(\d+)\0")
_FILE = re.compile(r"^<!-- file: (\S+) -->$", re.MULTILINE)
_KEYS = "<!-- the keys -->"
_ONLY_THERE = re.compile(
    r"^<!-- in the repository -->\n.*?^<!-- until here -->\n", re.MULTILINE | re.DOTALL
)
_LANGUAGES = {".yaml": "yaml", ".sbatch": "bash"}
_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that stand elsewhere."""
    for name, source in config.extra["elsewhere"].items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Put in what is made from the sources, and lead links to pages."""
    text = _FILE.sub(lambda found: _fenced(found[1]), _ONLY_THERE.sub("", markdown))
    text = text.replace(_KEYS, all_keys())
    return _with_links(text, _Links(page.file.src_uri, config.extra))


def on_page_content(content: str, **_: Any) -> str:
    """Let the keyboard reach what scrolls: code and tables that are wider than a phone."""
    return content.replace("<pre>", '<pre tabindex="0">').replace("<table>", '<table tabindex="0">')


def _fenced(name: str) -> str:
    """A file of the repository as a block of code."""
    path = ROOT / name
    return f"```{_LANGUAGES[path.suffix]}\n{path.read_text()}```"


class _Links:
    """Where the links of one page lead.

    Args:
        page: its name on the site.
        extra: of mkdocs.yml.
    """

    def __init__(self, page: str, extra: Mapping[str, Any]) -> None:
        elsewhere: dict[str, str] = extra["elsewhere"]
        self._folder = posixpath.dirname(page)
        self._home = posixpath.dirname(elsewhere.get(page, f"docs/{page}"))
        self._pages = {source: name for name, source in elsewhere.items()} | extra["instead"]

    def of(self, target: str) -> str | None:
        """The link on the site for one in the file; None where there is no page for it."""
        if re.match(r"[a-z]+:|#", target):
            return target
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(self._home, path))
        name = self._pages.get(path)
        if name is None and path.startswith("docs/"):
            name = path.removeprefix("docs/")
        return name and posixpath.relpath(name, self._folder or ".") + mark + anchor


def _with_links(text: str, links: _Links) -> str:
    """The links outside of code, rewritten; those that lead nowhere on the site are their text."""
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"\0{len(kept) - 1}\0"

    def link(found: re.Match[str]) -> str:
        target = links.of(found[3])
        return found[2] if target is None else f"{found[1]}[{found[2]}]({target})"

    text = _LINK.sub(link, _CODE.sub(keep, text))
    return _KEPT.sub(lambda found: kept[int(found[1])], text)


def all_keys() -> str:
    """All keys of the configuration: a section with a list for each of its dataclasses."""
    kinds = typing.get_type_hints(Config)
    whole = [name for name, kind in kinds.items() if not dataclasses.is_dataclass(kind)]
    parts = ["### Of the whole run", "", *_items(Config, "", whole), ""]
    for name, kind in kinds.items():
        if dataclasses.is_dataclass(kind):
            fields = [field.name for field in dataclasses.fields(kind)]
            parts += [f"### `{name}`", "", _about(kind), "", *_items(kind, f"{name}.", fields), ""]
    return "\n".join(parts)


def _about(kind: Any) -> str:
    """What the docstring of a dataclass says before its attributes."""
    said = docstring_parser.parse(kind.__doc__)
    return _plain(" ".join(filter(None, (said.short_description, said.long_description))))


def _items(owner: Any, prefix: str, names: Iterable[str]) -> Iterator[str]:
    """A line for each of some fields of a dataclass: key, what it takes, its default, what it means."""
    said = {each.arg_name: each.description for each in docstring_parser.parse(owner.__doc__).params}
    defaults, kinds = owner(), typing.get_type_hints(owner)
    for name in names:
        key, default = f"**`{prefix}{name}`**", _written(getattr(defaults, name))
        yield f"- {key} ({_taken(kinds[name])}; default {default}): {_plain(said[name] or '')}"


def _plain(text: str) -> str:
    """Words of a docstring in Markdown: outside of code, `<` and `*` are themselves."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(
        part if part.startswith("`") else html.escape(part).replace("*", r"\*") for part in parts
    )


def _taken(kind: Any) -> str:
    """What a key takes: a type, or the choices there are."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_taken, typing.get_args(kind)))
    return _KINDS[kind]


def _written(value: Any) -> str:
    """A default as YAML has it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return {None: "`null`", "": "nothing"}.get(value, f"`{value}`")
