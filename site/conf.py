"""Sphinx's settings for the book. `course.site` collects the sources and starts it; nothing is run or fetched."""

from course.site import japanese, pages
from helpers.colab import REPOSITORY, TAG

project = "LLM Workbook"
author = "LLM Workbook"
copyright = ""
version = TAG.removeprefix("v")
extensions = ["myst_nb", "sphinx_copybutton", "course.site.epub"]
exclude_patterns = ["static"]
templates_path = ["templates"]

# The notebooks are shown as they are committed.
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the setup"  # the one cell that is folded, the same in every lesson
nb_code_prompt_hide = "Hide the setup"
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# MathJax comes from an installed package instead of a server; only the files that are used are copied.
html_math_renderer = "mathjax"
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}

html_theme = "sphinx_book_theme"
html_title = "LLM Workbook"
html_css_files = ["book.css"]
html_js_files = ["book.js", "quiz.js"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = True  # the notebooks to download, as they are committed
html_sourcelink_suffix = ""
html_context = {"default_mode": "auto"}
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": TAG,
    "use_download_button": False,  # each lesson has its own at the top, where a phone shows it too
    "use_repository_button": True,
    "use_fullscreen_button": False,
    "article_header_end": ["language.html", "article-header-buttons.html"],
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_selector = "div.highlight pre"
copybutton_exclude = ".linenos, .gp, .go"

# The book for e-readers, from which the one for paper is printed
epub_basename = "llm-workbook"
epub_css_files = ["reading.css"]
epub_tocscope = "includehidden"
epub_tocdepth = 2
epub_show_urls = "no"
epub_use_index = False
epub_uid = epub_identifier = "llm-workbook"
epub_description = "A course on large language models in notebooks, where every claim is a measurement"
epub_contributor = "LLM Workbook"
epub_copyright = "Code: MIT. Text and figures: CC BY 4.0."


def setup(app):
    """Let `pages` change what Sphinx reads."""
    app.add_search_language(japanese.Search)
    app.connect("source-read", pages.prepare_source)
    app.connect("doctree-read", pages.describe_images)
    app.connect("html-page-context", japanese.offer_the_other_language)
    app.connect("build-finished", pages.copy_mathjax)
