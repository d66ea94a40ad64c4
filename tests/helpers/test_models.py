import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from helpers import models
from helpers.errors import CourseError, exit_cleanly
from helpers.models import BASE_MODEL_VERSION, load_model, load_tokenizer, tiny_config
from helpers.profiles import PROFILES, ROOT, Hardware, get_profile
from recipes import base_model


@pytest.fixture
def profile(tiny_model_folder):
    """The hub path's settings, on the CPU."""
    return get_profile("t4", model_id=str(tiny_model_folder), hardware=Hardware())


@pytest.fixture
def damaged_folder(tiny_model_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


@pytest.fixture
def base_model_folder(damaged_folder, monkeypatch):
    """A folder that stands in for data/shima-4m."""
    monkeypatch.setitem(models.MODEL_FOLDERS, "shima-4m", damaged_folder)
    write_config(damaged_folder, workbook_version=BASE_MODEL_VERSION)
    return damaged_folder


def write_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def load_from(folder):
    return load_model(replace(PROFILES["cpu"], model_id=str(folder)))


def test_a_folder_in_hub_format_loads_with_the_settings_of_the_profile(profile, tiny_model_folder):
    model, tokenizer = load_model(profile)
    assert model.config.model_type == "qwen2"
    assert (model.dtype, model.device.type, model.training) == (torch.float32, "cpu", False)
    assert model.config._attn_implementation == profile.attention
    stored = load_file(tiny_model_folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, stored.float())
    batch = tokenizer(["Ada is a baker.", "Bela"], return_tensors="pt", padding=True)
    assert model(**batch).logits.isfinite().all()


def test_the_number_format_and_the_attention_follow_the_profile(profile):
    model, _ = load_model(replace(profile, dtype="bfloat16", attention="eager"))
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")


def test_an_untrained_model_has_the_same_shape_and_weights_that_depend_on_the_seed_alone(profile):
    trained, _ = load_model(profile)
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (load_model(profile, trained=False, seed=seed)[0] for seed in (1, 1, 2))
    weights = [model.model.embed_tokens.weight for model in (trained, first, second, other)]
    assert weights[0].shape == weights[1].shape
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[0])
    assert not torch.equal(weights[1], weights[3])
    assert (first.dtype, first.training) == (torch.float32, False)
    assert torch.equal(torch.rand(3), expected_next), "the global random state has moved"


def test_a_tokenizer_loads_by_profile_and_by_folder(profile, tiny_model_folder, texts):
    by_profile, by_folder = load_tokenizer(profile), load_tokenizer(str(tiny_model_folder))
    assert by_profile.decode(by_profile.encode(texts[0])) == texts[0]
    assert by_profile.encode(texts[0]) == by_folder.encode(texts[0])


