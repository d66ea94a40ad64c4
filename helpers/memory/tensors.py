"""A training step performed on sizes: tensors without data, autograd over them, and the bytes that live.

A `Tensor` has a number of elements and a lifetime. Each operation allocates its result and keeps what autograd keeps
for its backward pass (https://github.com/pytorch/pytorch/blob/main/tools/autograd/derivatives.yaml); the engine goes
back over the operations and frees it again in torch's order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from helpers.memory.choices import Settings

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits")
INFERENCE_PARTS = ("parameters", "kv_cache", "activations", "logits")


class Storage:
    """Bytes that are allocated until the last reference is gone: CPython counts references just as torch does."""

    __slots__ = ("memory", "part", "size")

    def __init__(self, memory: "Memory", size: int, part: str) -> None:
        """Allocate."""
        self.memory, self.size, self.part = memory, size, part
        memory.add(part, size)

    def __del__(self) -> None:
        """Free."""
        self.memory.live[self.part] -= self.size
        self.memory.total -= self.size

    def move(self, part: str, size: int) -> None:
        """Count it as another part, of another size."""
        self.memory.live[self.part] -= self.size
        self.memory.total -= self.size
        self.part, self.size = part, size
        self.memory.add(part, size)


class Leaf:
    """Where gradients end: a trained parameter, or the input of a recomputed layer."""

    def __init__(self, is_parameter: bool) -> None:
        """Nothing has arrived yet."""
        self.is_parameter = is_parameter
        self.uses = 0  # a tied embedding is used twice, and its gradient complete when both have arrived
        self.gradient: Tensor | None = None


@dataclass(slots=True, eq=False)
class Node:
    """A recorded operation: where its gradients go, how they are made, and what is kept for them."""

    inputs: list["Tensor"]  # without their storage
    kind: str
    saved: list[Storage]
    scratch: int


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One of several results of an operation, whose gradients are put together."""

    node: Node


class Tensor:
    """`elements` numbers of `width` bytes in a storage, and what computes its gradient, if it needs one."""

    __slots__ = ("elements", "part", "source", "storage", "width")

    def __init__(self, elements: int, width: float, storage: Storage, source: Any = None) -> None:
        """View a storage."""
        self.elements, self.width, self.storage, self.source = elements, width, storage, source
        self.part = "activations" if storage.part == "parameters" else storage.part  # what its gradient counts as

    def without_storage(self) -> "Tensor":
        """What a gradient of this tensor needs to know."""
        edge = Tensor(self.elements, self.width, self.storage, self.source)
        edge.storage = None
        return edge


