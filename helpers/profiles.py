"""Which model, number format and budget suit the hardware: the profiles `cpu`, `t4` and `large`.

Importing this module does not import torch; only looking at the hardware does. It does not load any model.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.errors import CourseError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Profile:
    """What a notebook needs to know about the machine and the model it runs on."""

    name: str
    model_id: str  # "shima-4m", a local folder in hub format, or a hub id "owner/name"
    revision: str | None  # commit of the hub repository; None for local models
    dtype: str  # "float32", "float16" or "bfloat16"
    attention: str  # "sdpa" or "eager"
    device: str  # "cpu" or "cuda"
    memory_gib: float  # budget: main memory on the CPU, GPU memory otherwise
    minutes_per_lesson: float
    assistant_id: str  # the model after supervised fine-tuning, for the lessons that begin with an assistant
    assistant_revision: str | None = None
    licence: str | None = None  # of both hub models, as their cards name it; None for the course's own and yours


CPU = Profile(
    "cpu",
    "shima-4m",
    None,
    "float32",
    "sdpa",
    "cpu",
    memory_gib=3,
    minutes_per_lesson=3,
    assistant_id="shima-4m-assistant",
)
T4 = Profile(
    "t4",
    "Qwen/Qwen2.5-0.5B",
    "060db6499f32faf8b98477b0a26969ef7d8b9987",
    "float16",
    "sdpa",
    "cuda",
    memory_gib=14,
    minutes_per_lesson=15,
    assistant_id="Qwen/Qwen2.5-0.5B-Instruct",
    assistant_revision="7ae557604adf67be50417f59c2c2f167def9a775",
    licence="Apache-2.0",
)
LARGE = Profile(
    "large",
    "Qwen/Qwen2.5-1.5B",
    "8faed761d45a263340a0528343f099c05c9a4323",
    "bfloat16",
    "sdpa",
    "cuda",
    memory_gib=38,
    minutes_per_lesson=15,
    assistant_id="Qwen/Qwen2.5-1.5B-Instruct",
    assistant_revision="989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
    licence="Apache-2.0",
)
PROFILES = {profile.name: profile for profile in (CPU, T4, LARGE)}


@dataclass(frozen=True)
class Hardware:
    """The first GPU, if torch can use it; a machine without one has no compute capability and no GPU memory."""

    compute_capability: tuple[int, int] | None = None  # (7, 5) is a T4, (8, 0) an A100, (9, 0) an H100
    gpu_memory_gib: float = 0.0
    count: int = 1  # of GPUs; the course uses the first
    unusable: str = ""  # a GPU that is there and that the installed torch has no code for, in words


def detect_hardware() -> Hardware:
    """Ask torch for the first CUDA device, and whether it has code for it."""
    import torch

    if not torch.cuda.is_available():
        return Hardware()
    properties = torch.cuda.get_device_properties(0)
    capability = (properties.major, properties.minor)
    if not has_code_for(capability, torch.cuda.get_arch_list()):
        return Hardware(
            unusable=f"{properties.name} with compute capability {properties.major}.{properties.minor}, "
            f"where torch {torch.__version__} has {', '.join(torch.cuda.get_arch_list())}"
        )
    return Hardware(capability, properties.total_memory / 2**30, torch.cuda.device_count())


def has_code_for(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a torch that was built for these, as `torch.cuda.get_arch_list()` names them, runs on such a GPU.

    "sm_75" is machine code for 7.5 and later ones of 7; "compute_90" is compiled on the spot for 9.0 and all later.
    An empty list, of a torch that does not tell, counts as yes.
    """
    for architecture in built_for:
        kind, _, digits = architecture.rstrip("af").partition("_")
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not built_for


def has_bfloat16(hardware: Hardware) -> bool:
    """Whether the GPU computes in bfloat16, which begins with compute capability 8.0 (Ampere).

    `torch.cuda.is_bf16_supported()` is no answer: it also says yes where bfloat16 is only emulated, as on a T4.
    """
    return hardware.compute_capability is not None and hardware.compute_capability >= (8, 0)


def profile_name_for(hardware: Hardware) -> str:
    """Name of the largest profile that the hardware carries.

    An A100 or H100 gets `large`; a T4, a V100 and cards with bfloat16 but little memory (L4, RTX) get `t4`.
    """
    if has_bfloat16(hardware) and hardware.gpu_memory_gib >= LARGE.memory_gib:
        return "large"
    # Below capability 7.0 there is no fast float16, and current builds of torch no longer run there.
    if (hardware.compute_capability or (0, 0)) >= (7, 0) and hardware.gpu_memory_gib >= T4.memory_gib:
        return "t4"
    return "cpu"


def get_profile(name: str | None = None, model_id: str | None = None, hardware: Hardware | None = None) -> Profile:
    """Profile of that name, fitted to the hardware.

    None, "" and "auto" take the environment variable LLM_WORKBOOK_PROFILE, and without it the hardware decides.
    `model_id` replaces the profile's model and its assistant; a hub id may carry a revision, "owner/name@revision".
    With a `model_id` of one's own a GPU profile also runs on the CPU, in float32, so that its cells can be tried.
    `hardware` describes another machine than this one.

    Raises CourseError for an unknown name, and for a GPU profile without a GPU.
    """
    if name in (None, "", "auto"):
        name = os.environ.get("LLM_WORKBOOK_PROFILE", "auto") or "auto"
    if name == "auto":
        hardware = hardware or detect_hardware()
        name = profile_name_for(hardware)
    if name not in PROFILES:
        raise CourseError(f"There is no profile {name!r}: use one of {', '.join(PROFILES)}, or auto.")
    profile = PROFILES[name]
    if model_id:
        revision = None
        if "@" in model_id and not Path(model_id).exists():
            model_id, _, revision = model_id.partition("@")
        profile = replace(
            profile,
            model_id=model_id,
            revision=revision,
            assistant_id=model_id,
            assistant_revision=revision,
            licence=None,
        )
    if profile.device == "cpu":
        return profile

    hardware = hardware or detect_hardware()
    if hardware.unusable:
        raise CourseError(
            f"The installed torch cannot run on the GPU here ({hardware.unusable}): choose a runtime with another GPU, "
            "such as a T4, or the profile cpu."
        )
    if hardware.compute_capability is None:
        if not model_id:
            raise CourseError(
                f"The profile {name} needs a CUDA GPU and there is none here: choose a runtime with a GPU, "
                "or the profile cpu."
            )
        return replace(profile, device="cpu", dtype="float32")
    if profile.dtype == "bfloat16" and not has_bfloat16(hardware):
        return replace(profile, dtype="float16")
    return profile
