"""Sphinx's settings for the site in docs/_build/html: `make docs`. Nothing is fetched."""

from __future__ import annotations

from dual_policy_plugin import __version__

project = "dual-policy training"
author = "the authors of dual-policy training"
version = release = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
nitpicky = True
highlight_language = "none"
smartquotes = False  # --option stays two hyphens

html_theme = "furo"
html_title = "dual-policy training"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