class Memory:
    """Live bytes by part, the peak of each phase of the step, and the operations of which the step consists."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is allocated yet."""
        self.settings = settings
        self.live: dict[str, int] = dict.fromkeys((*PARTS, *INFERENCE_PARTS), 0)
        self.total = self.highest = 0
        self.peaks: dict[str, dict[str, int]] = {}
        self.phase, self.part = "forward", "activations"
        self.training = settings.method != "frozen"
        self.tape: list[Node] | None = (
            [] if self.training else None
        )  # None: nothing is recorded, as under torch.no_grad()
        self.cast_weights: dict[Tensor, Tensor] = {}  # autocast keeps 16-bit copies of trained weights

    def add(self, part: str, size: int) -> None:
        """Count an allocation."""
        self.live[part] += size
        self.total += size
        if self.total > self.highest:
            self.highest = self.total
            self.peaks[self.phase] = self.live.copy()

    def enter(self, phase: str) -> None:
        """Begin a phase of the step."""
        self.phase, self.highest = phase, 0
        self.add("activations", 0)

    def new(self, elements: int, width: float, part: str = "") -> Tensor:
        """Allocate a tensor."""
        return Tensor(elements, width, Storage(self, int(elements * width), part or self.part))

    def op(
        self,
        elements: int,
        width: float,
        inputs: Iterable[Tensor | None],
        saves: Iterable[Tensor | None] = (),
        kind: str = "own",
        save_result: bool = False,
        scratch: float = 0,
        view: bool = False,
    ) -> Tensor:
        """Result of an operation; a view has the storage of the first input.

        `kind` says what the gradients of the inputs are: "own" allocates one of the size of each input; "same" hands
        the incoming one on, as an addition does; "full" computes one of the size of the result, which is then summed
        or cast to that of the input, as a product does. `scratch`: bytes that the backward needs besides.
        """
        inputs = [x for x in inputs if x is not None]
        result = Tensor(elements, width, inputs[0].storage) if view else self.new(elements, width)
        needing = [x for x in inputs if x.source is not None]
        if self.tape is not None and needing:
            saved = [x.storage for x in saves if x is not None] + [result.storage] * save_result
            result.source = Node([x.without_storage() for x in needing], kind, saved, int(scratch))
            self.tape.append(result.source)
            for x in needing:
                if isinstance(x.source, Leaf):
                    x.source.uses += 1
        return result

    def backward(self, tape: list[Node], gradients: dict[Any, Tensor]) -> None:
        """Run autograd's engine over the tape, newest operation first, freeing what each operation saved."""
        while tape:
            node = tape.pop()
            gradient = gradients.pop(node, None)
            if gradient is None:  # no path to the loss
                continue
            if isinstance(node, Checkpoint):
                node.backward(self, gradient, gradients)
                continue
            scratch = Storage(self, node.scratch, node.inputs[0].part)
            made = []
            for x in node.inputs:
                if node.kind == "own":
                    made.append(self.new(x.elements, x.width, x.part))
                elif node.kind == "same":
                    made.append(gradient)
                else:
                    made.append(self.new(gradient.elements, gradient.width, gradient.part))
            node.saved.clear()
            del gradient, scratch
            for x in node.inputs:
                raw = made.pop(0)
                if (raw.elements, raw.width) != (x.elements, x.width):
                    raw = self.new(x.elements, x.width, x.part)  # summed to the input's shape, cast to its type
                self.accumulate(x.source, raw, gradients)
                del raw

    def accumulate(self, source: Any, gradient: Tensor, gradients: dict[Any, Tensor]) -> None:
        """Add a gradient to what has arrived there before."""
        if isinstance(source, Leaf):
            source.uses -= 1
            if source.gradient is not None:
                gradient = self.new(gradient.elements, gradient.width, gradient.part)
            source.gradient = gradient
            if source.is_parameter and not source.uses:
                gradient.storage.move("gradients", -(-gradient.storage.size // self.settings.gradient_shards))
        elif isinstance(source, Part):
            gradients.setdefault(source.node, []).append(gradient)
        elif source in gradients:
            gradients[source] = self.new(gradient.elements, gradient.width, gradient.part)
        else:
            gradients[source] = gradient

    # Operations: what each allocates, and what it saves for the backward pass

    def cast(self, x: Tensor, width: float) -> Tensor:
        """`x.to(dtype)`: a copy, unless it has that type."""
        return x if x.width == width else self.op(x.elements, width, [x])

    def split(self, x: Tensor, sizes: Iterable[int], scratch: float = 0) -> list[Tensor]:
        """Views of parts of x; the backward joins their gradients in a new tensor."""
        whole = self.op(x.elements, x.width, [x], view=True, scratch=scratch)
        source = whole.source and Part(whole.source)
        return [Tensor(size, x.width, x.storage, source) for size in sizes]

    def transpose(self, x: Tensor) -> Tensor:
        """Heads before positions: a view, whose gradient has to be copied back into order."""
        return self.op(x.elements, x.width, [x], view=True)

    def add_(self, x: Tensor, y: Tensor) -> Tensor:
        """`x + y`: saves nothing, and both get the incoming gradient."""
        return self.op(x.elements, max(x.width, y.width), [x, y], kind="same")

    def scale(self, x: Tensor, width: float = 0) -> Tensor:
        """Product with a constant: saves nothing of x."""
        return self.op(x.elements, max(width, x.width), [x], kind="full")

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """`x * y`: each is saved if the other needs a gradient."""
        saves = [x if y.source else None, y if x.source else None]
        return self.op(max(x.elements, y.elements), max(x.width, y.width), [x, y], saves, kind="full")

    def power(self, x: Tensor) -> Tensor:
        """`x.pow(n)`: saves x; the backward computes n * x^(n-1) in two steps before the product."""
        return self.op(x.elements, x.width, [x], [x], scratch=2 * x.elements * x.width)

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Saves a mask: one byte each on CUDA (native_dropout); on the CPU, numbers of x's type."""
        if not probability or not self.training:
            return x
        mask = self.new(x.elements, 1 if self.settings.device == "cuda" else x.width)
        return self.op(x.elements, x.width, [x], [mask], kind="full")

    def matmul(self, x: Tensor, weight: Tensor, elements: int, bias: Tensor | None = None) -> Tensor:
        """`F.linear`: saves x if the weight is trained, and the weight if x needs a gradient."""
        if self.settings.autocast:
            x, bias = self.cast(x, 2), bias and self.cast_weight(bias)
            weight = self.cast_weight(weight)
        saves = [x if weight.source else None, weight if x.source else None]
        return self.op(elements, x.width, [x, weight, bias], saves)

    def cast_weight(self, weight: Tensor) -> Tensor:
        """Autocast's 16-bit copy of a weight, which it caches if the weight is trained."""
        if weight in self.cast_weights:
            return self.cast_weights[weight]
        copy = self.cast(weight, 2)
        if weight.source is not None and copy is not weight:
            self.cast_weights[weight] = copy
        return copy

    def rms_norm(self, x: Tensor, weight: Tensor, gemma: bool = False) -> Tensor:
        """LlamaRMSNorm: in fp32, then `weight * hidden.to(dtype)`; Gemma multiplies before it casts."""
        rows = x.elements // weight.elements
        high = self.cast(x, 4)
        variance = self.op(rows, 4, [self.power(high)])  # pow and mean
        inverse = self.op(rows, 4, [variance], save_result=True)  # rsqrt
        normed = self.multiply(high, inverse)
        del high, variance, inverse
        if gemma:
            factor = self.scale(self.cast(weight, 4))  # 1 + weight
            normed = self.multiply(normed, factor)
            return self.cast(normed, x.width)
        normed = self.cast(normed, x.width)
        return self.multiply(weight, normed)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """native_layer_norm: saves its input, and mean and inverse deviation of each row."""
        statistics = self.new(2 * x.elements // weight.elements, x.width)
        return self.op(x.elements, x.width, [x, weight, bias], [x, statistics])

    def activation(self, x: Tensor, name: str) -> Tensor:
        """silu and gelu save their input; gelu_new is written out, and each product in it saves its factors."""
        if name not in ("gelu_new", "gelu_fast"):
            return self.op(x.elements, x.width, [x], [x])
        half = self.scale(x)  # 0.5 * x
        inner = self.scale(self.add_(x, self.scale(self.power(x))))
        tanh = self.op(x.elements, x.width, [inner], save_result=True)
        del inner
        shifted = self.op(x.elements, x.width, [tanh], kind="same")  # 1 + tanh
        del tanh
        return self.multiply(half, shifted)

    def rotate(self, x: Tensor, width: float) -> Tensor:
        """Rotary embedding, `x * cos + rotate_half(x) * sin`: cosine and sine need no gradient, so x is not saved."""
        first = self.scale(x, width)
        half = self.new(x.elements // 2, x.width)
        turned = self.op(x.elements, x.width, [x], scratch=x.elements * x.width)
        del half
        second = self.scale(turned, width)
        del turned
        return self.add_(first, second)


class Checkpoint(Node):
    """A layer of which only the input is kept; the backward runs it again (torch.utils.checkpoint, not reentrant)."""

    def __init__(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """Keep the input."""
        super().__init__([x.without_storage()], "own", [x.storage], 0)
        self.layer = layer

    def backward(self, memory: Memory, gradient: Tensor, gradients: dict[Any, Tensor]) -> None:
        """Run the layer on its input, then go back through it."""
        x, outer = self.inputs[0], memory.tape
        start = Leaf(is_parameter=False) if x.source is not None else None
        memory.tape = []
        result = self.layer(Tensor(x.elements, x.width, self.saved.pop(), start))
        memory.cast_weights.clear()
        inner, memory.tape = memory.tape, outer
        seed = {result.source: gradient}
        del result, gradient
        memory.backward(inner, seed)
        self.layer = None  # it holds the mask, as torch's frame does until the layer's last saved tensor is gone
        if start is not None:
            gradient, start.gradient = start.gradient, None
            memory.accumulate(x.source, gradient, gradients)
