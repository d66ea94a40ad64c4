"""The sample class: what its honest members hand in can be reproduced, and the other three have what they should."""

import json

import pytest

from helpers.open_tasks import Decoding, public_tasks
from recipes import sample_class
from recipes.sample_class import HONEST, Plan, write_class


@pytest.mark.slow
def test_a_class_has_honest_copied_forged_and_broken_submissions(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_class, "BATCH_SIZE", 2)
    short = Decoding(max_new_tokens=4)
    write_class(tmp_path, {"ada": Plan(1, decoding=short), "bela": Plan(0, base="shima-4m", decoding=short)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ada", "bela", "hana", "ivo", "juna"]
    weights = {path.parents[1].name: path.read_bytes() for path in tmp_path.glob("*/adapter/*.safetensors")}
    assert weights["hana"] == weights["ada"] != weights["ivo"]
    assert weights["juna"] == weights["bela"][: len(weights["bela"]) // 2]
    forged = [json.loads(line)["output"] for line in (tmp_path / "ivo" / "submission.jsonl").read_text().splitlines()]
    assert forged == [task.reference for task in public_tasks()]
    assert max(path.stat().st_size for path in tmp_path.glob("*/adapter/*.safetensors")) < 2**21


def test_the_honest_ones_differ_in_how_well_they_prepared():
    assert len(HONEST) == 7 and len(set(HONEST.values())) == 7
