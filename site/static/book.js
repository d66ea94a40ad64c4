// What is wider than the page scrolls by itself; a keyboard reaches it only if it can have the focus. Further sections
// are folded.
"use strict";

function letScrollableHaveFocus() {
  const selector = "pre, div.math, .pst-scrollable-table-container, .lesson-map";
  for (const region of document.querySelectorAll(selector)) {
    if (region.scrollWidth > region.clientWidth) region.tabIndex = 0;
    else region.removeAttribute("tabindex");
  }
}

// The theme's button that unfolds the parts of a page in the contents has an icon and no name.
document.addEventListener("DOMContentLoaded", () => {
  const label = document.documentElement.lang === "ja" ? "下位のページを表示" : "Show the parts";
  for (const button of document.querySelectorAll("nav.bd-links summary")) {
    button.setAttribute("aria-label", label);
  }
});

// A further section is folded under its heading, unless a link or the search leads into it.
function foldFurtherSections() {
  for (const mark of document.querySelectorAll("p.further")) {
    const section = mark.closest("section");
    const fold = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = mark.textContent;
    fold.className = "further";
    const rest = [...section.children].slice(1);
    mark.remove();
    fold.append(summary, ...rest);
    section.append(fold);
  }
}

function openWhatIsAskedFor() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const fold = target?.closest("details.further") ?? target?.querySelector(":scope > details.further");
  if (!fold || fold.open) return;
  fold.open = true;
  target.scrollIntoView();
}

document.addEventListener("DOMContentLoaded", () => {
  foldFurtherSections();
  openWhatIsAskedFor();
});
window.addEventListener("hashchange", openWhatIsAskedFor);
window.addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details.further")) fold.open = true;
});

window.addEventListener("load", letScrollableHaveFocus);
window.addEventListener("resize", letScrollableHaveFocus);
document.addEventListener("toggle", letScrollableHaveFocus, true);
