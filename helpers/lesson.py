"""What every lesson does besides teaching: choose the model and number format, scale work, and keep its claims.

    lesson = Lesson("08", profile, model_id, seed, budget, uses="assistant")
    lesson.claim("PPO raises the true reward", gain, at_least=0.5)   # an effect
    lesson.equal("LoRA is peft's", difference, within=1e-6)          # an identity
    lesson.report("true reward without KL", value)                   # a number, no promise
    lesson.summary()                                                 # the closing table

A claim has a name that is the same in every run, a number, and a bound; `python -m course claims` collects them over
seeds and in a control run, where an effect must not hold.
"""

import contextlib
import ctypes
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from IPython.display import Markdown, display

from helpers import plots
from helpers.errors import CourseError
from helpers.profiles import CPU, get_profile

RECORD = "LLM_WORKBOOK_CLAIMS"  # environment variable: "record" prints claims that do not hold, and insists on none
PRECISIONS = {"float32": "fp32", "float16": "fp16-mixed", "bfloat16": "bf16-mixed"}


@dataclass(frozen=True)
class Claim:
    """One line that a lesson says about its numbers."""

    statement: str
    kind: str  # "effect", "identity" or "report"
    value: float | str  # text only in a report
    shown: str  # the value as it is printed
    at_least: float | None = None
    at_most: float | None = None
    control: float | None = None  # the number where what is said is not so, if the lesson measures that itself

    @property
    def holds(self) -> bool:
        """Whether the number keeps its bounds; a report always does, and a number that is not finite never."""
        return self.kind == "report" or self.keeps(self.value)

    def keeps(self, value: float) -> bool:
        """Whether another number would keep the bounds of this claim."""
        return math.isfinite(value) and (
            (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)
        )

    def __str__(self) -> str:
        """The line that the lesson prints."""
        return f"{'holds' if self.holds else 'DOES NOT HOLD'}: {self.statement} ({self.shown})"


