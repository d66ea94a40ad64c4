"""In the null run nothing learns, and everything else works as always."""

import subprocess
import sys

import pytest

from course.claims.null_run import STARTUP
from helpers.profiles import ROOT

CODE = """
import torch
from helpers.models import load_model
from helpers.profiles import get_profile

model, tokenizer = load_model(get_profile("cpu"))
ids = tokenizer("Nori is a town.", return_tensors="pt")["input_ids"]
before = model(input_ids=ids, labels=ids).loss
assert before > 0.9 * torch.tensor(float(model.config.vocab_size)).log(), before  # as good as a uniform guess
for make in (torch.optim.AdamW, torch.optim.SGD):
    optimizer = make(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    schedule.step()
    assert optimizer.step(lambda: torch.tensor(2.0)) == 2.0
assert torch.equal(model(input_ids=ids, labels=ids).loss, before)

point = torch.zeros(1, requires_grad=True)
fit = torch.optim.LBFGS([point])
def distance():
    fit.zero_grad()
    loss = (point - 3).square().sum()
    loss.backward()
    return loss
fit.step(distance)
assert abs(point.item() - 3) < 1e-3, point
print("done")
"""


@pytest.mark.slow
def test_models_are_untrained_optimisers_idle_and_curves_are_fitted_all_the_same() -> None:
    run = subprocess.run([sys.executable, "-c", STARTUP + CODE], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.endswith("done\n"), run.stderr
