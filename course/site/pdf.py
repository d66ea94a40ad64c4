"""The book on paper: the pages of the EPUB joined to one, which Chromium prints with bookmarks and page numbers.

MathJax draws the formulas with its own fonts, since Chromium would take for MathML whatever fonts there are. What is
folded is unfolded, but the solutions and the answers move to the end of their lesson.
"""

import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree as XML

from course.site.chromium import page_with_mathjax

XHTML = "{http://www.w3.org/1999/xhtml}"
PACKAGE = "{http://www.idpf.org/2007/opf}"
# In the browser: draw each formula from the TeX beside its MathML; unfold, and move solutions to the end.
PREPARE = """() => {
    for (const math of document.querySelectorAll('math')) {
        const tex = math.getAttribute('alttext'), display = math.getAttribute('display') === 'block';
        const drawn = MathJax.tex2chtml(tex, {display});
        drawn.role = 'img';  // one thing to read aloud, not one for each sign
        drawn.ariaLabel = tex;
        math.replaceWith(drawn);
    }
    document.head.append(MathJax.chtmlStylesheet());
    for (const span of document.querySelectorAll('pre span, code span'))  // each would be an entry of the PDF
        if (!/^[cks]/.test(span.className)) span.replaceWith(...span.childNodes);
    document.body.normalize();
    for (const page of document.querySelectorAll('body > section')) {
        const folded = [...page.querySelectorAll('details:not(.hide)')];
        const solved = folded.filter(box => ['Solution', 'Answer'].includes(box.firstElementChild.textContent));
        for (const box of folded) box.open = true;
        if (!solved.length) continue;
        const end = document.createElement('section'), title = document.createElement('h2'), count = {};
        title.textContent = 'Solutions and answers';
        end.append(title);
        for (const box of solved) {
            const kind = box.firstElementChild, link = document.createElement('a');
            count[kind.textContent] = (count[kind.textContent] ?? 0) + 1;
            kind.textContent += ` ${count[kind.textContent]}`;
            box.id = `${page.id}--${kind.textContent.replace(' ', '-')}`;
            link.href = `#${box.id}`;
            link.textContent = `${kind.textContent}: at the end of the lesson`;
            box.replaceWith(link);
            end.append(box);
        }
        page.append(end);
    }
}"""
# Chromium would print the whole book smaller for the sake of one formula that is wider than the paper.
FIT = """() => {
    for (const drawn of document.querySelectorAll('mjx-container')) {
        const {left, right, width} = drawn.firstElementChild.getBoundingClientRect();
        const room = Math.max(document.body.clientWidth - Math.max(left, 0), 100);
        if (right > document.body.clientWidth)
            drawn.style.setProperty('font-size', `${Math.min(115, 113 * room / width)}%`, 'important');
    }
}"""
PAGE_WIDTH = 657  # CSS pixels between the margins of A4
PAGE_NUMBER = (
    '<div style="width: 100%; font: 8px sans-serif; text-align: center"><span class="pageNumber"></span></div>'
)


def print_book(folder: Path, out: Path) -> None:
    """Print the pages that the EPUB builder left in the folder; CourseError without Chromium."""
    joined = folder / "joined.xhtml"
    joined.write_bytes(join(folder))
    with page_with_mathjax(joined.as_uri()) as page:
        page.evaluate(PREPARE)
        page.evaluate("() => Promise.all([...document.fonts].map(font => font.load()))")
        page.emulate_media(media="print")
        page.set_viewport_size({"width": PAGE_WIDTH, "height": 1000})
        page.evaluate(FIT)
        page.pdf(
            path=out,
            format="A4",
            print_background=True,
            outline=True,
            tagged=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=PAGE_NUMBER,
            margin={"top": "16mm", "bottom": "18mm", "left": "18mm", "right": "18mm"},
        )


def join(folder: Path) -> bytes:
    """All pages of the book as one, the contents after the first. A link to a page leads to its place in this one."""
    package = XML.parse(folder / "content.opf").getroot()
    files = {item.get("id"): item.get("href", "") for item in package.iter(f"{PACKAGE}item")}
    first, *others = (files[item.get("idref")] for item in package.iter(f"{PACKAGE}itemref"))
    pages = [first, "nav.xhtml", *others]
    book = XML.parse(folder / first).getroot()
    body = XML.Element(f"{XHTML}body")
    for name in pages:
        page = XML.parse(folder / name).getroot()
        section = XML.SubElement(body, f"{XHTML}section")
        section.extend(
            page.find(f".//{XHTML}body") if name == "nav.xhtml" else page.find(f".//{XHTML}div[@class='body']")
        )
        lead_within(section, name, pages)
    book.remove(book.find(f"{XHTML}body"))
    book.append(body)
    XML.register_namespace("", XHTML.strip("{}"))
    return XML.tostring(book, encoding="utf-8", xml_declaration=True)


def anchor(page: str, fragment: str = "") -> str:
    """The name that a place in a page has in the joined one."""
    return re.sub(r"\W", "-", page) + (f"--{fragment}" if fragment else "")


def lead_within(section: XML.Element, page: str, pages: list[str]) -> None:
    """Name the places of a page so that they differ from those of others, and mend links and addresses of images."""
    for element in section.iter():
        if (name := element.get("id")) and name != "arrow":  # the map's arrowhead is found by its name
            element.set("id", anchor(page, name))
        for key in ("href", "src"):
            parts = urlsplit(element.get(key, ""))
            if parts.scheme or key not in element.attrib:
                continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), parts.path)) if parts.path else page
            element.set(key, f"#{anchor(target, parts.fragment)}" if target in pages else target)
    section.set("id", anchor(page))
