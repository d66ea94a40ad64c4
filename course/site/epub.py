"""The book for e-readers: Sphinx's EPUB, with formulas as MathML and without what needs a script.

MathJax writes the formulas while the book is made, since readers of EPUB run no scripts.
"""

import re
from collections.abc import Set
from typing import Any
from xml.etree import ElementTree as XML

from docutils import nodes
from docutils.nodes import Element
from sphinx.application import Sphinx
from sphinx.builders.epub3 import Epub3Builder
from sphinx.errors import SphinxError
from sphinx.util.math import wrap_displaymath
from sphinx.writers.html5 import HTML5Translator

from course.site.chromium import page_with_mathjax

# What the body of a page has for the browser alone: buttons to download, the calculator, addresses inside drawings, and
# two names of a fold.
FOR_BROWSERS = (
    (re.compile(r' *<a [^>]*\bdownload="[^>]*>.*?</a>'), ""),
    (re.compile(r'<div id="calculator".*?<noscript>(.*?)</noscript>.*</script>', re.DOTALL), r"\1"),
    (re.compile(r'(?<=<a href=")(notebooks/\w+)\.html(?=")'), r"\1.xhtml"),
    (re.compile(r'(?<=<summary) [^>]*>\s*<p class="collapsed[^>]*>(.*?)</p>.*?(?=</summary>)', re.DOTALL), r">\1"),
)
STYLES = re.compile("mystnb|copybutton")  # of extensions, for the browser alone
PROPERTIES = {"mathml": "{http://www.w3.org/1998/Math/MathML}math", "svg": "{http://www.w3.org/2000/svg}svg"}
TYPESET = """formulas => formulas.map(([tex, display]) => {
    const math = new DOMParser().parseFromString(MathJax.tex2mml(tex, {display}), "application/xml").documentElement;
    math.setAttribute("alttext", tex.trim());
    return new XMLSerializer().serializeToString(math).replace(/ data-mjx-\\w+="[^"]*"|\\n */g, "");
})"""


class EpubBuilder(Epub3Builder):
    """Sphinx's builder, with MathML, and a package file that says which pages hold formulas and drawings."""

    math_renderer_name = "mathml"

    def prepare_writing(self, docnames: Set[str]) -> None:
        """Have MathJax write all formulas of the book."""
        super().prepare_writing(docnames)
        is_formula = (nodes.math, nodes.math_block)
        doctrees = map(self.env.get_doctree, docnames)
        found = {
            tex(node) for doctree in doctrees for node in doctree.findall(lambda node: isinstance(node, is_formula))
        }
        formulas = sorted(found)
        with page_with_mathjax() as page:
            self.formulas = dict(zip(formulas, page.evaluate(TYPESET, formulas), strict=True))

    def build_content(self) -> None:
        """Write content.opf; SphinxError if a page is not XML."""
        super().build_content()

        def with_properties(item: re.Match) -> str:
            try:
                tags = {element.tag for element in XML.parse(self.outdir / item[2]).iter()}
            except XML.ParseError as error:
                raise SphinxError(f"{item[2]} is not XML ({error}): close its tags in the source.") from None
            found = " ".join(name for name, tag in PROPERTIES.items() if tag in tags)
            return f'{item[1]} properties="{found}" />' if found else item[0]

        path = self.outdir / "content.opf"
        items = re.compile(r'(<item id="[^"]*" href="([^"]*\.xhtml)" media-type="[^"]*") />')
        path.write_text(items.sub(with_properties, path.read_text(encoding="utf-8")), encoding="utf-8")


def tex(node: Element) -> tuple[str, bool]:
    """The formula's source, and whether it stands on a line of its own."""
    if isinstance(node, nodes.math):
        return node.astext(), False
    if node.get("no-wrap", node.get("nowrap")):
        return node.astext(), True
    return wrap_displaymath(node.astext(), None, False), True


def write_formula(translator: HTML5Translator, node: Element) -> None:
    """Put the MathML of a formula into the page."""
    translator.body.append(translator.builder.formulas[tex(node)])
    raise nodes.SkipNode


def leave_out(app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Take out of a page what only a browser can use."""
    if app.builder.name == "epub" and "body" in context:
        for found, instead in FOR_BROWSERS:
            context["body"] = found.sub(instead, context["body"])
        context["css_files"] = [file for file in context["css_files"] if not STYLES.search(str(file.filename))]


def setup(app: Sphinx) -> None:
    """Register all of it; Sphinx calls this where conf.py lists the module as an extension."""
    app.add_builder(EpubBuilder, override=True)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("html-page-context", leave_out)
