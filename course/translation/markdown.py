"""Markdown as messages: one message for each paragraph, item, heading and cell of a table that has words.

Where a line is broken does not matter. Code, formulas, HTML and what is without words are no messages and stay. In a
block of commands the comments are messages, and in a list of folders what is said of each.
"""

import re
from collections import Counter
from collections.abc import Callable

from course.notebooks import BUDGET

Say = Callable[[str], str]  # the English message -> what is to stand in its place
COMMANDS = re.compile(r"\s*```(sh)?$")
COMMENT = re.compile(r"(.*? # |[\w.]+/ {2,})(.+)")
FENCE = re.compile(r"\s*(```|~~~|\$\$|\\begin\{)")
NEXT_BLOCK = re.compile(r"\s*(#{1,6} |[-*>] |\d+\. |[|<]|```|~~~|\$\$|$)")
PREFIX = re.compile(r"\s*(?:(?:#{1,6}|[-*>]|\d+\.) +)*(?:\d\d · )?")  # marks of the block, and the number of a lesson
WHOLE_LINK = re.compile(r"\[([^][]+)\]\(([^()]+)\)")
SUMMARY = re.compile(r"(?<=<summary>).+?(?=</summary>)")
CELL = re.compile(r"(?<!\\)\|")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# Numbers that a run measures are no part of a message.
MEASURED = ("{} min", "{} GB", "core {} min, all {} min; exercises {} min")
KEPT = {  # what a translation must have as often as the English, and is taken out before the next is sought
    "code": re.compile(r"`[^`]+`"),
    "formulas": re.compile(r"(?<!\\)\$[^$]+\$"),
    "links": re.compile(r"\]\([^)\s]*\)"),
    "placeholders": re.compile(r"\{[^}]*\}+"),
    "numbers": NUMBER,
    "letters": re.compile(r"^[A-D](?=\. )"),  # of a choice in a quiz
}


def translated(text: str, say: Say) -> str:
    """The Markdown with each message said by `say`."""
    lines, made, i = text.split("\n"), [], 0
    while i < len(lines):
        line, start = lines[i], i
        i += 1
        if fence := FENCE.match(line):
            end = "\\end{" if fence[1] == "\\begin{" else fence[1]
            closed = end in line[fence.end() :]
            while not closed and i < len(lines):
                closed = end in lines[i]
                i += 1
            said = COMMANDS.match(line) is not None
            made += [comment(inner, say) if said else inner for inner in lines[start:i]]
        elif not line.strip():
            made.append(line)
        elif line.lstrip().startswith("<"):
            made.append(SUMMARY.sub(lambda found: block(found[0], say), line))
        elif line.startswith("|"):
            made.append(row(line, say))
        else:
            if not line.startswith("#"):
                while i < len(lines) and not NEXT_BLOCK.match(lines[i]):
                    i += 1
            made.append(block(" ".join([line.rstrip(), *(part.strip() for part in lines[start + 1 : i])]), say))
    return "\n".join(made)


def comment(line: str, say: Say) -> str:
    """A line of a block of commands or folders."""
    found = COMMENT.fullmatch(line)
    return found[1] + block(found[2], say) if found else line


def row(line: str, say: Say) -> str:
    """A row of a table."""
    cells = [cell.strip() for cell in CELL.split(line.strip().strip("|"))]
    if all(set(cell) <= set("-:") for cell in cells):
        return line
    return f"| {' | '.join(block(cell, say) for cell in cells)} |"


def block(text: str, say: Say) -> str:
    """A block; of one that is a link, the text of the link."""
    prefix = PREFIX.match(text)[0]
    words = text[len(prefix) :]
    if link := WHOLE_LINK.fullmatch(words):
        return f"{prefix}[{block(link[1], say)}]({link[2]})"
    if not has_words(words) or BUDGET.search(words):
        return text
    plain = words.replace("\u00a0", " ")
    if (template := NUMBER.sub("{}", plain)) in MEASURED:
        measured = say(template).format(*NUMBER.findall(plain))
        return prefix + (measured if plain == words else measured.replace(" ", "\u00a0"))
    return prefix + say(words)


def has_words(text: str) -> bool:
    """Whether there is something to translate beside code, formulas, images, tags and {{ names }}."""
    text = re.sub(r"!\[[^]]*\]\([^)]*\)|\]\([^)]*\)|<[^>]+>|\{\{ \w+ \}\}", " ", text)
    for kind in ("code", "formulas"):
        text = KEPT[kind].sub(" ", text)
    return re.search(r"[A-Za-z]{2}", text) is not None


def messages(text: str) -> list[str]:
    """The messages of the Markdown, in order."""
    found: list[str] = []
    translated(text, lambda message: found.append(message) or message)
    return found


def differences(english: str, other: str) -> list[str]:
    """What a translation has too much or too little of: "numbers: 3 is missing"."""
    found = []
    for kind, pattern in KEPT.items():
        here, there = (Counter(pattern.findall(text)) for text in (english, other))
        found += [f"{kind}: {value} is missing" for value in (here - there)]
        found += [f"{kind}: {value} is not in the English" for value in (there - here)]
        english, other = (pattern.sub(" ", text) for text in (english, other))
    return found
