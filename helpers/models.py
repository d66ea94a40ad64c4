"""The model and the tokenizer of a profile: the course's own base model, a local folder in hub format, or the hub.

Weights come from safetensors only, and code from a model repository is never run. A hub model is fetched once, at
its pinned revision, and everything is then read from the local folder, so nothing but the fetching needs a network.
A gated model needs a token, which huggingface_hub takes from HF_TOKEN or from Colab's secrets.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from helpers.errors import CourseError
from helpers.hub import HUB_ID, hub_is_reachable
from helpers.profiles import ROOT, Profile

MODEL_FOLDERS = {name: ROOT / "data" / name for name in ("shima-4m", "shima-4m-assistant")}
BASE_MODEL_VERSION = 1  # "workbook_version" in the base model's config.json; raise it when old weights no longer fit
THINKING_OFF = "{%- set enable_thinking = false %}"  # a hub model's answer is what follows an empty thought
_REBUILD = {"shima-4m": "make base", "shima-4m-assistant": "python -m recipes.assistant build"}


def load_tokenizer(profile_or_model_id: Profile | str) -> PreTrainedTokenizerBase:
    """Tokenizer of a profile's model, or of "shima-4m", a local folder, or a hub id. It always has a pad token.

    Raises CourseError where the model is unknown, unreachable, damaged or of another version of the course.
    """
    if isinstance(profile_or_model_id, Profile):
        model_id, revision = profile_or_model_id.model_id, profile_or_model_id.revision
    else:
        model_id, revision = profile_or_model_id, None
    return _read_tokenizer(model_id, _find_folder(model_id, revision, with_weights=False))


def load_model(
    profile: Profile, *, trained: bool = True, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a profile, in evaluation mode, on the profile's device and in its number format.

    With `trained=False` the model has the same configuration and fresh weights, drawn from `seed`.
    Raises CourseError where the model is unknown, unreachable, damaged or of another version of the course.
    """
    model_id = profile.model_id
    folder = _find_folder(model_id, profile.revision, with_weights=trained)
    tokenizer = _read_tokenizer(model_id, folder)
    settings = {"dtype": getattr(torch, profile.dtype), "attn_implementation": profile.attention}
    transformers.logging.disable_progress_bar()  # a bar for every load would fill the notebooks
    with _reading(model_id, folder):
        if trained:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                **settings,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            if report["missing_keys"]:  # transformers would only warn, and fill them with random numbers
                raise ValueError(f"the weights lack {sorted(report['missing_keys'])[0]}")
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(config, **settings, trust_remote_code=False)
    return model.to(profile.device).eval(), tokenizer


def load_assistant(profile: Profile) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The profile's assistant, a model after supervised fine-tuning, and its tokenizer, as `load_model` gives them."""
    return load_model(replace(profile, model_id=profile.assistant_id, revision=profile.assistant_revision))


def tiny_config(family: str = "llama", vocab_size: int = 512, **overrides) -> PretrainedConfig:
    """Configuration of a model that trains in seconds, of the family "llama", "qwen2", "qwen3" or "mistral".

    Two layers, hidden size 64, four query heads that share two key-value heads, tied embeddings; about 0.1 M
    parameters. All sizes are multiples of 64, as 4-bit quantisation wants them. `overrides` replace any of it.
    """
    if family not in ("llama", "qwen2", "qwen3", "mistral"):
        raise CourseError(f"There is no tiny {family!r} model: use llama, qwen2, qwen3 or mistral.")
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if family == "qwen3":
        sizes["head_dim"] = 32  # heads that are together wider than the model, as those of Qwen3-0.6B are
    return AutoConfig.for_model(family, **(sizes | overrides))


def _find_folder(model_id: str, revision: str | None, with_weights: bool) -> Path:
    """Local folder that holds the model, fetched from the hub where needed."""
    if model_id in MODEL_FOLDERS:
        folder = MODEL_FOLDERS[model_id]
    elif Path(model_id).is_dir():
        folder = Path(model_id)
    elif HUB_ID.fullmatch(model_id):
        folder = _fetch(model_id, revision, with_weights)
    else:
        raise CourseError(
            f"There is no model {model_id!r}: use {', '.join(MODEL_FOLDERS)}, a folder in hub format, "
            "or a hub id such as Qwen/Qwen2.5-0.5B."
        )
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise CourseError(f"{folder} holds no {name}, so it is no model in hub format: {_remedy(model_id)}.")
    if model_id in MODEL_FOLDERS:
        _check_version(model_id, folder)
    return folder


def load_in_4_bit(folder: Path | str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A saved model with its matrices in NF4, double quantised, as bitsandbytes holds them for QLoRA (2305.14314).

    Multiplies in `dtype`. The weights stay trainable around: on a CPU bitsandbytes would repack weights that are read
    once, and then train adapters on another copy of them.
    """
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=four_bit,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        local_files_only=True,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _fetch(model_id: str, revision: str | None, with_weights: bool) -> Path:
    """The model's files in the hub's cache; without a network, those of an earlier run."""
    patterns = ["*.json", "*.txt"] + ["*.safetensors"] * with_weights
    try:
        return Path(
            snapshot_download(
                model_id, revision=revision, allow_patterns=patterns, local_files_only=not hub_is_reachable()
            )
        )
    except LocalEntryNotFoundError as error:
        raise CourseError(
            f"The model {model_id} has to be fetched from the Hugging Face hub and the hub cannot be reached: "
            "connect to the network (and unset HF_HUB_OFFLINE), or use the profile cpu, which needs none."
        ) from error
    except GatedRepoError as error:
        raise CourseError(
            f"The hub model {model_id} is gated: accept its licence on its hub page and set HF_TOKEN, "
            "in Colab as a secret."
        ) from error
    except RepositoryNotFoundError as error:
        raise CourseError(
            f"{model_id} is neither a folder here nor a model on the Hugging Face hub: check its spelling."
        ) from error
    except Exception as error:  # an unknown revision, a full disk, a connection that broke
        reason = str(error).split("\n")[0].rstrip(".")
        raise CourseError(
            f"The hub model {model_id} could not be fetched ({reason}): amend that and try again."
        ) from error


def _read_tokenizer(model_id: str, folder: Path) -> PreTrainedTokenizerBase:
    with _reading(model_id, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if "enable_thinking" in (tokenizer.chat_template or ""):  # Qwen3 would first write out its thoughts
        tokenizer.chat_template = THINKING_OFF + tokenizer.chat_template
    return tokenizer


def _check_version(model_id: str, folder: Path) -> None:
    with _reading(model_id, folder):
        version = json.loads((folder / "config.json").read_text()).get("workbook_version")
    if version != BASE_MODEL_VERSION:
        raise CourseError(
            f"{folder} holds version {version} of {model_id} and this version of the course needs "
            f"{BASE_MODEL_VERSION}: rebuild it with `{_REBUILD[model_id]}`, or update the course with `git pull`."
        )


@contextmanager
def _reading(model_id: str, folder: Path) -> Iterator[None]:
    """Damaged files raise a dozen kinds of errors, some of them bare Exceptions: say which folder it was."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0].rstrip(".")
        raise CourseError(f"The model in {folder} cannot be read ({reason}): {_remedy(model_id)}.") from error


def _remedy(model_id: str) -> str:
    if model_id in MODEL_FOLDERS:
        return f"restore it with `git checkout data`, or rebuild it with `{_REBUILD[model_id]}`"
    if Path(model_id).is_dir():
        return "save model and tokenizer there with save_pretrained"
    return "delete that folder and fetch the model again"
