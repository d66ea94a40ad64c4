// The choices of a quiz become buttons: the chosen one is marked right or wrong, and the reason unfolds. The browser
// remembers it, and sends it nowhere. Without a script a question stays a list with a folded answer.
"use strict";

const QUIZ = {
  en: { right: "✓ right", wrong: "✗ wrong", again: "Start again", score: (n, done, all) => `${n} right, ${done} of ${all} answered` },
  ja: { right: "✓ 正解", wrong: "✗ 不正解", again: "もう一度解く", score: (n, done, all) => `${all} 問中 ${done} 問に回答、正解 ${n} 問` },
};

function inStorage(use) {
  try {
    return use(localStorage);
  } catch {
    return null; // a browser without storage forgets
  }
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

document.addEventListener("DOMContentLoaded", () => {
  const folds = [...document.querySelectorAll("details[data-right]")];
  if (!folds.length) return;
  const words = QUIZ[document.documentElement.lang] ?? QUIZ.en;
  const score = element("span", { role: "status" });
  const again = element("button", { type: "button", textContent: words.again });
  folds.at(-1).after(element("p", { className: "quiz-score" }, score, again));

  const questions = folds.map((fold) => {
    const key = `quiz ${fold.dataset.question}`;
    const list = fold.previousElementSibling;
    const texts = [...list.querySelectorAll("p")];
    const buttons = texts.map((text) => element("button", { type: "button" }, ...text.childNodes));
    const group = element("div", { className: "quiz", role: "group" }, ...buttons);
    list.previousElementSibling.id ||= key.replace(" ", "-");
    group.setAttribute("aria-labelledby", list.previousElementSibling.id);
    list.replaceWith(group);
    return { key, fold, buttons, right: fold.dataset.right, chosen: inStorage((all) => all.getItem(key)) };
  });

  function show() {
    for (const { buttons, right, chosen } of questions) {
      for (const [i, button] of buttons.entries()) {
        button.ariaPressed = chosen === "ABCD"[i];
        button.ariaDisabled = chosen !== null;
        button.className = !chosen ? "" : right === "ABCD"[i] ? "right" : chosen === "ABCD"[i] ? "wrong" : "";
        button.dataset.mark = words[button.className] ?? "";
      }
    }
    const done = questions.filter(({ chosen }) => chosen);
    score.textContent = words.score(done.filter(({ right, chosen }) => right === chosen).length, done.length, folds.length);
    again.hidden = !done.length;
  }

  for (const question of questions) {
    for (const [i, button] of question.buttons.entries()) {
      button.addEventListener("click", () => {
        if (question.chosen) return;
        question.chosen = "ABCD"[i];
        inStorage((all) => all.setItem(question.key, question.chosen));
        question.fold.open = true;
        show();
      });
    }
  }
  again.addEventListener("click", () => {
    for (const question of questions) {
      question.chosen = null;
      question.fold.open = false;
      inStorage((all) => all.removeItem(question.key));
    }
    show();
    questions[0].buttons[0].focus();
  });
  show();
});
