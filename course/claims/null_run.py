"""The null run: a lesson in which nothing learns. Its own cells run unchanged, in a kernel that `begin` prepared.

Optimisers do nothing, and the models that ship with the course come with fresh weights. An effect that holds here says
nothing about learning. LBFGS goes on working: lessons fit curves with it, and train no model.
"""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from types import MethodType

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from helpers.profiles import ROOT

SHIPPED = ROOT / "data"
STARTUP = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from course.claims import null_run; null_run.begin();"


def begin() -> None:
    """Prepare this process, once and for good."""
    make_optimisers_idle()
    make_shipped_models_untrained()


def make_optimisers_idle() -> None:
    """From now on every new optimiser but LBFGS leaves its parameters as they are, bitsandbytes' and one's own too."""
    construct = torch.optim.Optimizer.__init__

    def construct_idle(self: torch.optim.Optimizer, *arguments, **settings) -> None:
        construct(self, *arguments, **settings)
        if not isinstance(self, torch.optim.LBFGS):
            self.step = MethodType(_do_nothing, self)  # schedulers and scalers ask for a bound method

    torch.optim.Optimizer.__init__ = construct_idle


def make_shipped_models_untrained() -> None:
    """From now on a model that is read from data/ has the shapes of its weights, and none of their values."""
    read = PreTrainedModel.from_pretrained.__func__

    @cache
    def untrained(folder: Path) -> str:
        """A copy of the folder with fresh weights: what quantises while it reads finds them too."""
        copy = tempfile.mkdtemp(prefix="untrained-")
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        model = read(LlamaForCausalLM, folder)
        forget(model)
        model.save_pretrained(copy)
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        return copy

    def read_untrained(model_class: type, place: str | Path, *arguments, **settings) -> PreTrainedModel:
        folder = Path(place).resolve()
        return read(model_class, untrained(folder) if folder.parent == SHIPPED else place, *arguments, **settings)

    PreTrainedModel.from_pretrained = classmethod(read_untrained)


@torch.no_grad()
def forget(model: PreTrainedModel) -> None:
    """Give all parameters the values of a new model: normal ones for matrices, 1 for the scales of norms, 0 else."""
    generator = torch.Generator().manual_seed(0)
    deviation = model.config.get_text_config().initializer_range
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _do_nothing(self: torch.optim.Optimizer, closure=None):
    """In place of a step; a closure is called, for the loss that it returns."""
    return None if closure is None else torch.enable_grad()(closure)()
