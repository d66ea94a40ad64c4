"""A GPU that is not there holds what a GPU holds, refuses what it refuses, and knows what can be known.

All is tried in one process, since the device takes the place of `torch.cuda` for good.
"""

import json
import subprocess
import sys

import pytest

from helpers.profiles import ROOT

pytestmark = pytest.mark.slow

CODE = """
import copy, gc, json, sys, weakref
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from course.rehearsal import cuda, hollow
from helpers.memory import GPUS, bundled_shapes, estimate_training

found = {}
device = cuda.install(GPUS["T4"])
memory = device.allocator

# Memory
name = "HuggingFaceTB/SmolLM2-135M"
fields = {key: value for key, value in bundled_shapes()[name].items() if key not in ("model_type", "source")}
config = AutoConfig.for_model(bundled_shapes()[name]["model_type"], **fields)
config.use_cache = False
for precision, batch_size, seq_len in (("fp16-mixed", 4, 256), ("fp32", 2, 512)):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    model = model.to_empty(device="cuda:0")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16-mixed")
    ids = torch.randint(config.vocab_size, (batch_size, seq_len), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # without padding a T4 takes the plain kernel for grouped heads, which the estimator leaves out
    for _ in range(2):
        memory.reset_peaks()
        with torch.autocast("cuda", torch.float16, enabled=precision == "fp16-mixed"):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        del loss
    chosen = {"precision": precision, "batch_size": batch_size, "seq_len": seq_len}
    found[f"step in {precision}"] = memory.peak_requested / estimate_training(name, **chosen).total
    one = sum(p.nbytes for p in model.parameters())
    before = memory.requested
    second = copy.deepcopy(model)
    found["a copy"] = (memory.requested - before) / one
    del second, model, optimizer, ids, mask
    gc.collect()
    found["left behind"] = memory.allocated

# Faults
x = torch.randn(4, 8).cuda()
layer = torch.nn.Linear(8, 8).to("cuda")
half = torch.nn.Linear(8, 8).half().cuda()
def scaled_bfloat16():
    layer = torch.nn.Linear(8, 8).bfloat16().cuda()
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=1.0), torch.amp.GradScaler("cuda")
    scaler.scale(layer(x.bfloat16()).float().sum()).backward()
    scaler.step(optimizer)
def scaled_half():
    optimizer, scaler = torch.optim.SGD(half.parameters(), lr=1.0), torch.amp.GradScaler("cuda")
    scaler.scale(half(x.half()).float().sum()).backward()
    scaler.step(optimizer)
faults = {
    "two devices": lambda: x + torch.ones(4, 8),
    "input left on the CPU": lambda: layer(torch.ones(4, 8)),
    "ids left on the CPU": lambda: F.embedding(torch.tensor([[1, 2]]), layer.weight),
    "model left on the CPU": lambda: torch.nn.Linear(8, 8)(x),
    "two formats": lambda: half(x),
    "a generator of the CPU": lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    "numpy": lambda: x.detach().numpy(),
    "a scaler with fp16 weights": scaled_half,
    "a scaler with bf16 weights": scaled_bfloat16,
}
for fault, cause in faults.items():
    try:
        cause()
        found[fault] = "nothing"
    except (RuntimeError, TypeError, ValueError) as error:
        found[fault] = str(error)
device.emulated.clear()
with torch.autocast("cuda", torch.bfloat16):
    layer(x)
found["bfloat16"] = sorted(device.emulated)

# Formats under autocast, as CUDA's lists say
with torch.autocast("cuda", torch.float16):
    y = layer(x)
    formats = [y, y.softmax(-1), F.layer_norm(y, (8,)), y.pow(2), y + 1, y @ y.T, F.gelu(y)]
found["formats"] = [str(tensor.dtype).removeprefix("torch.") for tensor in formats]

# Numbers
ids = torch.tensor([[5, 7, -100], [3, -100, -100]], device="cuda")
device.reads = 0
kept = ids[ids != -100]
found["numbers"] = [ids.tolist(), (ids != -100).sum().item(), len(kept), ids.clamp(min=0).sum(1).tolist()]
found["reads"] = device.reads
token = layer(x).argmax(-1)
drawn = torch.multinomial(torch.softmax(torch.randn(4, 2**19, device="cuda"), -1), 2)  # more than are made up
found["drawn"] = [tuple(drawn.shape), max(drawn.flatten().tolist()) < 2**19]
found["made up"] = [0 <= number < 8 for number in token.tolist()] + [token.tolist() == token.tolist()]
scores, allowed = torch.randn(4, 2**17, device="cuda"), torch.zeros(4, 2**17, dtype=torch.bool)
allowed[:, [7, 90_000]] = True
masked = scores.masked_fill(~allowed.cuda(), float("-inf"))
chosen = [masked.argmax(-1), masked.topk(2).indices, torch.multinomial((masked / 0.7).softmax(-1), 1)]
added = torch.full_like(scores, float("-inf"))  # the way of transformers
for row in range(4):
    added[row, [7, 90_000]] = 0
lost = (scores + added).amax(-1).isneginf().view(4, -1).all(-1, keepdim=True)
chosen += [torch.where(lost, added, scores + added).argmax(-1), torch.multinomial((scores + added).softmax(-1), 2)]
found["chosen under a mask"] = [set(places.flatten().tolist()) <= {7, 90_000} for places in chosen]
found["chosen when the mask is gone"] = set((scores + added.zero_()).argmax(-1).tolist()) <= {7, 90_000}
total = torch.zeros(4, 4, device="cuda")
torch.addmm(total, x.half(), x.half().T, out_dtype=torch.float32, out=total)
found["added in float32"] = str(total.dtype)
found["a list picks numbers"] = torch.arange(4).cuda()[[2, 3]].tolist()
found["a list picks rows"] = [tuple(x[[0, 2, 2]].shape), str(x[[0, 2, 2]].device)]
scale, zero = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda", dtype=torch.int32)
found["fake codes"] = tuple(torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, 15).shape)
found["pinned"] = torch.empty(2, pin_memory=True).to("cuda").shape[0]
found["there and back"] = torch.equal(torch.arange(5.0).cuda().cpu(), torch.arange(5.0))
generator = torch.Generator("cuda").manual_seed(0)
found["own generator"] = tuple(torch.rand(3, device="cuda", generator=generator).shape)
parameter = layer.weight
stays = torch.nn.Linear(8, 8).to("cuda")
weight, reference = stays.weight, weakref.ref(stays.weight)  # PyTorch does not swap what others refer to
found["moved where it is"] = stays.to("cuda").weight is weight and stays.half().weight.dtype is torch.float16
layer.half().float().cpu()
found["moved in place"] = layer.weight is parameter and parameter.device.type == "cpu"

# Large tensors of the CPU that hold nothing
begun = torch.nn.Linear(2048, 2048)
back = copy.deepcopy(begun).half().to("cuda").cpu().float()
found["hollow"] = [hollow.is_hollow(layer.weight) for layer in (begun, back, copy.deepcopy(back))]
with torch.no_grad():
    back.weight[0, 0] = 3
found["written"] = [hollow.is_hollow(back.weight), copy.deepcopy(back).weight[0, 0].item()]
found["own numbers"] = torch.ones(2048, 2048).clone().mean().item()

# A look without gradients before a step
layer = torch.nn.Linear(4, 2).cuda()
with torch.autocast("cuda", torch.float16):
    with torch.no_grad():
        layer(torch.ones(1, 4, device="cuda"))
    found["gradients after a look"] = layer(torch.ones(1, 4, device="cuda")).requires_grad

# Four bits
from peft import LoraConfig, get_peft_model
from helpers.models import load_in_4_bit
from helpers.profiles import ROOT
before = memory.allocated
four_bit = load_in_4_bit(ROOT / "data" / "shima-4m", "cuda", torch.float16)
held = memory.allocated - before
with torch.device("meta"):
    whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ROOT / "data" / "shima-4m"))
found["shapes alone"] = memory.allocated - before - held
matrices = sum(m.weight.numel() for n, m in whole.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n)
rest = sum(parameter.numel() for parameter in whole.parameters()) - matrices
found["bits of a weight"] = (held - 2 * rest) * 8 / matrices
tuned = get_peft_model(four_bit, LoraConfig(r=2, target_modules="all-linear"))
ids = torch.arange(12).view(2, 6).cuda()
tuned(input_ids=ids, labels=ids).loss.backward()
found["adapters with gradients"] = {p.requires_grad for p in tuned.parameters() if p.grad is not None} == {True}
before = memory.allocated
again = copy.deepcopy(four_bit)
found["packed copies are packed"] = memory.allocated - before
import bitsandbytes as bnb
layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float16).to("cuda")
found["packed on the way"] = [tuple(layer.weight.shape), str(layer(torch.ones(1, 64).half().cuda()).device)]
packed = four_bit.model.layers[0].mlp.up_proj.weight
four_bit.to("cuda")
found["moving in place changes nothing"] = four_bit.model.layers[0].mlp.up_proj.weight is packed
weight = torch.nn.Parameter(torch.ones(512, 512, device="cuda"))
optimizer = bnb.optim.PagedAdamW8bit([weight])
weight.sum().backward()
before = memory.allocated
optimizer.step()
found["paged state"] = (memory.allocated - before) / weight.numel()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("precision", ["fp16-mixed", "fp32"])
def test_a_training_step_holds_what_the_estimator_says(found, precision):
    assert found[f"step in {precision}"] == pytest.approx(1, rel=0.05)


def test_a_copy_of_a_model_is_counted_and_what_is_dropped_is_free(found):
    assert found["a copy"] == pytest.approx(1, rel=0.01)
    assert found["left behind"] < 2**20


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("two devices", "found at least two devices, cuda:0 and cpu"),
        ("input left on the CPU", "found at least two devices"),
        ("ids left on the CPU", "found at least two devices"),
        ("model left on the CPU", "found at least two devices"),
        ("two formats", "same dtype"),
        ("a generator of the CPU", "Expected a 'cuda' device type for generator"),
        ("numpy", "can't convert cuda:0 device type tensor to numpy"),
        ("a scaler with fp16 weights", "Attempting to unscale FP16 gradients"),
        ("a scaler with bf16 weights", "_unscale_cuda\" not implemented for 'BFloat16'"),
    ],
)
def test_what_a_gpu_refuses_is_refused_in_its_words(found, fault, words):
    assert words in found[fault]


def test_a_format_that_the_device_lacks_is_noted(found):
    assert "bfloat16 in addmm" in found["bfloat16"]


def test_autocast_takes_the_formats_of_cuda(found):
    assert found["formats"] == ["float16", "float32", "float32", "float32", "float16", "float16", "float16"]


def test_autocasts_copies_made_without_gradients_do_not_hide_those_of_a_step(found):
    assert found["gradients after a look"]


def test_a_product_of_fp16_may_be_added_in_fp32(found):
    assert found["added in float32"] == "torch.float32"


def test_numbers_that_come_from_the_cpu_are_known_and_reading_them_is_counted(found):
    assert found["numbers"] == [[[5, 7, -100], [3, -100, -100]], 3, 3, [12, 3]]
    assert found["reads"] == 3
    assert found["a list picks numbers"] == [2, 3]
    assert found["a list picks rows"] == [[3, 8], "cuda:0"]
    assert found["there and back"]
    assert found["pinned"] == 2
    assert found["fake codes"] == [4, 8]


def test_numbers_of_a_model_are_made_up_within_their_range_and_stay_the_same(found):
    assert all(found["made up"])
    assert found["drawn"] == [[4, 2], True]


def test_no_choice_falls_on_what_a_lesson_masked(found):
    assert found["chosen under a mask"] == [True] * 5
    assert not found["chosen when the mask is gone"]


def test_the_device_has_generators_and_modules_move_in_place(found):
    assert found["own generator"] == [3]
    assert found["moved in place"]
    assert found["moved where it is"]


def test_copies_of_large_tensors_that_hold_nothing_hold_nothing_until_something_is_written(found):
    assert found["hollow"] == [True] * 3
    assert found["written"] == [False, 3.0]
    assert found["own numbers"] == 1.0


def test_a_model_of_shapes_alone_takes_no_memory(found):
    assert found["shapes alone"] == 0


def test_weights_in_four_bits_take_what_they_take_and_carry_gradients_to_adapters(found):
    assert 4.127 < found["bits of a weight"] < 4.4  # codes, scales, and for each matrix the tables of both
    assert found["adapters with gradients"]
    assert 2e6 < found["packed copies are packed"] < 4e6
    assert found["moving in place changes nothing"]
    assert found["packed on the way"] == [[2048, 1], "cuda:0"]


def test_paged_states_of_an_optimiser_take_no_room_on_the_device(found):
    assert found["paged state"] < 0.1
