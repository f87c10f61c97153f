"""Configure Sphinx for these pages: `make docs`, offline; a warning is an error."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import metroem  # noqa: E402  # of this checkout

project = "MetroEM"
author = copyright = "MetroEM contributors"
version = release = metroem.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "key_tables",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"MetroEM {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]  # room for the longest line of code
smartquotes = False  # with them, --flags lose a dash

myst_heading_anchors = 3

# Docstrings have code in single backticks.
default_role = "literal"
napoleon_use_rtype = False  # a shape before a colon is not a type
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Docstrings state shapes, units and defaults; types of other packages have no page.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|np|numpy|pathlib|Path|collections)\b.*"),
    # Parts of the interface that the pages do not explain.
    ("py:class", r"metroem\.(pyramid\.StageInput|models\.tiling\.\w*Window)"),
]
