"""The hard runs of lesson 08 on all seeds of the ledger, as a table that the lesson prints beside its own.

    python -m recipes.hard_runs        # writes data/hard_runs.json from data/claims.json, at once

The lesson reports four numbers of each of its six hard runs. `python -m course claims --only 08` keeps them for each
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
}
PRICES = (0.0, 0.2)


def number(text: str) -> float:
    """A number as the lesson reports it; "42%" is 0.42."""
    return round(float(text.strip(" %")) / (100 if "%" in text else 1), 4)


def hard_runs(claims: list[Mapping[str, Any]]) -> list[dict[str, float]]:
    """One row a training run: its seed, price of KL and number, and what was measured on the exam."""
    reported = {claim["statement"]: claim["values"] for claim in claims}
    rows = []
    for beta in PRICES:
        texts = {key: reported[f"beta {beta:g}, three runs on the exam: {what}"] for key, what in QUANTITIES.items()}
        for seed in sorted(texts["kl"], key=int):
            columns = {key: map(number, values[seed].split("/")) for key, values in texts.items()}
            for run, values in enumerate(zip(*columns.values(), strict=True), start=1):
                rows.append({"seed": int(seed), "beta": beta, "run": run} | dict(zip(columns, values, strict=True)))
    return rows


def main() -> None:
    """Write the table."""
    rows = hard_runs(json.loads(LEDGER.read_text(encoding="utf-8"))["lessons"]["08_rlhf"]["claims"])
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    write_atomically(TABLE, f'{{\n  "origin": {json.dumps(ORIGIN)},\n  "runs": [\n{lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
