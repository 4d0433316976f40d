"""Settings of the site. To build it: ``sphinx-build -W docs docs/_build``; then open ``docs/_build/index.html``."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "lightning-optim"
author = "The lightning-optim authors"
copyright = author
release = version = version_of("lightning-optim")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "myst_parser",
    "arguments",
    "mathml",
    "pages",
    "references",
]
exclude_patterns = ["_build", "extensions"]

# Every cross reference is checked; `references.py` says how those to names without a page are.
nitpicky = True
default_role = "code"

# Docstrings have Google's sections. Types come from `arguments.py`.
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = False
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

myst_heading_anchors = 3

html_theme = "furo"
html_title = f"lightning-optim {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
