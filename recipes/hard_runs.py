"""The hard runs of lesson 08 on all seeds of the ledger, as a table that the lesson prints beside its own.

    python -m recipes.hard_runs        # writes data/hard_runs.json from data/claims.json, at once

The lesson reports five numbers of each of its six hard runs. `python -m course claims --only 08` keeps them for each
seed in the ledger; this takes them out of its texts. Run it after the ledger has been written anew.
"""

import json
from collections.abc import Mapping
from typing import Any

from helpers.files import write_atomically
from helpers.profiles import ROOT

LEDGER, TABLE = ROOT / "data" / "claims.json", ROOT / "data" / "hard_runs.json"
ORIGIN = "lesson 08 on the cpu profile, seeds of data/claims.json, rounded as reported; python -m recipes.hard_runs"
QUANTITIES = {
    "kl": "KL, nats an answer",
    "proxy": "reward model, over SFT",
    "true": "true reward, over SFT",
    "polite": "polite",
    "right": "right",
}
PRICES = (0.0, 0.2)
BEFORE = "the SFT policy of these runs on the exam: right"
ANSWERS = "beta 0, the worst run's first answers"


def number(text: str) -> float:
    """A number as the lesson reports it; "42%" is 0.42."""
    return round(float(text.strip(" %")) / (100 if "%" in text else 1), 4)


def hard_runs(claims: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The table: one row a training run, with what was measured on the exam; and of each seed a few answers, and the
    share of right answers of the SFT policy that its runs began with."""
    reported = {claim["statement"]: claim["values"] for claim in claims}
    rows = []
    for beta in PRICES:
        texts = {key: reported[f"beta {beta:g}, three runs on the exam: {what}"] for key, what in QUANTITIES.items()}
        for seed in sorted(texts["kl"], key=int):
            columns = {key: map(number, values[seed].split("/")) for key, values in texts.items()}
            for run, values in enumerate(zip(*columns.values(), strict=True), start=1):
                rows.append({"seed": int(seed), "beta": beta, "run": run} | dict(zip(columns, values, strict=True)))
    answers = {
        seed: json.loads(texts) for seed, texts in sorted(reported[ANSWERS].items(), key=lambda item: int(item[0]))
    }
    before = {seed: number(share) for seed, share in sorted(reported[BEFORE].items(), key=lambda item: int(item[0]))}
    return {"origin": ORIGIN, "answers": answers, "right before": before, "runs": rows}


def write(table: Mapping[str, Any]) -> None:
    """Write the table, one run a line."""
    runs = ",\n".join(f"    {json.dumps(row)}" for row in table["runs"])
    head = ",\n".join(f"  {json.dumps(key)}: {json.dumps(table[key])}" for key in ("origin", "answers", "right before"))
    write_atomically(TABLE, f'{{\n{head},\n  "runs": [\n{runs}\n  ]\n}}\n')


def main() -> None:
    """Make the table of the ledger."""
    write(hard_runs(json.loads(LEDGER.read_text(encoding="utf-8"))["lessons"]["08_rlhf"]["claims"]))


if __name__ == "__main__":
    main()
