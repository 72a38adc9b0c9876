"""The site that `make docs` builds: Sphinx reads Markdown and notebooks by MyST-NB, and docstrings by autodoc."""

import os
import shutil
import typing
from pathlib import Path

from jax.typing import ArrayLike, DTypeLike
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

import castling_jax

DOCS = Path(__file__).parent
NOTEBOOKS = DOCS.parent / "notebooks"

project = "castling_jax"
author = copyright = "the castling_jax authors"
version = release = castling_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints", "notebooks/README.md"]  # notebooks.md includes the README

html_theme = "sphinx_book_theme"
html_title = "castling_jax"
html_theme_options = {"navbar_persistent": [], "show_toc_level": 2, "use_download_button": False}
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3  # so that a page links to another's section as on GitHub: models.md#other-attentions

# Docstrings are Google's, with `names` in single backticks: links where the name is on the site, code elsewhere.
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Returns"]  # prose: a colon in it does not follow a type
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
nitpicky = True
# Types of other packages, and names in docstrings that have no entry of their own.
nitpick_ignore_regex = [(r"py:(class|obj|data|exc)", r".*")]

# "off" shows the outputs that a notebook was saved with, "force" runs it first: make docs NOTEBOOKS=force.
nb_execution_mode = os.environ.get("NOTEBOOKS", "off")
nb_execution_timeout = 3600  # seconds per cell: a busy machine needs several times the times in notebooks/README.md
nb_execution_raise_on_error = True
nb_merge_streams = True  # lines printed one after another are one block
nb_execution_excludepatterns = ["notebooks/06_*"]  # needs a GPU or a TPU, and a network


def copy_notebooks(app: Sphinx) -> None:
    """Copies notebooks/ to docs/notebooks, because Sphinx reads pages below docs/ alone."""
    copies = DOCS / "notebooks"
    shutil.rmtree(copies, ignore_errors=True)
    if NOTEBOOKS.is_dir():
        shutil.copytree(NOTEBOOKS, copies)  # keeps the times of change, by which Sphinx knows what to read again


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Names JAX's types as the source does, rather than by what they are made of."""
    names = {"jaxlib._jax.Array": "Array"}
    for alias, union in (("ArrayLike", ArrayLike), ("DTypeLike", DTypeLike)):
        names[" | ".join(stringify_annotation(kind, "smart") for kind in typing.get_args(union))] = alias
    names = dict(sorted(names.items(), key=lambda item: -len(item[0])))  # a union before what is in it
    for spelt, alias in names.items():
        signature, returns = (text and text.replace(spelt, alias) for text in (signature, returns))
    return signature, returns


def setup(app: Sphinx) -> None:
    copy_notebooks(app)
    app.connect("autodoc-process-signature", shorten_signature)
    app.add_lexer("tree", TextLexer)  # the drawn house in architecture.md
