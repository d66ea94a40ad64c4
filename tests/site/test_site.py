"""The book as a reader meets it: built once, its HTML read as text, then every page opened in a browser."""

import json
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup, Tag

from course import notebooks
from course.claims.ledger import read_ledger
from course.rehearsal.report import read_report
from course.site.chromium import FLAGS, NAMES
from course.slides.sections import figures
from helpers.colab import badges
from helpers.profiles import ROOT
from tests.site.calculator_cases import CASES

pytestmark = pytest.mark.slow
NOTEBOOKS = notebooks.select_notebooks()
CASE_ROWS = json.loads(CASES.read_text(encoding="utf-8"))
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


def build(out: Path, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """Run the command of `make site`."""
    command = [sys.executable, "-m", "course", "site", "--out", str(out)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the book."""
    out = tmp_path_factory.mktemp("site") / "book"
    done = build(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(out / "index.html") in done.stdout
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, BeautifulSoup]:
    """Every page by its path in the book."""
    files = sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)
    return {
        str(path.relative_to(site)): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in files
    }


def lesson_pages(pages: dict[str, BeautifulSoup]) -> Iterator[tuple[Path, BeautifulSoup]]:
    for path in NOTEBOOKS:
        yield path, pages[f"notebooks/{path.stem}.html"]


def content(page: BeautifulSoup) -> Tag:
    return page.find("article")


# The HTML


def test_every_lesson_document_and_model_card_has_a_page_that_the_contents_list(pages):
    expected = {f"notebooks/{path.stem}.html" for path in NOTEBOOKS}
    for pattern in ("docs/*.md", "data/*/README.md"):
        expected |= {str(path.relative_to(ROOT).with_suffix(".html")) for path in ROOT.glob(pattern)}
    expected |= {
        "index.html",
        "lesson_map.html",
        "glossary.html",
        "claims.html",
        "rehearsal.html",
        "memory_calculator.html",
        "search.html",
    }
    assert expected <= pages.keys()
    assert {str(path.relative_to(ROOT).with_suffix(".html")) for path in ROOT.glob("docs/*/*.md")} <= pages.keys()
    listed = {link["href"] for link in pages["index.html"].select("nav.bd-links a[href]")}
    assert expected - {"index.html", "search.html"} <= listed


def test_programs_that_read_find_every_lesson(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    found = re.findall(r"^- \[.+?\]\((.+?)\)(?:: .{40,})?$", text, re.MULTILINE)
    assert len(found) == len(NOTEBOOKS) + 1 and all((site / path).is_file() for path in found)


def test_links_and_anchors_resolve_and_nothing_is_loaded_from_elsewhere(site, pages):
    anchors = {name: {tag["id"] for tag in page.find_all(id=True)} for name, page in pages.items()}
    wrong = []
    for name, page in pages.items():
        for tag in page.find_all(["a", "img", "script", "link", "source", "iframe"]):
            address = tag.get("href") or tag.get("src") or ""
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if tag.name != "a" and parts.scheme != "data":
                    wrong.append(f"{name} loads {address[:80]}")
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            if not target.resolve().is_file():
                wrong.append(f"{name} links to {address}, which is not there")
            elif parts.fragment and target.suffix == ".html":
                there = str(target.resolve().relative_to(site.resolve()))
                if unquote(parts.fragment) not in anchors[there]:
                    wrong.append(f"{name} links to {address}, and there is no such anchor")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_figures_have_the_alternative_texts_of_their_notebook(pages):
    for path, page in lesson_pages(pages):
        texts = [
            output.metadata["image/png"]["alt"]
            for cell in notebooks.read_notebook(path).cells
            for output in cell.get("outputs", [])
            if "image/png" in output.get("data", {})
        ]
        assert texts, path.stem
        assert [image["alt"] for image in page.select(".cell_output img")] == texts
    for name, page in pages.items():
        assert all(image.get("alt", "").strip() for image in page.find_all("img")), name


def test_solutions_and_hints_are_folded(pages):
    for path, page in lesson_pages(pages):
        markdown = [cell.source for cell in notebooks.read_notebook(path).cells if cell.cell_type == "markdown"]
        folded = [box for box in content(page).find_all("details") if "hide" not in box.get("class", [])]
        assert len(folded) == sum(source.count("<details>") for source in markdown), path.stem
        assert not any(box.has_attr("open") for box in folded)
        code = [box for box in folded if "Solution" in box.summary.get_text()]
        assert code, path.stem
        assert all(box.select("div.highlight pre") for box in code), path.stem


def test_a_lesson_offers_the_committed_notebook_colab_and_kaggle(site, pages):
    for path, page in lesson_pages(pages):
        colab, kaggle, download = page.select(".lesson-buttons a")
        assert colab["href"] in badges(path.stem) and kaggle["href"] in badges(path.stem)
        notebook = (site / "notebooks" / download["href"]).resolve()
        assert notebook.read_bytes() == path.read_bytes()
        assert not page.select("img[src*='colab-badge'], img[src*='open-in-kaggle']")


def test_a_lesson_lists_its_sections_beside_the_text(pages):
    for path, page in lesson_pages(pages):
        listed = page.select("#pst-secondary-sidebar a[href^='#']")
        assert len(listed) >= len(content(page).find_all("h2")) > 3, path.stem


def test_the_map_draws_each_lesson_and_an_arrow_for_each_direct_prerequisite(pages):
    drawing = content(pages["lesson_map.html"]).find("svg")
    assert [link["href"] for link in drawing.find_all("a")] == [f"notebooks/{path.stem}.html" for path in NOTEBOOKS]
    needs = {path.stem[:2]: notebooks.read_notebook(path).metadata.workbook.prerequisites for path in NOTEBOOKS}

    def everything(lesson: str) -> set[str]:
        return set(needs[lesson]).union(*(everything(before) for before in needs[lesson]))

    direct = [
        (before, lesson)
        for lesson in needs
        for before in needs[lesson]
        if not any(before in everything(other) for other in needs[lesson])
    ]
    assert len(drawing.select(".arrows path")) == len(direct)


def test_what_is_not_complete_does_not_replace_the_book(tmp_path):
    folder, out = tmp_path / "course", tmp_path / "book"
    for name in ("course", "site", "helpers", "data"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "notebooks").mkdir()
    shutil.copy(NOTEBOOKS[0], folder / "notebooks")
    out.mkdir()
    (out / "index.html").write_text("the older one")
    index = folder / "site/index.md"
    index.write_text(index.read_text(encoding="utf-8") + "\n[nowhere](not_there.md)\n", encoding="utf-8")
    done = build(out, folder)
    assert done.returncode == 2
    assert "not_there.md" in done.stderr
    assert (out / "index.html").read_text() == "the older one"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_start_page_shows_the_headline_figures_with_their_texts(pages):
    shown = {image["alt"] for image in content(pages["index.html"]).select("#lessons img")}
    for path in NOTEBOOKS:
        if (ROOT / "figures" / f"{path.stem}.png").exists():
            cells = [cell for cell in notebooks.read_notebook(path).cells if "headline" in notebooks.tags(cell)]
            assert next(alt for cell in cells for _, alt in figures(cell)) in shown


def test_the_ledger_has_a_table_for_each_lesson_that_is_in_it(pages):
    ledger = read_ledger()
    tables = content(pages["claims.html"]).find_all("table")
    assert [len(table.select("tbody tr")) for table in tables] == [len(lesson.claims) for lesson in ledger.values()]


def test_the_rehearsal_has_a_row_for_each_lesson_on_each_gpu(pages):
    tables = content(pages["rehearsal.html"]).find_all("table")
    assert [len(table.select("tbody tr")) for table in tables] == [len(NOTEBOOKS)] * len(read_report())


def test_each_question_of_a_quiz_is_marked_with_its_answer_and_both_languages_agree(pages):
    def answers(page: BeautifulSoup) -> dict[str, str]:
        return {box["data-question"]: box["data-right"] for box in page.select("details[data-right]")}

    for path, page in lesson_pages(pages):
        quiz = [cell.source for cell in notebooks.read_notebook(path).cells if "quiz" in notebooks.tags(cell)]
        right = [re.search(r"</summary>\n\n([A-D])\. ", source)[1] for source in quiz]
        assert list(answers(page).values()) == right and len(right) == 5, path.stem
        assert answers(pages[f"ja/notebooks/{path.stem}.html"]) == answers(page)


# The Japanese part


def test_each_lesson_has_a_japanese_page_with_its_quiz_folded(pages):
    for path in NOTEBOOKS:
        page = pages[f"ja/notebooks/{path.stem}.html"]
        quiz = [cell for cell in notebooks.read_notebook(path).cells if "quiz" in notebooks.tags(cell)]
        folded = content(page).find_all("details")
        assert [box.summary.get_text() for box in folded] == ["答え"] * len(quiz), path.stem
        assert not any(box.has_attr("open") for box in folded)


def test_a_page_leads_to_itself_in_the_other_language_or_to_its_start_page(pages):
    for name, page in pages.items():
        own, link = page.html["lang"], page.select_one("a.language")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(name), link["href"]))
        assert own == ("ja" if name.startswith("ja/") else "en")
        assert pages[there].html["lang"] == link["lang"] != own
        assert there in (name.removeprefix("ja/"), f"ja/{name}", "ja/index.html")
        assert (there == "ja/index.html") <= (name == "index.html" or f"ja/{name}" not in pages or "genindex" in name)


def test_no_english_sentence_is_left_on_a_japanese_page(pages):
    for name in (name for name in pages if name.startswith("ja/") and "search" not in name):
        text = BeautifulSoup(str(content(pages[name])), "html.parser")
        for tag in text.select("code, .math, script, svg"):
            tag.replace_with("x")
        words = re.sub("「[^」]*」", "", text.get_text())  # a figure's title is quoted as it stands in the lesson
        assert not re.search(r"[A-Za-z]+(?: [a-z]+){4}", words), name


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A page whose complaints and requests to a network are collected in `page.wrong`."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    context.set_offline(True)
    opened = context.new_page()
    opened.wrong = []
    opened.on("console", lambda message: message.type == "error" and opened.wrong.append(message.text))
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.on(
        "request",
        lambda request: request.url.startswith(("file:", "data:", "blob:")) or opened.wrong.append(request.url),
    )
    yield opened
    context.close()


def show(page, site: Path, name: str) -> None:
    """Open a page, wait until its mathematics is typeset, and unfold what is folded."""
    page.goto((site / name).as_uri())
    page.evaluate("() => window.MathJax ? MathJax.startup.promise : null")
    page.evaluate("() => document.querySelectorAll('details').forEach(box => box.open = true)")


def resize(page, width: int) -> None:
    """Change the width of the window, and wait until the page has followed: the theme does so after 300 ms."""
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(500)


# A lesson holds up to 20,000 pieces of coloured code, and axe would look at each. One of each kind stays, with the
# colours that all of its kind have; a formula, drawn in the colour of the text, stays as a name; of a long table the
# first rows stay.
ONE_OF_EACH_KIND = """() => {
    const seen = new Set();
    for (const span of document.querySelectorAll('.highlight pre span')) {
        const kind = (span.closest('.cell_output') ? 'output ' : '') + span.className;
        if (seen.has(kind)) span.replaceWith(...span.childNodes);
        seen.add(kind);
    }
    for (const pre of document.querySelectorAll('pre')) pre.normalize();
    for (const row of document.querySelectorAll('tbody tr:nth-child(n + 9)')) row.remove();
    for (const drawing of document.querySelectorAll('mjx-container > *')) drawing.replaceWith('formula');
    const style = document.createElement('style');
    style.textContent = '* {transition: none !important}';
    document.head.append(style);
}"""


def serious(page, rules: list[str] | None = None, within: str = "html") -> list[str]:
    """What axe-core calls serious or critical on the page as it is, by all its rules or by these, within a selector."""
    options = {"resultTypes": ["violations"], "preload": False} | ({"runOnly": rules} if rules else {})
    if not page.evaluate("() => Boolean(window.axe)"):
        import axe_playwright_python

        page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    results = page.evaluate("([within, options]) => axe.run(within, options)", [within, options])
    return [
        f"{finding['id']}: {node['html'][:150]} {node.get('failureSummary', '')[:200]}"
        for finding in results["violations"]
        if finding["impact"] in ("serious", "critical")
        for node in finding["nodes"][:3]
    ]


def test_every_page_loads_fits_a_phone_and_is_accessible_in_light_and_dark(site, pages, page):
    wrong = []
    alike = [
        f"ja/notebooks/{path.stem}.html" for path in NOTEBOOKS[1:]
    ]  # short pages of one kind, of which one is shown
    for name in (name for name in pages if name not in alike):
        page.set_viewport_size({"width": 390, "height": 900})
        show(page, site, name)
        errors = page.locator("mjx-merror, [data-mjx-error]").count()
        wrong += [f"{name}: a formula has errors"] * errors
        width = page.evaluate("() => document.documentElement.scrollWidth")
        if width > 390:
            wrong.append(f"{name}: {width} pixels wide on a phone of 390")
        resize(page, 1280)
        page.evaluate(ONE_OF_EACH_KIND)
        for scheme, rules in {"light": None, "dark": ["color-contrast"]}.items():  # only colours differ
            page.evaluate(f"() => {{ document.documentElement.dataset.theme = '{scheme}' }}")
            wrong += [f"{name}, {scheme}: {finding}" for finding in serious(page, rules)]
        wrong += [f"{name}: {problem}" for problem in page.wrong]
        page.wrong.clear()
    assert not wrong, "\n".join(wrong)


def test_mathematics_is_typeset_code_can_be_copied_and_the_theme_changed(site, page):
    show(page, site, "notebooks/03_pretraining.html")
    assert page.locator("mjx-container").count() > 10
    assert page.locator("button.copybtn").count() > 10
    for theme in ("dark", "light"):
        page.locator("button.theme-switch-button:visible").first.click()
        page.locator(f"button.theme-change-button[data-mode={theme}]:visible").first.click()
        assert page.evaluate("() => document.documentElement.dataset.theme") == theme


def test_a_line_of_88_columns_fits_beside_both_sidebars(site, page):
    show(page, site, "notebooks/13_analysis_and_theory.html")
    resize(page, 1280)
    overhang = """() => {
        const code = document.querySelector('.cell_input pre');
        code.textContent = 'x'.repeat(88);
        return code.scrollWidth - code.clientWidth;
    }"""
    assert page.evaluate(overhang) <= 0
    assert page.locator(".bd-sidebar-primary").is_visible() and page.locator(".bd-sidebar-secondary").is_visible()


@pytest.mark.parametrize(
    ("start", "word", "lesson"),
    [
        ("search.html", "quantised", "10_compression"),
        ("ja/search.html", "量子化", "10_compression"),
        ("ja/search.html", "蒸留", "10_compression"),
        ("ja/search.html", "報酬モデル", "08_rlhf"),
    ],
)
def test_search_finds_the_lesson_about_a_word(site, page, start, word, lesson):
    page.goto(f"{(site / start).as_uri()}?q={word}")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.getAttribute('href'))")
    assert any(lesson in address for address in found)


def test_the_browser_answers_as_the_table_says(site, page):
    show(page, site, "memory_calculator.html")
    got = page.evaluate(
        """cases => cases.map(({model, purpose, changes, settings}) => {
            const shape = {...CALCULATOR.shapes[model], ...changes};
            return purpose === "training" ? estimateTraining(shape, settings) : estimateInference(shape, settings);
        })""",
        CASE_ROWS,
    )
    different = [case["model"] for case, found in zip(CASE_ROWS, got, strict=True) if found != case["expected"]]
    assert not different


def fill_form(page, case: dict) -> None:
    """Enter a case as a reader would."""
    page.select_option("[name=model]", case["model"])
    page.locator("#calculator details").evaluate("box => box.open = true")
    for name, value in case["changes"].items():
        enter(page.locator(f"[name={name}]"), value)
    page.check(f"[name=purpose][value={case['purpose']}]")
    for name, value in {"zero_stage": 0, "num_gpus": 1, **case["settings"]}.items():
        field = page.locator(f"#{case['purpose']}-fields [name={name}]")
        if field.count():
            enter(field, value)


def enter(field, value) -> None:
    if isinstance(value, bool):
        field.set_checked(value)
    elif field.evaluate("field => field.tagName") == "SELECT":
        field.select_option("" if value is None else str(value))
    else:
        field.fill(str(value))


def test_the_form_shows_the_numbers_of_the_table(site, page):
    resize(page, 390)
    show(page, site, "memory_calculator.html")
    for case in CASE_ROWS[::9]:
        fill_form(page, case)
        expected = case["expected"]
        total = page.locator("#calculator-total")
        assert int(total.get_attribute("data-bytes")) == expected["total"], case
        assert f"{expected['total']:,} bytes" in total.inner_text()
        rows = page.eval_on_selector_all(
            "#calculator-result tbody tr",
            "rows => rows.map(row => [...row.cells].slice(1).map(cell => [cell.dataset.bytes, cell.innerText]))",
        )
        phases = expected["phases"]
        for part, cells in zip(expected["parts"], rows[:-1], strict=True):
            wanted = [[str(phases[name][part]), f"{phases[name][part] / 2**30:.2f}"] for name in phases]
            assert cells == wanted, (case, part)
    assert not page.wrong


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seq_len", "0", "Tokens in a row: enter a whole number of at least 1."),
        ("num_kv_heads", "5", "Key and value heads: enter a divisor of the number of heads."),
        ("zero_stage", "3", "GPUs: with one there is nothing to divide"),
    ],
)
def test_the_form_says_what_is_wrong_with_an_entry(site, page, name, value, said):
    show(page, site, "memory_calculator.html")
    enter(page.locator(f"[name={name}]"), value)
    assert said in page.locator("#calculator-result [role=alert]").inner_text()
    assert not page.wrong


def test_further_sections_are_folded_and_a_link_into_one_opens_it(site, page):
    def further(path: Path) -> int:
        return sum("further" in notebooks.tags(cell) for cell in notebooks.read_notebook(path).cells)

    path = max(NOTEBOOKS, key=further)
    address = (site / f"notebooks/{path.stem}.html").as_uri()
    page.goto(address)
    folds = page.locator("section > details.further")
    assert folds.count() == further(path) > 0
    assert not any(fold.evaluate("fold => fold.open") for fold in folds.all())
    page.goto(f"{address}#{folds.first.evaluate('fold => fold.parentElement.id')}")
    assert folds.first.evaluate("fold => fold.open") and not folds.last.evaluate("fold => fold.open")


def test_a_choice_is_marked_right_or_wrong_with_its_reason_and_both_languages_remember_it(site, page):
    def marks(question: int) -> list[str]:
        buttons = page.locator(".quiz").nth(question).locator("button")
        return buttons.evaluate_all("buttons => buttons.map(button => button.className)")

    lesson = f"notebooks/{NOTEBOOKS[7].stem}.html"
    page.goto((site / lesson).as_uri())
    folds = page.locator("details[data-right]")
    right = folds.evaluate_all("folds => folds.map(fold => 'ABCD'.indexOf(fold.dataset.right))")
    score = page.locator(".quiz-score [role=status]")
    assert score.inner_text() == "0 right, 0 of 5 answered"
    page.locator(".quiz").nth(0).locator("button").nth(right[0]).click()
    wrong = (right[1] + 1) % 4
    page.locator(".quiz").nth(1).locator("button").nth(wrong).focus()
    page.keyboard.press("Enter")
    assert marks(0) == ["right" if i == right[0] else "" for i in range(4)]
    assert marks(1) == [{right[1]: "right", wrong: "wrong"}.get(i, "") for i in range(4)]
    assert folds.evaluate_all("folds => folds.map(fold => fold.open)") == [True, True, False, False, False]
    page.locator(".quiz").nth(1).locator("button").nth(right[1]).click(force=True)  # too late
    assert score.inner_text() == "1 right, 2 of 5 answered"
    resize(page, 390)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 390
    for scheme in ("light", "dark"):
        page.evaluate(f"() => {{ document.documentElement.dataset.theme = '{scheme}' }}")
        page.wait_for_timeout(500)  # the theme fades colours
        assert serious(page, within=".quiz, .quiz-score") == []
    page.goto((site / "ja" / lesson).as_uri())
    assert marks(1) == [{right[1]: "right", wrong: "wrong"}.get(i, "") for i in range(4)]
    assert score.inner_text() == "5 問中 2 問に回答、正解 1 問"
    page.locator(".quiz-score button").click()
    assert not any(marks(0) + marks(1))
    page.reload()
    assert score.inner_text() == "5 問中 0 問に回答、正解 0 問"
    assert not page.wrong


def test_without_a_script_the_quiz_is_a_list_with_a_folded_answer(browser, site):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((site / f"notebooks/{NOTEBOOKS[7].stem}.html").as_uri())
    assert page.locator(".quiz").count() == 0
    assert page.locator("ul + details[data-right] > summary").count() == 5
    assert page.locator("ul:has(+ details[data-right]) > li").count() == 20
    context.close()
