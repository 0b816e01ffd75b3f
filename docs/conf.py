"""The documentation as a site: `pip install -e '.[docs]'`, then `python -m sphinx -W -n docs docs/_build`.

Pages are Markdown that reads well on GitHub too: a link out of docs/, such as `../acestep_jax/inputs/tasks.py`, becomes
one to the repository. Notebooks are shown as they are stored, without running them. Docstrings are plain text with
sections in Google style; `reformat` converts the rest to reStructuredText.
"""

import dataclasses
import inspect
import io
import json
import os
import posixpath
import re
import sys
import tokenize
from importlib import metadata
from pathlib import Path

from sphinx.util import inspect as sphinx_inspect
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REPOSITORY = "https://github.com/acestep-jax/acestep-jax"
BRANCH = "main"

sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
logger = logging.getLogger(__name__)

project = "acestep-jax"
author = copyright = "the authors of acestep-jax"
try:
    release = metadata.version(project)
except metadata.PackageNotFoundError:  # run from the folder, without installing it
    release = ""
html_title = f"{project} {release}".strip()

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "furo"
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": BRANCH,
    "source_directory": "docs/",
}

myst_heading_anchors = 3
nb_execution_mode = "off"

autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_param = False
# Names in backticks are links where they are documented, and code elsewhere, see `resolve`.
default_role = "py:obj"
# Types of other libraries are not looked up, so that a build needs no network.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!acestep_jax|train)\S.*"),
    (r"py:class", r".*\.(Network|Config|Layer|Carry|R|A|P)"),
]  # type variables


def copy_notebooks() -> None:
    """Copy the notebooks that have changed into the folder of the pages, and set their language to that of IPython,
    which has lines that begin with ! and %."""
    sources = {path.name: path for path in (ROOT / "notebooks").glob("*.ipynb")}
    target = DOCS / "notebooks"
    target.mkdir(exist_ok=True)
    for stale in target.glob("*.ipynb"):
        if stale.name not in sources:
            stale.unlink()
    for name, path in sources.items():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["metadata"].setdefault("language_info", {"name": "python"})["pygments_lexer"] = "ipython3"
        text = json.dumps(notebook, ensure_ascii=False, indent=1)
        if not (target / name).is_file() or (target / name).read_text(encoding="utf-8") != text:
            (target / name).write_text(text, encoding="utf-8")


def expand_patterns(app, docname: str, source: list[str]) -> None:
    """Replace patterns in the table of contents of index.md by the pages that match."""

    def pages(found: re.Match) -> str:
        names = sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob(found[1]))
        return "".join(f"{name}\n" for name in names)

    if docname == "index":
        source[0] = re.sub(r"(?m)^([\w/]+\*)\n", pages, source[0])


def link_repository(app, docname: str, source: list[str]) -> None:
    """Replace relative links out of docs/ by links to the repository; warn if a file does not exist."""
    # A copied notebook links as it does where it came from.
    folder = posixpath.join("docs", posixpath.dirname(docname)).replace("docs/notebooks", "notebooks")

    def link(found: re.Match) -> str:
        path, anchor = found[1], found[2] or ""
        target = posixpath.normpath(posixpath.join(folder, path))
        page = target.removeprefix("docs/")
        if page != target or target.endswith(".ipynb") and (ROOT / target).is_file():
            return f"]({posixpath.relpath(page, posixpath.dirname(docname) or '.')}{anchor})"
        if not (ROOT / target).exists() and not target.startswith("notebooks/"):  # these may come later
            logger.warning("%s: link to %s, which is not in the repository", docname, target)
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/{BRANCH}/{target}{anchor})"

    source[0] = re.sub(r"\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)", link, source[0])


def resolve(app, env, node, content):
    """Resolve a name in backticks to a link if exactly one object matches, and to plain code otherwise."""
    if node.get("reftype") != "obj":
        return None
    domain = env.get_domain("py")
    found = domain.find_obj(env, node.get("py:module"), node.get("py:class"), node["reftarget"], None, 1)
    if len(found) != 1:
        return content
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, name)


