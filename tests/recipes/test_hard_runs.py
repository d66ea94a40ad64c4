"""The table of hard runs in data/ is the one that the recipe makes of the ledger."""

import json

from recipes.hard_runs import LEDGER, PRICES, QUANTITIES, TABLE, hard_runs, number


def test_numbers_are_read_as_they_are_reported():
    assert [number(text) for text in ("+0.50", " -0.01 ", "6.4", "92%")] == [0.5, -0.01, 6.4, 0.92]


def test_the_committed_table_is_that_of_the_ledger():
    claims = json.loads(LEDGER.read_text(encoding="utf-8"))["lessons"]["08_rlhf"]["claims"]
    assert json.loads(TABLE.read_text(encoding="utf-8")) == hard_runs(claims)


def test_there_are_three_runs_for_each_seed_and_price():
    runs = json.loads(TABLE.read_text(encoding="utf-8"))["runs"]
    assert len(runs) == 5 * len(PRICES) * 3
    assert all(set(run) == {"seed", "beta", "run", *QUANTITIES} for run in runs)
