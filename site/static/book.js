// What is wider than the page scrolls by itself; a keyboard reaches it only if it can have the focus.
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
  for (const button of document.querySelectorAll("nav.bd-links summary")) {
    button.setAttribute("aria-label", "Show the parts");
  }
});

window.addEventListener("load", letScrollableHaveFocus);
window.addEventListener("resize", letScrollableHaveFocus);
document.addEventListener("toggle", letScrollableHaveFocus, true);
