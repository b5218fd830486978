"""The documentation site: ``make docs`` builds it into build/site, and every warning is an error.

Sphinx, because the docstrings are in its notation; MyST reads the Markdown and runs the notebooks. The pages load
nothing from other hosts.
"""

import re
from importlib import metadata
from typing import Any

from sphinx.application import Sphinx

project = "sedd_ext"
author = "The sedd_ext authors"
copyright = author
release = metadata.version("sedd_ext")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["pictures"]
highlight_language = "none"  # formulas in docstrings are no Python; blocks of code name their language

myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # the pages that include another begin with its title

nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"sedd_ext {release}"
html_copy_source = False
html_show_sphinx = False

LITERAL = re.compile(r"(``.*?``|`[^`]+`)")


def prepare_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Prepares a docstring for napoleon.

    Escapes the star of shapes such as [*B, N], which reStructuredText would read as emphasis. In the docstring of an
    attribute, words before a colon would be its type: not after an empty line.
    """
    literal_at = None  # the indentation before a literal block
    for i, line in enumerate(lines):
        indentation = len(line) - len(line.lstrip())
        if literal_at is not None and line.strip() and indentation <= literal_at:
            literal_at = None
        if literal_at is None:
            parts = LITERAL.split(line)
            lines[i] = "".join(part if k % 2 else part.replace("*", r"\*") for k, part in enumerate(parts))
            if line.endswith("::"):
                literal_at = indentation
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")


def rewrite_links(app: Sphinx, relative_path: Any, parent_docname: str, content: list[str]) -> None:
    """Makes the links of README, CONTRIBUTING, CHANGELOG and SECURITY those of the pages that include them."""
    text = content[0].replace("](docs/", "](")
    for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"):
        text = text.replace(f"]({name}.md)", f"]({name.lower()}.md)")
    content[0] = re.sub(r"\]\((?=examples/|CITATION)", "](../", text)


def setup(app: Sphinx) -> None:
    """Registers the two functions."""
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon
    app.connect("include-read", rewrite_links)