class Lesson:
    """The machine of a lesson, the size of its work, and its claims.

    `number` is the lesson's, such as "08"; the other arguments are those of the cell tagged `parameters`. `uses` says
    which of the profile's models the lesson is about, "base" or "assistant".
    """

    def __init__(
        self, number: str, profile: str = "", model_id: str = "", seed: int = 0, budget: float = 1.0, uses: str = "base"
    ) -> None:
        """Print one line about both, set the style of plots, and quiet remarks about kernels that are not used."""
        if budget <= 0:
            raise CourseError(f"The budget is {budget}: give a share above 0; 1 is the whole lesson.")
        _keep_freed_memory()
        self.number, self.seed, self.budget = number, seed, budget
        self.machine = get_profile(profile, model_id or None)
        model, own = (
            (self.machine.assistant_id, CPU.assistant_id)
            if uses == "assistant"
            else (self.machine.model_id, CPU.model_id)
        )
        self.complete = budget >= 1 and self.machine.name == "cpu" and model == own  # the run that claims are about
        self.claims: dict[str, Claim] = {}
        plots.use_style()
        for library in ("bitsandbytes", "torch.distributed"):
            logging.getLogger(library).setLevel(logging.ERROR)
        print(
            f"lesson {number}, profile {self.machine.name}: {model.split('/')[-1]} on {self.machine.device} "
            f"in {self.machine.dtype}, seed {seed}, budget {budget:g}"
        )

    def scaled(self, number: int, least: int = 4) -> int:
        """A number of steps, documents or questions at this budget, of at least `least`, if `number` is no smaller."""
        return max(min(least, number), round(number * self.budget))

    @property
    def precision(self) -> str:
        """Number format for `TrainConfig`: "bf16-mixed" also on a CPU that multiplies bfloat16 in hardware."""
        fast = self.machine.device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        return "bf16-mixed" if fast else PRECISIONS[self.machine.dtype]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Format in which matrices are multiplied under `autocast`."""
        return {"fp16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(self.precision, torch.float32)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """A context that multiplies matrices in 16 bits where this machine is faster at it."""
        enabled = enabled and self.compute_dtype != torch.float32
        return torch.autocast(self.machine.device, self.compute_dtype if enabled else torch.bfloat16, enabled=enabled)

    def claim(
        self,
        statement: str,
        value: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        control: float | None = None,
        insist: bool = True,
        form: str = ".3g",
    ) -> None:
        """Say an effect: print whether `value` keeps its bounds, and insist on it in the complete run with seed 0.

        On another seed a claim that does not hold is printed, and the lesson goes on. `statement` names the claim and
        has no measured number in it. `control` is the number where the thing said is not so, if the lesson measures
        it; otherwise it is that of the null run. `insist` is False where a machine was too slow to try it; `form`
        formats numbers, ".0%" for shares. `AssertionError` if the claim is insisted on and does not hold,
        `CourseError` without a bound.
        """
        if at_least is None and at_most is None:
            raise CourseError(f"The claim {statement!r} has no bound: give at_least or at_most, or use report.")
        bounds = {"at least": at_least, "at most": at_most}
        said = [f"{word} {bound:{form}}" for word, bound in bounds.items() if bound is not None]
        shown = f"{float(value):{form}}, {' and '.join(said)}"
        if control is not None:
            control = float(control)
            shown += f"; control {control:{form}}"
        claim = Claim(statement, "effect", float(value), shown, at_least, at_most, control)
        self._keep(claim, insisted=insist and self.complete and self.seed == 0)

    def equal(self, statement: str, difference: float, *, within: float = 0.0) -> None:
        """Say an identity, code against a library or a derivation: `difference` is at most `within`, on every seed."""
        shown = f"difference {float(difference):.1e}, at most {within:.1e}" if within else f"{difference:g} differ"
        claim = Claim(statement, "identity", float(difference), shown, at_most=within)
        self._keep(claim, insisted=self.complete)

    def report(self, name: str, value: float | str, form: str = ".3g") -> None:
        """Keep a number for the closing table, without a promise; text is shown as it is."""
        shown = value if isinstance(value, str) else f"{float(value):{form}}"
        self.claims[name] = Claim(name, "report", value if isinstance(value, str) else float(value), shown)

    def summary(self) -> None:
        """Show all claims and reports as a table; its metadata hold them for `python -m course claims`."""
        lines = ["| what was measured | number | |", "|---|---|---|"]
        for claim in self.claims.values():
            mark = "" if claim.kind == "report" else "holds" if claim.holds else "**does not hold**"
            lines.append(" | ".join(["", _cell(claim.statement), _cell(claim.shown), mark, ""]).strip())
        record = {"lesson": self.number, "seed": self.seed, "complete": self.complete}
        record["claims"] = [asdict(claim) for claim in self.claims.values()]
        display(Markdown("\n".join(lines)), metadata={"workbook": record})

    def _keep(self, claim: Claim, insisted: bool) -> None:
        self.claims[claim.statement] = claim
        print(claim)
        assert claim.holds or not insisted or os.environ.get(RECORD) == "record", claim.statement


def _keep_freed_memory() -> None:
    """Let Linux's allocator keep what tensors give back: to fetch it anew takes a sixth of the time of small models."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another system, another allocator
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: only what is larger, in bytes, is memory of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes that are kept for what comes next


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def show_table(rows: Mapping[str, Sequence[object]], columns: Sequence[str]) -> None:
    """Print rows of cells under the names of their columns, name -> cells, aligned to the right."""
    lines = [["", *columns], *([name, *map(str, cells)] for name, cells in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        print("   ".join([f"{name:<{widths[0]}}", *padded]))


def quiet_libraries() -> None:
    """Silence progress bars and remarks of transformers, datasets and trl, for cells that compare with them."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"trl\b")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # trl asks by old names