def test_a_tokenizer_without_a_pad_token_pads_with_its_end_of_text(damaged_folder):
    config = json.loads((damaged_folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (damaged_folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_config(damaged_folder, model_type="llama")  # transformers gives every Qwen2 tokenizer a pad token
    assert load_tokenizer(str(damaged_folder)).pad_token == "<|end|>"


def test_loading_a_folder_opens_no_connection(profile, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_model(profile)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_tiny_model_of_each_family_runs_and_shares_key_value_heads(family):
    config = tiny_config(family, vocab_size=300, num_hidden_layers=1)
    model = models.AutoModelForCausalLM.from_config(config)
    assert model(torch.zeros(1, 5, dtype=torch.long)).logits.shape == (1, 5, 300)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == 2 * attention.k_proj.out_features
    assert model.num_parameters() < 100_000


def test_an_unknown_tiny_family_is_named():
    with pytest.raises(CourseError, match="no tiny 'gpt5' model: use llama, qwen2, qwen3 or mistral"):
        tiny_config("gpt5")


@pytest.mark.parametrize("name", ["shima-5m", "no such/model name", "../nowhere"])
def test_an_unknown_model_name_is_answered_with_the_known_kinds(name):
    with pytest.raises(
        CourseError, match=r"There is no model .* use shima-4m, shima-4m-assistant, a folder in hub format, or a hub id"
    ):
        load_tokenizer(name)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_no_model(damaged_folder, missing):
    (damaged_folder / missing).unlink()
    with pytest.raises(CourseError, match=f"holds no {missing}.*: save model and tokenizer there"):
        load_from(damaged_folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_cut_in_half_is_reported_in_one_sentence(damaged_folder, name):
    content = (damaged_folder / name).read_bytes()
    (damaged_folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CourseError, match=r"The model in .*model cannot be read \(.*\): save") as caught:
        load_from(damaged_folder)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_an_error_and_not_random_numbers(damaged_folder):
    weights = load_file(damaged_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, damaged_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CourseError, match=r"the weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_from(damaged_folder)


def test_weights_of_another_size_are_an_error(damaged_folder):
    write_config(damaged_folder, intermediate_size=192)
    with pytest.raises(CourseError, match="cannot be read"):
        load_from(damaged_folder)


def test_a_pickled_model_is_not_read(damaged_folder):
    weights = load_file(damaged_folder / "model.safetensors")
    (damaged_folder / "model.safetensors").unlink()
    torch.save(weights, damaged_folder / "pytorch_model.bin")
    with pytest.raises(CourseError, match="cannot be read"):
        load_from(damaged_folder)


def test_code_from_a_model_folder_is_not_run(damaged_folder):
    (damaged_folder / "own.py").write_text("raise SystemExit('ran')")
    write_config(
        damaged_folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    )
    with pytest.raises(CourseError, match="cannot be read"):
        load_from(damaged_folder)


def test_the_base_model_loads_by_name(base_model_folder):
    model, _ = load_model(PROFILES["cpu"])
    assert model.dtype == torch.float32


@pytest.mark.parametrize("version", [BASE_MODEL_VERSION - 1, BASE_MODEL_VERSION + 1, None])
def test_a_base_model_of_another_version_is_refused(base_model_folder, version):
    write_config(base_model_folder, workbook_version=version)
    message = rf"holds version {version} of shima-4m and .* needs {BASE_MODEL_VERSION}: rebuild it with `make base`, or"
    with pytest.raises(CourseError, match=message):
        load_model(PROFILES["cpu"])


def test_a_missing_base_model_says_how_to_get_it(base_model_folder):
    shutil.rmtree(base_model_folder)
    with pytest.raises(CourseError, match="restore it with `git checkout data`, or rebuild it with `make base`"):
        load_model(PROFILES["cpu"])


# ---------------------------------------------------------------- the hub, and what a command says


@pytest.fixture
def empty_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("setting", "value"), [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")], ids=["by choice", "refused"]
)
def test_a_hub_model_without_a_network_is_one_sentence_at_once(empty_hub_cache, monkeypatch, setting, value):
    monkeypatch.setattr(constants, setting, value)
    began = time.monotonic()
    with pytest.raises(CourseError, match=r"Qwen/Qwen2\.5-0\.5B has to be fetched from the Hugging Face hub"):
        load_tokenizer("Qwen/Qwen2.5-0.5B")
    assert time.monotonic() - began < 10


def test_a_hub_model_fetched_earlier_needs_no_network(empty_hub_cache, monkeypatch, tiny_model_folder, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    revision = "a" * 40
    shutil.copytree(tiny_model_folder, tmp_path / "hub" / "models--owner--tiny" / "snapshots" / revision)
    model, _ = load_model(replace(PROFILES["cpu"], model_id="owner/tiny", revision=revision))
    assert model.config.model_type == "qwen2"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"could not be fetched \(.*No space left on device\): amend",
        ),
        (RuntimeError("the connection broke\nin two"), r"could not be fetched \(the connection broke\): amend"),
    ],
)
def test_a_fetch_that_breaks_off_is_one_sentence(monkeypatch, error, message):
    def break_off(*args, **kwargs):
        raise error

    monkeypatch.setattr(models, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(models, "snapshot_download", break_off)
    with pytest.raises(CourseError, match=message):
        load_tokenizer("owner/model")


@pytest.mark.slow
def test_a_command_behind_an_unreachable_proxy_ends_with_one_sentence_and_status_2(tmp_path):
    proxy = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY"], "http://127.0.0.1:9")
    result = subprocess.run(
        [sys.executable, "-m", "recipes.base_model", "evaluate", "--model", "Qwen/Qwen2.5-0.5B"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path), "HOME": str(tmp_path), **proxy},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(
        "error: The model Qwen/Qwen2.5-0.5B has to be fetched from the Hugging Face hub and"
    )
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def spoil_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("shima-5m", None, "There is no model 'shima-5m': use shima-4m,"),
        ("shima-4m", lambda folder: write_config(folder, workbook_version=99), "needs 1: rebuild it with `make base`"),
        ("shima-4m", spoil_weights, "cannot be read (SafetensorError: "),
        ("shima-4m", shutil.rmtree, "restore it with `git checkout data`, or rebuild it with `make base`."),
    ],
    ids=["unknown name", "another version", "damaged weights", "no folder"],
)
def test_the_command_evaluate_reports_a_bad_model_in_one_sentence(base_model_folder, capsys, name, spoil, message):
    if spoil:
        spoil(base_model_folder)
    with pytest.raises(SystemExit) as ended:
        exit_cleanly(partial(base_model.main, ["evaluate", "--model", name, "--json"]))
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out) == (2, "")
    assert shown.err.count("\n") == 1 and shown.err.startswith("error: ") and message in shown.err
