"""Sphinx's settings. The site: `python -m sphinx -W -n docs build/site`.

Nothing here is fetched from a network, and no notebook runs: the environment variable
FISHERFLOW_NOTEBOOKS names a folder of executed copies, shown in place of the kept ones.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

project = "fisherflow_jax"
author = "The fisherflow_jax authors"
copyright = author
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton", "extension"]
exclude_patterns = ["generated/.*"]
html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
smartquotes = False

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
suppress_warnings = ["mystnb.unknown_mime_type"]

# What is copied is the program: without prompts, without what it printed.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

python_maximum_signature_line_length = 72
toc_object_entries_show_parents = "hide"
