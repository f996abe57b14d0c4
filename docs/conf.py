"""Sphinx's settings for the site that ``docs/build_site.py`` assembles and builds."""

from __future__ import annotations

import commhub

project = "commhub"
author = "The commhub developers"
release = version = commhub.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"commhub {release}"
html_show_sphinx = False
html_show_copyright = False

myst_heading_anchors = 3  # links to `#section` work as they do where the pages are read as files

default_role = "code"  # docstrings are written in Markdown's manner: `name` is code
add_module_names = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list: some are properties too, which would be described twice