def reformat(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Convert a docstring to reStructuredText: escape its punctuation, keep formulas and tables verbatim, and list the
    fields of a dataclass or named tuple with their descriptions."""
    result, fields = [], {}
    paragraphs = re.split(r"\n{2,}", inspect.cleandoc("\n".join(lines)))
    own = _field_comments(obj)
    for paragraph in paragraphs:
        rows = paragraph.split("\n")
        items = _items(rows)
        if items and what in ("class", "exception") and set(", ".join(items).split(", ")) <= set(own):
            fields |= items
        elif items and what in ("function", "method") and not _SECTION.match(rows[0]):
            result += ["Args:", *(f"    {row}" for row in map(_escape, rows)), ""]
        elif rows[0] == "Args:":  # a row that names arguments alone goes on in the next
            result += [*map(_escape, re.sub(r"(?m)^(    [\w, ]+,)\n +", r"\1 ", paragraph).split("\n")), ""]
        elif rows[0] == "Returns:":  # a colon within would make a type of what stands before it
            result += [":Returns:", *map(_escape, rows[1:]), ""]
        elif _is_literal(rows):
            result += ["::", "", *(f"    {row}" for row in rows), ""]
        else:
            result += [*map(_escape, rows), ""]
    said = set(", ".join(fields).split(", "))
    fields |= {field: comment for field, comment in own.items() if comment and field not in said}
    if fields:
        result += [":Fields:"]
        result += [f"    * **{field}** -- {_escape(text)}" for field, text in fields.items()]
    # What a property says may have a colon too, which napoleon looks for in the first line alone.
    lines[:] = [""] * (what == "property") + [*result, ""]


_SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")


def _items(rows: list[str]) -> dict[str, str]:
    """Return the texts by names of a paragraph with "name, name: text" on each line and indented continuation lines;
    empty for any other paragraph."""
    items: dict[str, str] = {}
    for row in rows:
        if found := re.match(r"([a-z]\w*(?:, [a-z]\w*)*): (.*)", row):
            items[found[1]] = found[2]
        elif row.startswith("    ") and items:
            items[list(items)[-1]] += f" {row.strip()}"
        else:
            return {}
    return items


def _is_literal(rows: list[str]) -> bool:
    """Return whether a paragraph is a table, indented throughout, or consists of assignments."""
    return any(
        all(test(row) for row in rows)
        for test in (
            lambda row: row.startswith("|"),
            lambda row: row.startswith("    "),
            lambda row: " <- " in row and len(rows) > 1,
        )
    )


def _escape(text: str) -> str:
    """Escape the punctuation of reStructuredText outside of backticks; within, mark all but names as code."""
    parts = text.split("`")
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"`{part}`" if re.fullmatch(r"[A-Za-z_][\w.]*", part) else f"``{part}``"
        else:
            part = re.sub(r"([\\*|])", r"\\\1", part)
            parts[i] = re.sub(r"(\w)_(?!\w)", r"\1\\_", part)
    return "".join(parts)


def _field_comments(obj) -> dict[str, str]:
    """Return the fields that a dataclass or named tuple itself declares, with their trailing comments."""
    if not inspect.isclass(obj) or not (dataclasses.is_dataclass(obj) or hasattr(obj, "_fields")):
        return {}
    names = [name for name in inspect.get_annotations(obj) if not name.startswith("_")]
    source = inspect.getsource(obj)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.strip() != token.string
    }
    found = dict.fromkeys(names, "")
    for number, line in enumerate(source.split("\n"), start=1):
        if (declared := re.match(r"    (\w+): ", line)) and declared[1] in found:
            found[declared[1]] = comments.get(number, "")
    return found


def skip(app, what: str, name: str, obj, skip: bool, options):
    """Skip the fields of named tuples, which `reformat` lists, and always include `__call__`."""
    if name == "__call__":
        return False
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def signature(app, what: str, name: str, obj, options, found: str | None, returned: str | None):
    """Return the signature of a Flax module's constructor, because its metaclass accepts anything."""
    if what != "class" or "*args" not in (found or ""):
        return None
    arguments = sphinx_inspect.signature(obj.__init__, bound_method=True)
    return sphinx_inspect.stringify_signature(arguments, unqualified_typehints=True), None


def keep_signature(app, what: str, name: str, obj, skip: bool, options) -> None:
    """Keep a signature that a decorator has set: autodoc would look for its defaults in the source of the function that
    is decorated."""
    if {"__signature__", "__wrapped__"} <= getattr(obj, "__dict__", {}).keys():
        del getattr(obj, "__func__", obj).__wrapped__  # of a class method as well


def without_source(app, page: str, template: str, context: dict, doctree) -> None:
    """Remove the edit link from copied notebooks, which are not in the repository."""
    if page.startswith("notebooks/"):
        context.pop("page_source_suffix", None)


def setup(app) -> None:
    copy_notebooks()
    app.connect("env-get-outdated", lambda *_: ["index"])  # see `expand_patterns`
    app.connect("source-read", expand_patterns)
    app.connect("source-read", link_repository)
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", reformat, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", keep_signature, priority=400)
    app.connect("autodoc-skip-member", skip)
    app.connect("html-page-context", without_source)
