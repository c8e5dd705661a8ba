"""Sphinx configuration: `sphinx-build -W -b html docs docs/_build`."""

import re
from importlib.metadata import version as installed_version
from typing import Any

project = "flax-hmog"
author = "the flax-hmog authors"
version = release = installed_version("flax-hmog")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"flax-hmog {version}"
highlight_language = "none"  # blocks of code name their language; others are output and formulas
smartquotes = False  # a prime is a transpose here

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "literal"  # docstrings quote code in single backticks
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # fields of our dataclasses are constructor arguments
napoleon_attr_annotations = False
napoleon_use_rtype = False


def prepare_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show formulas as they stand: indented paragraphs that follow a plain one, and bars, which are norms here."""
    shown: list[str] = []
    in_formula = False
    for line in lines:
        after_text = len(shown) > 1 and not shown[-1].strip() and shown[-2] and not shown[-2][0].isspace()
        if after_text and line.startswith("    "):
            shown += ["::", ""]
            in_formula = True
        in_formula = in_formula and (not line or line[0].isspace())
        parts = line.split("`")
        if not in_formula:
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
        shown.append("`".join(parts))
    lines[:] = shown


def shorten_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leave out of a head's signature what linen adds to every module."""
    if what == "class" and signature:
        signature = re.sub(r", parent=<[^>]*>, name=None\)", ")", signature)
    return signature, returns


def keep_spread(app: Any, name: str, source: list[str]) -> None:
    """Keep a figure and its spread in one line of a table."""
    lines = source[0].split("\n")
    source[0] = "\n".join(
        line.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}") if line[:1] == "|" else line for line in lines
    )


def setup(app: Any) -> None:
    """Register the rules above, the first before napoleon reads the docstrings."""
    app.connect("source-read", keep_spread)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)
    app.connect("autodoc-process-signature", shorten_signature)
