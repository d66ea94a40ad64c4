"""What of a lesson's text stands on the slides: first sentences, formulas, lists and tables."""

import re

PROTECTED = re.compile(r"\$[^$]+\$|`[^`]+`")  # formulas and code, in which no sentence ends
SENTENCE_END = re.compile(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bDr)[.!?][*\")]*\s+(?=[A-Z*\"(\x00])")
LEAD = re.compile(r"\*\*[^*]+[.?:]\*\*\s+")  # such as **What you see.**
ENOUGH = 60  # characters: a shorter sentence says too little without the next one


def blocks(text: str) -> list[str]:
    """Paragraphs, formulas, lists, tables, headings and code of a markdown text."""
    text = re.sub(r"^(\$\$.+?\$\$)$", r"\n\1\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"([^\n])\n((?:[-*]|\d+\.) )", lambda m: "\n".join(m.groups()), text)
    parts = re.split(r"^(```.*?^```)$", text, flags=re.DOTALL | re.MULTILINE)  # code may have empty lines
    found = [[part] if part.startswith("```") else re.split(r"\n\s*\n", part) for part in parts]
    return [block.strip() for blocks_of_part in found for block in blocks_of_part if block.strip()]


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph; its bold lead belongs to the first of them."""
    kept = PROTECTED.findall(text)
    plain = PROTECTED.sub("\x00", text.replace("\n", " "))
    start = lead.end() if (lead := LEAD.match(plain)) else 0
    ends = [match.end() for match in SENTENCE_END.finditer(plain) if match.end() > start]
    pieces = [plain[a:b].strip() for a, b in zip([0, *ends], [*ends, len(plain)], strict=True)]
    originals = iter(kept)
    found: list[str] = []
    for piece in (re.sub("\x00", lambda _: next(originals), piece) for piece in pieces if piece):
        if found and is_open(found[-1]):
            found[-1] += f" {piece}"
        else:
            found.append(piece)
    return found


def is_open(text: str) -> bool:
    """Whether the text ends in the middle of emphasis or of brackets, or with a number that begins a sentence."""
    plain = PROTECTED.sub("", text)
    if re.search(r"(?:^|[.*] )\d\.$", plain):
        return True
    return plain.replace("**", "").count("*") % 2 == 1 or plain.count("(") > plain.count(")")


def kind_of(block: str) -> str:
    """What a block is: heading, formula, table, list, code, image or text."""
    if block.startswith("$$"):
        return "formula"
    starts = {"#": "heading", "|": "table", "```": "code", "[![": "image", "![": "image", "<": "image"}
    if found := next((kind for start, kind in starts.items() if block.startswith(start)), None):
        return found
    return "list" if re.match(r"([-*]|\d+\.) ", block) else "text"


def items(block: str) -> list[tuple[str, str]]:
    """The items of a list as pairs of mark and text."""
    return [
        (mark, " ".join(text.split()))
        for mark, text in (item.split(" ", 1) for item in re.split(r"\n(?=(?:[-*]|\d+\.) )", block))
    ]


def first_sentences(text: str) -> str:
    """The first sentence of a paragraph, and as many more as it takes to say something."""
    said = sentences(text)
    lead = lead.end() if (lead := LEAD.match(said[0])) else 0
    number = 1
    while number < len(said) and len(" ".join(said[:number])) - lead < ENOUGH:
        number += 1
    return " ".join(said[:number])


def condensed(text: str) -> list[str]:
    """What of a text stands on the slides: first sentences, formulas, lists, tables and code."""
    chosen = []
    parts = blocks(text)
    for block, after in zip(parts, [*parts, ""][1:], strict=True):
        kind = kind_of(block)
        if kind == "text":
            # What leads on to a formula, a list or a table is told whole, or something would be missing in between.
            following = kind_of(after)
            leads_on = following == "formula" or (block.endswith(":") and following != "text")
            chosen.append(" ".join(sentences(block)) if leads_on else first_sentences(block))
        elif kind == "list":
            chosen.append("\n".join(f"{mark} {first_sentences(item)}" for mark, item in items(block)))
        elif kind in ("formula", "table", "code"):
            chosen.append(block)
    return chosen


def leads_nowhere(chosen: list[str]) -> bool:
    """Whether the blocks are sentences without a bold lead, which only lead over to the next cell."""
    return all(kind_of(block) == "text" and not block.startswith("**") for block in chosen)
