"""The training loop: its update, its schedules, resuming after kills, fp16, and several processes."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from helpers.errors import CourseError
from helpers.training import TrainConfig, causal_lm_loss, learning_rate_factor, random_state, train
from tests.support import training_worker
from tests.support.training_worker import perform, quick_processes, random_batches, tiny_llama

QUIET = TrainConfig(max_steps=6, learning_rate=1e-2, warmup_steps=2, progress=False)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    return quick_processes()


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order in this process and in those that are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# What one update is


def test_training_equals_a_loop_written_by_hand_with_adamw():
    """Same losses, gradient norms and weights up to rounding; no weight decay on norms and biases."""
    batches = random_batches(4)
    trained, model = tiny_llama(attention_bias=True), tiny_llama(attention_bias=True)
    history = train(trained, batches, replace(QUIET, schedule="linear", min_learning_rate_ratio=0.0, clip_norm=0.5))

    undecayed = {module.weight for name, module in model.named_modules() if name.endswith("norm")}
    undecayed |= {module.bias for module in model.modules() if getattr(module, "bias", None) is not None}
    groups = [
        {"params": [p for p in model.parameters() if p not in undecayed], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p in undecayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    model.train()
    for step, factor in enumerate([0.5, 1.0, 1.0, 0.75, 0.5, 0.25]):
        batch = batches[step % 4]
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]  # (batch, seq - 1, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        optimizer.step()
        optimizer.zero_grad()
        assert history.losses[step] == pytest.approx(loss.item(), rel=1e-6)  # the loop divides by a count of its own
        assert history.grad_norms[step] == pytest.approx(norm.item(), rel=1e-5) and norm > 0.5
    assert len(undecayed) == 5 + 8
    assert history.learning_rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    torch.testing.assert_close(weights(trained), weights(model), rtol=1e-5, atol=1e-6)


def test_weight_decay_shrinks_matrices_and_leaves_norms_alone():
    """With a gradient of zero, decay is all that an update does: a factor 1 - rate x decay."""
    model = tiny_llama(attention_bias=True)
    before = weights(model)
    config = TrainConfig(1, learning_rate=0.1, weight_decay=0.5, schedule="constant", progress=False)
    train(model, random_batches(1), config, loss_fn=lambda model, batch: 0.0 * causal_lm_loss(model, batch))
    for name, parameter in model.named_parameters():
        kept = name.endswith(("norm.weight", ".bias"))
        torch.testing.assert_close(parameter.detach(), before[name] * (1.0 if kept else 0.95))


def test_the_loss_is_that_of_transformers():
    model, batch = tiny_llama(), random_batches(1)[0]
    torch.testing.assert_close(causal_lm_loss(model, batch), model(**batch).loss)


def test_without_labels_every_token_counts_but_padding_does_not():
    model, tokens = tiny_llama(), random_batches(1)[0]["input_ids"]
    mask = torch.ones_like(tokens)
    mask[:, 10:] = 0
    padded = causal_lm_loss(model, {"input_ids": tokens, "attention_mask": mask})
    torch.testing.assert_close(padded, causal_lm_loss(model, {"input_ids": tokens[:, :10]}))


@pytest.mark.parametrize("labels", ["labelled", "unlabelled"])
def test_accumulation_equals_one_large_batch(labels):
    """Also when the small batches have unequal numbers of labels: a mean of means would be another loss."""
    small = random_batches(8, rows=2)
    if labels == "unlabelled":
        small = [{"input_ids": batch["input_ids"]} for batch in small]
    large = [
        {name: torch.cat([batch[name] for batch in small[i : i + 4]]) for name in small[0]} for i in range(0, 8, 4)
    ]
    one, many = tiny_llama(), tiny_llama()
    expected = train(one, large, QUIET)
    history = train(many, small, replace(QUIET, accumulation_steps=4))
    assert history.losses == pytest.approx(expected.losses, rel=1e-5)
    assert history.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    assert history.tokens == expected.tokens == [8 * 16] * 6
    torch.testing.assert_close(weights(many), weights(one), rtol=0, atol=1e-4)  # a hundredth of one update


def test_clipping_bounds_the_update_and_the_history_has_the_norm_before():
    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=1.0)

    moved = {}
    for clip_norm in (0.01, 0.0):
        model = tiny_llama()
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        config = TrainConfig(1, schedule="constant", clip_norm=clip_norm, progress=False)
        history = train(model, random_batches(1), config, optimizer_fn=sgd)
        moved[clip_norm] = (nn.utils.parameters_to_vector(model.parameters()).detach() - before).norm().item()
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)
    assert moved[0.0] == pytest.approx(history.grad_norms[0], rel=1e-3) and history.grad_norms[0] > 0.1


def test_gradients_left_by_the_caller_do_not_enter():
    clean, used = tiny_llama(), tiny_llama()
    (100 * causal_lm_loss(used, random_batches(1, seed=1)[0])).backward()
    assert train(clean, random_batches(2), QUIET).losses == train(used, random_batches(2), QUIET).losses
    assert_same(weights(clean), weights(used))


def test_frozen_weights_stay_and_have_no_place_in_a_checkpoint(tmp_path):
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "self_attn" in name
    before = weights(model)
    train(model, random_batches(2), replace(QUIET, checkpoint_dir=tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("self_attn" in name)
    stored = load_file(tmp_path / "step-00000006" / "tensors.safetensors")
    assert {name for name in stored if name.startswith("model.")} == {
        f"model.{name}" for name in before if "self_attn" in name
    }


# Schedules


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("cosine", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.55, 109: 0.1}),
        ("linear", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 35: 0.775, 60: 0.55, 109: 0.109}),
        ("wsd", {0: 0.1, 9: 1.0, 60: 1.0, 90: 1.0, 100: 0.55, 109: 0.145}),
        ("constant", {0: 0.1, 9: 1.0, 10: 1.0, 60: 1.0, 109: 1.0}),
    ],
)
def test_schedules_at_their_ends_and_in_the_middle(schedule, factors):
    config = TrainConfig(max_steps=110, warmup_steps=10, schedule=schedule)
    for step, factor in factors.items():
        assert learning_rate_factor(step, config) == pytest.approx(factor, abs=1e-3)


def test_a_warmup_longer_than_the_run_never_falls():
    factors = [learning_rate_factor(step, TrainConfig(max_steps=5, warmup_steps=10)) for step in range(5)]
    assert factors == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_the_schedule_scales_each_group_of_another_optimiser():
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.extend(group["lr"] for group in self.param_groups)
            return super().step(closure)

    def two_groups(model):
        first, *others = model.parameters()
        return Watched([{"params": [first], "lr": 0.2}, {"params": others, "lr": 0.1}])

    train(tiny_llama(), random_batches(2), replace(QUIET, max_steps=2), optimizer_fn=two_groups)
    assert seen == pytest.approx([0.1, 0.05, 0.2, 0.1])  # the second step is the peak


# What the caller sees


def test_the_callers_random_numbers_and_mode_are_untouched():
    def everything():
        state = random_state()
        return [state["torch"].tolist(), state["python"], *map(np.ndarray.tolist, state["numpy"][1:2])]

    model = tiny_llama(dropout=0.2).eval()
    before = everything()
    train(model, training_worker.ShuffledEpochs(random_batches(2)), QUIET, evaluate=lambda model: {"x": torch.rand(1)})
    assert everything() == before and not model.training

    def fails(model, batch):
        torch.rand(3), random.random(), np.random.rand()
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        train(model, random_batches(2), QUIET, loss_fn=fails)
    assert everything() == before and not model.training


def test_a_run_depends_on_its_seed_and_on_no_global_state():
    def losses(seed, dropout=0.2):
        torch.rand(3)
        return train(tiny_llama(dropout), random_batches(2), replace(QUIET, seed=seed)).losses

    assert losses(0) == losses(0) != losses(1)
    assert losses(0) != losses(0, dropout=0.0)


def test_evaluation_is_recorded_runs_in_eval_mode_and_changes_nothing():
    calls = []

    def evaluate(model):
        calls.append((model.training, torch.is_grad_enabled()))
        return {"loss": causal_lm_loss(model, random_batches(1, seed=5)[0]), "draw": torch.rand(())}

    model, other = tiny_llama(dropout=0.2), tiny_llama(dropout=0.2)
    history = train(model, random_batches(2), replace(QUIET, evaluate_every=4, log_every=3), evaluate=evaluate)
    assert calls == [(False, False)] * 2
    assert [entry["step"] for entry in history.evaluations] == [4, 6]
    assert history.evaluations[1]["loss"] == pytest.approx(evaluate(model.eval())["loss"].item())
    assert all(type(value) in (int, float) for entry in history.evaluations for value in entry.values())
    assert train(other, random_batches(2), QUIET).losses == history.losses
    assert_same(weights(model), weights(other))


def test_the_history_becomes_a_table_and_a_figure():
    history = train(tiny_llama(), random_batches(2), QUIET)
    frame = history.to_frame()
    assert list(frame.columns) == ["step", "loss", "learning_rate", "grad_norm", "tokens", "seconds"]
    assert frame["step"].tolist() == list(range(6)) and frame["loss"].tolist() == history.losses
    assert (frame["seconds"] > 0).all() and history.losses[-1] < history.losses[0]
    drawn = [axes.lines[0].get_ydata() for axes in history.plot().axes]
    assert [list(values) for values in drawn] == [history.losses, history.learning_rates, history.grad_norms]


def test_tensorboard_events_are_readable_and_a_resumed_run_hides_what_it_repeats(tmp_path):
    config = replace(QUIET, log_every=2, evaluate_every=6, tensorboard_dir=tmp_path / "tb", checkpoint_every=2)
    config = replace(config, checkpoint_dir=tmp_path / "run", keep_checkpoints=3)

    def evaluate(model):
        return {"accuracy": 0.5}

    history = train(tiny_llama(), random_batches(2), config, evaluate=evaluate)
    shutil.rmtree(tmp_path / "run" / "step-00000006")
    time.sleep(1.1)  # TensorBoard orders files by the second in their names
    train(tiny_llama(), random_batches(2), config, evaluate=evaluate, resume=True)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(step, pytest.approx(history.losses[step - 1])) for step in (2, 4, 6)]
    assert {"learning_rate", "grad_norm", "tokens_per_second", "evaluation/accuracy"} <= set(events.Tags()["scalars"])


# What is refused, in one sentence


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"schedule": "cosin"}, "schedule is 'cosin' but must be one of 'cosine', 'linear', 'wsd', 'constant'"),
        ({"precision": "bf16"}, "precision is 'bf16'"),
        ({"parallel": "fsdp"}, "parallel is 'fsdp'"),
        ({"parallel": "ddp"}, "torchrun"),
        ({"max_steps": 0}, "max_steps is 0 but must be at least 1"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
        ({"log_every": 0}, "log_every"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"evaluate_every": -1}, "evaluate_every"),
        ({"decay_fraction": 0.0, "schedule": "wsd"}, "decay_fraction is 0.0 but must be above 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"checkpoint_every": 5}, "set checkpoint_dir"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(settings, said):
    with pytest.raises(CourseError) as caught:
        train(tiny_llama(), random_batches(2), replace(QUIET, **settings))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_cannot_be_trained_is_one_sentence(tmp_path):
    with pytest.raises(CourseError, match="unfreeze"):
        train(tiny_llama().requires_grad_(False), random_batches(1), QUIET)
    with pytest.raises(CourseError, match=r"model\.float\(\)"):
        train(tiny_llama().half(), random_batches(1), replace(QUIET, precision="fp16-mixed"))


def test_a_place_for_checkpoints_that_cannot_be_made_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CourseError, match="cannot be made"):
        train(tiny_llama(), [], replace(QUIET, checkpoint_dir=tmp_path / "file" / "run"))


def test_a_loss_that_is_not_finite_is_one_sentence_with_its_step():
    def breaks(model, batch):
        calls.append(batch)
        return causal_lm_loss(model, batch) * (math.nan if len(calls) == 4 else 1.0)

    calls = []
    with pytest.raises(CourseError, match=r"Step 3 has loss nan.*lower the learning rate"):
        train(tiny_llama(), random_batches(2), QUIET, loss_fn=breaks)
    unlabelled = [{"input_ids": torch.zeros(2, 8, dtype=torch.long), "labels": torch.full((2, 8), -100)}]
    with pytest.raises(CourseError, match="all -100"):
        train(tiny_llama(), unlabelled, QUIET)


def test_an_exhausted_generator_is_one_sentence():
    with pytest.raises(CourseError, match=r"no more batches after 4.*generator"):
        train(tiny_llama(), (batch for batch in random_batches(4)), QUIET)
    with pytest.raises(CourseError, match="no more batches after 0"):
        train(tiny_llama(), [], QUIET)


# Resuming


KILLED_RUNS = {
    "dropout and accumulation over a list of several epochs": {"data": "slow list", "accumulation_steps": 2},
    "a stream that seeks and draws random numbers": {"data": "stream"},
    "epochs that are shuffled anew": {"data": "shuffled epochs"},
}


@pytest.mark.slow
@pytest.mark.parametrize("described", KILLED_RUNS)
def test_a_run_killed_again_and_again_equals_the_run_that_was_never_stopped(described, tmp_path, processes):
    """Three kills at random instants, and kills in the middle of writing a checkpoint: bit for bit the same."""
    run = dict(KILLED_RUNS[described])
    settings = {"max_steps": 60, "learning_rate": 1e-2, "warmup_steps": 5, "checkpoint_every": 3, "log_every": 7}
    settings["accumulation_steps"] = run.pop("accumulation_steps", 1)

    def described_run(name: str) -> dict:
        folder = {"checkpoint_dir": str(tmp_path / name)}
        return {"dropout": 0.2, "config": settings | folder, "out": str(tmp_path / f"{name}-out"), "resume": True} | run

    def start() -> BaseProcess:
        started = processes.Event()
        process = processes.Process(target=perform, args=(described_run("killed"), started))
        process.start()
        assert started.wait(120)
        return process

    def kill(process: BaseProcess) -> None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it had not come to its end

    delays = random.Random(described)
    for _ in range(3):
        process = start()
        time.sleep(delays.uniform(0.02, 0.5))
        kill(process)
    half_written = 0
    for _ in range(5):
        process = start()
        before = set(Path(tmp_path / "killed").glob(".partial-*"))
        while not set(Path(tmp_path / "killed").glob(".partial-*")) - before and process.is_alive():
            time.sleep(0.0005)
        kill(process)
        half_written += bool(set(Path(tmp_path / "killed").glob(".partial-*")) - before)
        if half_written == 2:
            break
    assert half_written

    start().join()
    perform(described_run("never-stopped"))
    killed, expected = (
        json.loads((tmp_path / f"{name}-out.0.json").read_text()) for name in ("killed", "never-stopped")
    )
    assert len(expected["losses"]) == 60
    assert killed == expected
    assert_same(*(load_file(tmp_path / f"{name}-out.safetensors") for name in ("killed", "never-stopped")))
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["step-00000057", "step-00000060"]


@pytest.fixture
def finished_run(tmp_path):
    """A run of 6 steps with a checkpoint after every second: (its settings, its history, its weights)."""
    config = replace(QUIET, checkpoint_dir=tmp_path / "run", checkpoint_every=2, keep_checkpoints=3)
    model = tiny_llama(dropout=0.2)
    return config, train(model, random_batches(4), config), weights(model)


def test_after_a_damaged_checkpoint_the_run_is_still_the_same(finished_run):
    config, expected, expected_weights = finished_run
    spoilt = config.checkpoint_dir / "step-00000006" / "tensors.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-100])
    model = tiny_llama(dropout=0.2)
    with pytest.warns(UserWarning, match=r"step-00000006 \(tensors.safetensors has .*step-00000004"):
        history = train(model, random_batches(4), config, resume=True)
    assert history.losses == expected.losses and history.grad_norms == expected.grad_norms
    assert_same(weights(model), expected_weights)


def test_a_finished_run_is_given_back_as_it_ended(finished_run):
    config, expected, expected_weights = finished_run
    model = tiny_llama(dropout=0.2)
    assert train(model, random_batches(4), config, resume=True) == expected
    assert_same(weights(model), expected_weights)


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path):
    first = train(tiny_llama(), random_batches(4), replace(QUIET, checkpoint_dir=tmp_path / "new"), resume=True)
    assert first.losses == train(tiny_llama(), random_batches(4), QUIET).losses


def test_a_constant_run_may_be_made_longer(tmp_path):
    config = replace(QUIET, schedule="constant", checkpoint_dir=tmp_path)
    short, long = tiny_llama(dropout=0.2), tiny_llama(dropout=0.2)
    train(short, random_batches(4), config)
    longer = train(short, random_batches(4), replace(config, max_steps=9), resume=True)
    expected = train(long, random_batches(4), replace(config, max_steps=9, checkpoint_dir=None))
    assert longer.losses == expected.losses
    assert_same(weights(short), weights(long))
    with pytest.raises(CourseError, match="beyond max_steps=6"):
        train(short, random_batches(4), config, resume=True)


def test_a_weight_that_never_gets_a_gradient_does_not_prevent_resuming(tmp_path):
    def build():
        model = tiny_llama()
        model.unused = nn.Parameter(torch.ones(3))
        return model

    config = replace(QUIET, checkpoint_dir=tmp_path / "run", checkpoint_every=2, keep_checkpoints=3)
    model, resumed = build(), build()
    expected = train(model, random_batches(4), config)
    shutil.rmtree(tmp_path / "run" / "step-00000006")
    assert train(resumed, random_batches(4), config, resume=True).losses == expected.losses
    assert_same(weights(resumed), weights(model))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 64}, r"another model: model\..* is torch.float32 \[\d+.*use the model of that run"),
        ({"num_hidden_layers": 3}, r"another model: model\.model\.layers\.2.* is absent in it"),
        ({"dtype": torch.bfloat16}, r"is torch.float32 .* in it and torch.bfloat16"),
        ({"learning_rate": 0.5}, "made with learning_rate=0.01 and this run has learning_rate=0.5"),
        ({"seed": 1}, "seed"),
        ({"max_steps": 7}, "max_steps"),
        ({"accumulation_steps": 2}, "accumulation_steps"),
        ({"optimizer": torch.optim.SGD}, "another optimizer"),
        ({"resume": False}, "already holds checkpoints"),
    ],
)
def test_a_folder_of_another_run_is_refused_in_one_sentence(finished_run, change, said):
    config, *_ = finished_run
    names = {"learning_rate", "seed", "max_steps", "accumulation_steps"}
    model = tiny_llama(**{k: v for k, v in change.items() if "hidden" in k}).to(change.get("dtype", torch.float32))
    optimizer_fn = (lambda model: change["optimizer"](model.parameters())) if "optimizer" in change else None
    config = replace(config, **{name: value for name, value in change.items() if name in names})
    with pytest.raises(CourseError, match=said) as caught:
        train(model, random_batches(4), config, optimizer_fn=optimizer_fn, resume=change.get("resume", True))
    assert "\n" not in str(caught.value)


def test_resume_needs_a_place():
    with pytest.raises(CourseError, match="set checkpoint_dir"):
        train(tiny_llama(), random_batches(1), QUIET, resume=True)


def test_an_optimiser_with_state_outside_tensors_is_refused_when_saving(tmp_path):
    def lbfgs_like(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.state[next(model.parameters())]["count"] = 3
        return optimizer

    with pytest.raises(CourseError, match="SGD keeps 'count' outside tensors"):
        train(tiny_llama(), random_batches(1), replace(QUIET, checkpoint_dir=tmp_path), optimizer_fn=lbfgs_like)


def test_a_full_disk_stops_the_run_in_one_sentence_and_it_resumes_when_there_is_room(tmp_path, processes):
    settings = {"max_steps": 12, "learning_rate": 1e-2, "checkpoint_every": 2, "evaluate_every": 2}
    run = {"config": settings | {"checkpoint_dir": str(tmp_path / "run")}, "data": "list", "out": str(tmp_path / "out")}
    process = processes.Process(target=perform, args=(run | {"full_disk_at": 4},))
    process.start()
    process.join(120)
    error = json.loads((tmp_path / "out.0.json").read_text())["error"]
    assert "step-00000008 could not be written" in error and "free some space" in error and "\n" not in error
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step-00000004", "step-00000006"]

    perform(run | {"resume": True})
    model = tiny_llama()
    expected = train(model, training_worker.DATA["list"](), TrainConfig(12, learning_rate=1e-2, progress=False))
    assert json.loads((tmp_path / "out.0.json").read_text())["losses"] == expected.losses
    assert_same(load_file(tmp_path / "out.safetensors"), weights(model))


# fp16


def test_fp16_skips_an_update_that_overflows_and_the_history_says_so():
    """The loss is 1,000 times larger: the first scale of 65,536 overflows, a smaller one does not."""
    states, model = [weights(tiny_llama())], tiny_llama()

    def watch(model):
        states.append(weights(model))
        return {}

    config = replace(QUIET, max_steps=20, precision="fp16-mixed", evaluate_every=1)
    history = train(model, random_batches(4), config, loss_fn=training_worker.overflowing_loss, evaluate=watch)
    skipped = [not math.isfinite(norm) for norm in history.grad_norms]
    assert skipped[0] and not all(skipped) and history.skipped_steps == sum(skipped)
    moved = [any(not torch.equal(before[name], now[name]) for name in now) for before, now in pairwise(states)]
    assert moved == [not skip for skip in skipped]
    assert all(map(math.isfinite, history.losses)) and history.losses[-1] < history.losses[0]


def test_fp16_halves_the_scale_at_each_skip_and_a_resume_keeps_it(tmp_path):
    config = replace(QUIET, max_steps=16, precision="fp16-mixed", checkpoint_every=4, keep_checkpoints=9)
    config = replace(config, checkpoint_dir=tmp_path / "run")
    expected = train(tiny_llama(), random_batches(4), config, loss_fn=training_worker.overflowing_loss)
    scales = [
        json.loads((tmp_path / f"run/step-{step:08d}/state.json").read_text())["scaler"]["scale"] for step in (4, 16)
    ]
    assert scales == [2.0**16 / 2**4, 2.0**16 / 2**expected.skipped_steps] and expected.skipped_steps >= 4
    for step in (8, 12, 16):
        shutil.rmtree(tmp_path / f"run/step-{step:08d}")
    resumed = train(tiny_llama(), random_batches(4), config, loss_fn=training_worker.overflowing_loss, resume=True)
    assert resumed.losses == expected.losses and repr(resumed.grad_norms) == repr(expected.grad_norms)  # nan is not nan


def test_fp16_that_overflows_at_every_scale_is_one_sentence():
    def hopeless(model, batch):
        return 1e12 * causal_lm_loss(model, batch)

    with pytest.raises(CourseError, match=r"overflow fp16 at every scale \(\d\d updates skipped"):
        train(tiny_llama(), random_batches(4), replace(QUIET, max_steps=60, precision="fp16-mixed"), loss_fn=hopeless)


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_mixed_precision_follows_fp32_and_keeps_fp32_weights(precision):
    full = train(tiny_llama(), random_batches(4), replace(QUIET, max_steps=12))
    model = tiny_llama()
    mixed = train(model, random_batches(4), replace(QUIET, max_steps=12, precision=precision))
    assert mixed.losses == pytest.approx(full.losses, rel=0.02) and mixed.losses != full.losses
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# Several processes


STEPS = {"max_steps": 8, "learning_rate": 1e-2, "warmup_steps": 2, "accumulation_steps": 2}
FP16 = STEPS | {"max_steps": 14, "precision": "fp16-mixed"}


def torchrun(processes: int, runs: list[dict], folder: Path) -> None:
    """Do the runs one after the other in `processes` processes; names in them are inside `folder`."""
    for run in runs:
        run["out"] = str(folder / run["out"])
        if "checkpoint_dir" in run["config"]:
            run["config"]["checkpoint_dir"] = str(folder / run["config"]["checkpoint_dir"])
    described = folder / f"runs-{processes}.json"
    described.write_text(json.dumps(runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, training_worker.__file__, str(described)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """All that is done by two processes, in one launch: the folder with what came out."""
    folder = tmp_path_factory.mktemp("two")
    train(
        tiny_llama(),
        training_worker.DATA["list"](),
        TrainConfig(
            **STEPS, progress=False, checkpoint_dir=folder / "from-one", checkpoint_every=4, keep_checkpoints=3
        ),
    )
    shutil.rmtree(folder / "from-one" / "step-00000008")
    saving = {"checkpoint_every": 4, "keep_checkpoints": 3}
    sharded = {"parallel": "fsdp2"} | saving
    full_disk = STEPS | sharded | {"checkpoint_every": 1, "evaluate_every": 1, "checkpoint_dir": "full"}
    runs = [
        {"out": "ddp", "config": STEPS | saving | {"parallel": "ddp", "checkpoint_dir": "ddp-run"}},
        {"out": "fsdp", "config": STEPS | sharded | {"checkpoint_dir": "fsdp-run"}},
        {"out": "fsdp-fp16", "config": FP16 | {"parallel": "fsdp2"}, "overflow": True},
        {"out": "ddp-fp16", "config": FP16 | {"parallel": "ddp"}, "overflow": True},
        {"out": "resumed-on-two", "config": STEPS | sharded | {"checkpoint_dir": "from-one"}, "resume": True},
        {"out": "full-disk", "config": full_disk, "full_disk_at": 3},
        {"out": "room-again", "config": full_disk, "resume": True},
    ]
    torchrun(2, [{"data": "list"} | run for run in runs], folder)
    return folder


@pytest.fixture(scope="module")
def one_process():
    """The same run by one process: (history, weights)."""
    torch.set_num_threads(1)
    model = tiny_llama()
    return train(model, training_worker.DATA["list"](), TrainConfig(**STEPS, progress=False)), weights(model)


def outcome(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def assert_close_to(one_process, folder: Path, name: str) -> None:
    """Losses to 1e-4 (sums of other parts, in another order), weights to a hundredth of what they moved by."""
    history, expected = one_process
    assert outcome(folder, name)["losses"] == pytest.approx(history.losses, abs=1e-4)
    torch.testing.assert_close(load_file(folder / f"{name}.safetensors"), expected, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp", "resumed-on-two"])
def test_two_processes_give_the_losses_of_one(two_processes, one_process, name):
    """Five rows and unequal numbers of labels: the processes have unequal shares of each batch."""
    assert_close_to(one_process, two_processes, name)
    assert outcome(two_processes, name, 0)["losses"] == outcome(two_processes, name, 1)["losses"]


@pytest.mark.slow
def test_fsdp2_really_shards_weights_and_checkpoints(two_processes):
    total = sum(parameter.numel() for parameter in tiny_llama().parameters())
    parts = [outcome(two_processes, "fsdp", rank)["parameters"] for rank in (0, 1)]
    assert sum(parts) == total and max(parts) < 0.55 * total
    assert [outcome(two_processes, "ddp", rank)["parameters"] for rank in (0, 1)] == [total, total]
    shards = [load_file(path) for path in sorted((two_processes / "fsdp-run/step-00000008").glob("*.safetensors"))]
    stored = [
        sum(
            tensor.numel()
            for name, tensor in shard.items()
            if name.startswith(("model.", "optimizer.")) and tensor.ndim
        )
        for shard in shards
    ]
    assert len(shards) == 2 and sum(stored) == 3 * total and max(stored) < 0.55 * 3 * total
    assert not [
        path for path in (two_processes / "fsdp-run").rglob("*") if path.suffix not in ("", ".safetensors", ".json")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp-fp16", "fsdp-fp16"])
def test_processes_skip_the_same_updates_in_fp16(two_processes, name):
    """An overflow in the part of one process must stop the update of all."""
    config = TrainConfig(**FP16, progress=False)
    expected = train(tiny_llama(), training_worker.DATA["list"](), config, loss_fn=training_worker.overflowing_loss)
    first, second = (outcome(two_processes, name, rank) for rank in (0, 1))
    assert first["losses"] == second["losses"] and first["skipped"] == second["skipped"]
    assert 1 <= first["skipped"] < 14 and abs(first["skipped"] - expected.skipped_steps) <= 1


@pytest.mark.slow
def test_a_full_disk_stops_all_processes_in_one_sentence(two_processes, one_process):
    for rank in (0, 1):
        error = outcome(two_processes, "full-disk", rank)["error"]
        assert "step-00000003 could not be written" in error and "\n" not in error
    assert_close_to(one_process, two_processes, "room-again")


@pytest.mark.slow
@pytest.mark.parametrize("saved_by", ["fsdp-run", "ddp-run"])
def test_what_two_processes_saved_is_resumed_by_one(two_processes, one_process, tmp_path, saved_by):
    shutil.copytree(two_processes / saved_by / "step-00000004", tmp_path / "run" / "step-00000004")
    run = {"data": "list", "config": STEPS | {"checkpoint_dir": str(tmp_path / "run")}, "resume": True}
    perform(run | {"out": str(tmp_path / "on-one")})
    assert outcome(tmp_path, "on-one")["losses"][:4] == outcome(two_processes, saved_by.partition("-")[0])["losses"][:4]
    assert_close_to(one_process, tmp_path, "on-one")


@pytest.mark.slow
def test_what_two_processes_saved_is_resumed_by_three(two_processes, one_process, tmp_path):
    shutil.copytree(two_processes / "fsdp-run" / "step-00000004", tmp_path / "sharded" / "step-00000004")
    shutil.copytree(two_processes / "ddp-run" / "step-00000004", tmp_path / "whole" / "step-00000004")
    runs = [
        {"out": name, "config": STEPS | {"parallel": kind, "checkpoint_dir": name}, "data": "list", "resume": True}
        for name, kind in [("sharded", "fsdp2"), ("whole", "ddp")]
    ]
    torchrun(3, runs, tmp_path)
    assert_close_to(one_process, tmp_path, "sharded")
    assert_close_to(one_process, tmp_path, "whole")


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16-mixed"])
def test_a_gpu_follows_the_cpu_and_resumes(tmp_path, precision):
    cpu = train(tiny_llama(), random_batches(4), QUIET)
    config = replace(
        QUIET, precision=precision, checkpoint_dir=tmp_path / "run", checkpoint_every=2, keep_checkpoints=3
    )
    expected = train(tiny_llama().cuda(), random_batches(4), config)
    assert expected.losses == pytest.approx(cpu.losses, rel=0.02)
    shutil.rmtree(tmp_path / "run" / "step-00000006")
    resumed = train(tiny_llama().cuda(), random_batches(4), config, resume=True)
    assert resumed.losses == pytest.approx(expected.losses, rel=1e-3)


@pytest.mark.gpu
def test_fp16_on_a_gpu_skips_updates_that_overflow():
    config = replace(QUIET, max_steps=30, precision="fp16-mixed")
    history = train(tiny_llama().cuda(), random_batches(4), config, loss_fn=training_worker.overflowing_loss)
    assert 1 <= history.skipped_steps < 30 and history.losses[-1] < history.losses[0]


@pytest.mark.gpu
def test_seconds_are_those_of_the_gpu_and_not_of_the_launches():
    def busy(model, batch):
        torch.cuda._sleep(200_000_000)  # about 0.1 s of work, launched in no time
        return causal_lm_loss(model, batch)

    started = time.perf_counter()
    history = train(tiny_llama().cuda(), random_batches(4), replace(QUIET, log_every=6), loss_fn=busy)
    assert sum(history.seconds) > 0.5 * (time.perf_counter() - started)


@pytest.mark.gpu
def test_one_nccl_process_gives_the_losses_of_none(tmp_path, one_process):
    runs = [
        {"out": kind, "config": STEPS | {"parallel": kind}, "data": "list", "cuda": True} for kind in ("ddp", "fsdp2")
    ]
    torchrun(1, runs, tmp_path)
    for kind in ("ddp", "fsdp2"):
        assert outcome(tmp_path, kind)["losses"] == pytest.approx(one_process[0].losses, abs=2e-3)
