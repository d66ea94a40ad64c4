import ast
import subprocess
import sys

import pytest

from helpers.errors import CourseError
from helpers.memory import bundled_shapes
from helpers.profiles import PROFILES, ROOT, Hardware, get_profile, has_code_for, profile_name_for

NO_GPU = Hardware()
T4 = Hardware((7, 5), 14.7)
V100 = Hardware((7, 0), 31.7)
P100 = Hardware((6, 0), 15.9)
L4 = Hardware((8, 9), 22.0)
LAPTOP = Hardware((8, 6), 5.8)
A100 = Hardware((8, 0), 39.4)
H200 = Hardware((9, 0), 139.7)
G4 = Hardware((12, 0), 94.9)  # Colab's name for an RTX PRO 6000


@pytest.fixture(autouse=True)
def no_choice_in_the_environment(monkeypatch):
    monkeypatch.delenv("LLM_WORKBOOK_PROFILE", raising=False)


@pytest.mark.parametrize(
    ("hardware", "name"),
    [
        (NO_GPU, "cpu"),
        (T4, "t4"),
        (V100, "t4"),
        (P100, "cpu"),
        (L4, "t4"),
        (LAPTOP, "cpu"),
        (A100, "large"),
        (H200, "large"),
        (G4, "large"),
    ],
)
def test_the_hardware_decides_by_compute_capability_and_memory(hardware, name):
    assert profile_name_for(hardware) == name
    assert get_profile(hardware=hardware) == PROFILES[name]


def test_none_empty_and_auto_take_the_environment_first(monkeypatch):
    monkeypatch.setenv("LLM_WORKBOOK_PROFILE", "t4")
    assert {get_profile(name, hardware=A100).name for name in (None, "", "auto")} == {"t4"}
    assert get_profile("cpu", hardware=A100).name == "cpu"


def test_an_empty_or_automatic_choice_in_the_environment_leaves_it_to_the_hardware(monkeypatch):
    for value in ("", "auto"):
        monkeypatch.setenv("LLM_WORKBOOK_PROFILE", value)
        assert get_profile(hardware=A100).name == "large"


@pytest.mark.parametrize("in_environment", [False, True])
def test_an_unknown_profile_is_named_together_with_the_known_ones(monkeypatch, in_environment):
    monkeypatch.setenv("LLM_WORKBOOK_PROFILE", "tpu")
    with pytest.raises(CourseError, match=r"no profile 'tpu': use one of cpu, t4, large, or auto\."):
        get_profile(None if in_environment else "tpu")


def test_a_model_of_ones_own_replaces_the_model_and_its_revision():
    profile = get_profile("t4", model_id="llm-jp/llm-jp-3-150m", hardware=T4)
    assert (profile.model_id, profile.revision) == ("llm-jp/llm-jp-3-150m", None)
    assert (profile.dtype, profile.device) == ("float16", "cuda")


def test_a_model_id_may_carry_a_revision():
    profile = get_profile("t4", model_id="llm-jp/llm-jp-3-150m@3f2a", hardware=T4)
    assert (profile.model_id, profile.revision) == ("llm-jp/llm-jp-3-150m", "3f2a")


def test_a_folder_with_an_at_sign_in_its_name_is_a_folder(tmp_path):
    folder = tmp_path / "tiny@home"
    folder.mkdir()
    profile = get_profile("cpu", model_id=str(folder))
    assert (profile.model_id, profile.revision) == (str(folder), None)


def test_every_hub_model_is_pinned_to_a_commit():
    for profile in (profile for profile in PROFILES.values() if "/" in profile.model_id):
        assert len(profile.revision) == len(profile.assistant_revision) == 40


def test_a_hub_model_names_its_licence_and_a_model_of_ones_own_has_none():
    assert {name for name, profile in PROFILES.items() if profile.licence == "Apache-2.0"} == {"t4", "large"}
    assert get_profile("t4", model_id="owner/model", hardware=T4).licence is None


@pytest.mark.parametrize("name", ["t4", "large"])
def test_the_shape_of_a_profiles_model_is_known(name):
    assert PROFILES[name].model_id in bundled_shapes()


def test_a_gpu_profile_without_a_gpu_says_what_to_do():
    with pytest.raises(CourseError, match="t4 needs a CUDA GPU and there is none here"):
        get_profile("t4", hardware=NO_GPU)


def test_a_gpu_profile_with_a_model_of_ones_own_falls_back_to_the_cpu():
    profile = get_profile("large", model_id="some/model", hardware=NO_GPU)
    assert (profile.name, profile.device, profile.dtype) == ("large", "cpu", "float32")


def test_no_profile_uses_bfloat16_below_compute_capability_8():
    assert get_profile("large", hardware=V100).dtype == "float16"
    assert get_profile("large", hardware=A100).dtype == "bfloat16"


TORCH_OF_2026 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built_for", "runs"),
    [
        ((7, 5), TORCH_OF_2026, True),
        ((8, 9), TORCH_OF_2026, True),
        ((12, 1), TORCH_OF_2026, True),
        ((7, 0), TORCH_OF_2026, False),  # a V100
        ((6, 0), TORCH_OF_2026, False),  # a P100
        ((6, 0), ["sm_50", "sm_60", "sm_70"], True),
        ((10, 0), ["sm_80", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((7, 0), [], True),
    ],
)
def test_torch_runs_on_gpus_that_it_has_code_for(capability, built_for, runs):
    assert has_code_for(capability, built_for) == runs


def test_a_gpu_that_torch_has_no_code_for_is_a_sentence_and_by_itself_the_cpu():
    p100 = Hardware(unusable="Tesla P100 with compute capability 6.0, where torch 2.11 has sm_75")
    assert get_profile(hardware=p100) == PROFILES["cpu"]
    with pytest.raises(CourseError, match=r"cannot run on the GPU here \(Tesla P100.* has sm_75\): choose a runtime"):
        get_profile("t4", hardware=p100)


def test_the_root_is_the_folder_of_the_course():
    assert (ROOT / "requirements.txt").is_file()
    assert (ROOT / "helpers" / "profiles.py").is_file()


def test_choosing_the_cpu_profile_does_not_import_torch():
    code = "import sys; from helpers.profiles import get_profile; get_profile('cpu'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_old_python_is_told_in_one_sentence():
    code = "import sys; sys.version_info = (3, 9, 2, 'final', 0); import helpers.profiles"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: The course needs Python 3.11 or newer and this is 3.9: install a newer one.\n"


def test_the_check_for_an_old_python_can_be_read_by_one():
    ast.parse((ROOT / "helpers" / "__init__.py").read_text(), feature_version=(3, 4))
