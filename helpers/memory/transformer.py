"""A decoder-only model performed on sizes: `Model` follows transformers' modeling_*.py line by line.

The same variables are alive at the same time. `helpers.memory.estimate` asks; this module knows no names of devices.
"""

import math

from helpers.memory.choices import PRECISIONS
from helpers.memory.shape import ModelShape, is_linear
from helpers.memory.tensors import Checkpoint, Leaf, Memory, Storage, Tensor


class Model:
    """The weights of one model, and its forward pass in the order of transformers' modeling files."""

    def __init__(self, shape: ModelShape, memory: Memory) -> None:
        """Allocate the weights and adapters."""
        self.shape, self.memory, self.settings = shape, memory, memory.settings
        self.trained: list[tuple[int, ...]] = []
        self.outer = {name: self.weight(name, size) for name, size in shape.outer_weights().items()}
        self.layers = [
            {name: self.weight(name, size) for name, size in shape.layer_weights(layer).items()}
            for layer in range(shape.num_layers)
        ]
        frequencies = 0 if shape.family == "gpt2" else 4 * int(shape.head_dim * shape.rotary_fraction)
        self.buffers = Storage(memory, self.rotations * frequencies, "parameters")  # in fp32, twice
        self.adapters: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in self.layers]
        if self.settings.method in ("lora", "qlora"):
            for layer, adapters in enumerate(self.adapters):
                for name, size in shape.layer_weights(layer).items():
                    if targeted(name, self.settings.lora_targets):
                        adapters[name] = self.adapter(name, size)

    @property
    def rotations(self) -> int:
        """Rotary embeddings: layers of Gemma 3 that see everything turn more slowly than those with a window."""
        return 2 if self.shape.norms_after and 0 < self.shape.num_sliding_layers < self.shape.num_layers else 1

    @property
    def head(self) -> Tensor:
        """The output matrix."""
        return self.outer.get("lm_head", self.outer["embed_tokens"])

    def weight(self, name: str, size: tuple[int, ...]) -> Tensor:
        """A parameter of the model."""
        settings, elements = self.settings, math.prod(size)
        width = PRECISIONS[settings.precision]
        shards = settings.num_gpus if settings.zero_stage == 3 else 1
        stored = (
            quantised_size(size, settings.quantisation)
            if settings.quantisation and is_linear(name)
            else elements * width
        )
        trained = settings.method == "full"
        if trained:
            self.trained.append(size)
        storage = Storage(self.memory, -(-stored // shards), "parameters")
        return Tensor(elements, width, storage, Leaf(is_parameter=True) if trained else None)

    def adapter(self, name: str, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The two matrices of LoRA, which peft keeps in fp32; twice the rank where gate and up are one matrix."""
        pair, shards = [], self.settings.num_gpus if self.settings.zero_stage == 3 else 1
        rank = self.settings.lora_rank * (size[0] if len(size) == 3 else 1) * (2 if name == "experts_up" else 1)
        for shape in ((rank, size[-1]), (size[-2], rank)):
            self.trained.append(shape)
            storage = Storage(self.memory, -(-4 * math.prod(shape) // shards), "parameters")
            pair.append(Tensor(math.prod(shape), 4, storage, Leaf(is_parameter=True)))
        return pair[0], pair[1]

    def linear(self, x: Tensor, layer: int, name: str) -> Tensor:
        """A linear layer of the model, with its adapter if it has one; peft runs adapters in fp32."""
        memory, settings = self.memory, self.settings
        weight, bias = self.layers[layer][name], self.layers[layer].get(f"{name}.bias")
        outputs, inputs = self.shape.layer_weights(layer)[name]
        rows = x.elements // inputs
        if settings.quantisation:  # bitsandbytes: the backward makes the weight 16 bit again
            low = memory.cast(x, 2 if settings.autocast else x.width)
            result = memory.op(rows * outputs, low.width, [low], [weight], scratch=weight.elements * low.width)
            result = memory.cast(result, x.width)
        else:
            result = memory.matmul(x, weight, rows * outputs, bias)
        if name not in self.adapters[layer]:
            return result
        width = result.width
        if settings.method == "qlora":
            result = memory.op(result.elements, width, [result], kind="same")  # peft clones it
        down, up = self.adapters[layer][name]
        if not (settings.method == "qlora" and settings.autocast):
            x = memory.cast(x, 4)
        change = memory.matmul(memory.matmul(x, down, rows * settings.lora_rank), up, rows * outputs)
        change = memory.scale(change)
        if settings.method == "qlora" and not settings.autocast:
            change = memory.cast(change, width)
        result = memory.add_(result, change)
        return memory.cast(result, width) if settings.method == "lora" else result

    def adapted(self, layer: int, name: str) -> Tensor:
        """The weights of the experts with their adapters, which peft adds to them as one matrix."""
        memory, weight = self.memory, self.layers[layer][name]
        if name not in self.adapters[layer]:
            return weight
        down, up = (memory.cast(matrix, weight.width) for matrix in self.adapters[layer][name])
        return memory.op(weight.elements, weight.width, [down, up], [down, up])

    def norm(self, x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
        """The family's normalisation."""
        if f"{name}.bias" in weights:
            return self.memory.layer_norm(x, weights[name], weights[f"{name}.bias"])
        return self.memory.rms_norm(x, weights[name], gemma=self.shape.family == "gemma")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over all heads. Result: (batch, seq, heads * head_dim)."""
        memory, shape, settings = self.memory, self.shape, self.settings
        groups = shape.num_heads // shape.num_kv_heads
        repeat = groups > 1 and (mask is not None or settings.attention == "eager")
        if repeat:  # repeat_kv; without a mask SDPA shares the heads by itself
            single = shape.num_kv_heads == 1  # one head is repeated by a view
            key = memory.op(groups * key.elements, key.width, [key], view=single)
            value = memory.op(groups * value.elements, value.width, [value], view=single)
            repeat = not single
        rows = settings.batch_size * shape.num_heads * settings.seq_len
        if settings.attention == "eager":
            return self.attend_eagerly(query, key, value, mask, repeat)
        if settings.autocast:
            query, key, value = (memory.cast(x, 2) for x in (query, key, value))
        if shape.attention_dropout and memory.training and settings.device == "cpu":
            return self.attend_in_fp32(query, key, value, rows)  # the CPU has no fused kernel with dropout
        bias = mask and memory.new(mask.elements, query.width)  # the boolean mask as 0 and -inf, in each layer
        normaliser = memory.new(rows, 4)  # log-sum-exp, instead of the attention matrix
        saves = [query, key, value, bias, normaliser]
        result = memory.op(query.elements, query.width, [query, key, value], saves, save_result=True)
        del bias, normaliser, saves
        if shape.family in ("gpt_neox", "phi3") and settings.device == "cpu":
            result = memory.op(result.elements, result.width, [result])  # its kernel keeps the queries' layout
        return result

    def attend_eagerly(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, repeated: bool) -> Tensor:
        """The attention matrix in full: scores, scaled, masked, softmax in fp32, and its 16-bit copy."""
        memory, shape, settings = self.memory, self.shape, self.settings
        elements = settings.batch_size * shape.num_heads * settings.seq_len**2
        original = value.width if shape.family == "gpt2" else query.width
        width = 2 if settings.autocast else query.width
        joined = shape.family == "gpt_neox"

        def ready(x: Tensor, contiguous: bool) -> Tensor:
            x = memory.cast(x, width)  # the batched product wants contiguous inputs; repeated or joined ones are
            return x if contiguous or settings.batch_size == 1 else memory.op(x.elements, width, [x])

        def product(x: Tensor, y: Tensor, elements: int) -> Tensor:
            return memory.op(elements, width, [x, y], [x, y])

        scores = memory.scale(product(ready(query, joined), ready(key, joined or repeated), elements))
        scores = memory.op(elements, max(width, mask.width), [scores], kind="same")  # + mask
        high = memory.cast(scores, 4) if shape.family != "gpt2" else scores
        probabilities = memory.op(elements, high.width, [high], save_result=True)
        del high
        if shape.family == "gpt2":  # a statement of its own
            del scores
        probabilities = memory.cast(probabilities, original)
        scores = None
        probabilities = memory.dropout(probabilities, shape.attention_dropout)
        self.attention_weights = probabilities  # returned beside the result
        result = product(memory.cast(probabilities, width), ready(value, repeated), query.elements)
        return memory.op(query.elements, width, [result])  # transposed back

    def attend_in_fp32(self, query: Tensor, key: Tensor, value: Tensor, rows: int) -> Tensor:
        """SDPA's own fallback, written out in fp32."""
        memory, elements, width = self.memory, rows * self.settings.seq_len, query.width
        query, key, value = (memory.cast(x, 4) for x in (query, key, value))
        query, key = memory.scale(query), memory.scale(key)
        query, key = memory.op(query.elements, 4, [query]), memory.op(key.elements, 4, [key])
        scores = memory.op(elements, 4, [query, key], [query, key])
        scores = memory.op(elements, 4, [scores], kind="same")
        probabilities = memory.op(elements, 4, [scores], save_result=True)
        del scores
        probabilities = memory.dropout(probabilities, self.shape.attention_dropout)
        value = memory.op(value.elements, 4, [value])
        result = memory.op(query.elements, 4, [probabilities, value], [probabilities, value])
        result = memory.cast(result, width)
        return memory.op(query.elements, width, [result])

    def attention(self, x: Tensor, layer: int, mask: Tensor | None, rotary_width: float) -> Tensor:
        """Self-attention of a layer."""
        memory, shape, weights = self.memory, self.shape, self.layers[layer]
        tokens = self.settings.tokens
        q, kv = tokens * shape.num_heads * shape.head_dim, tokens * shape.num_kv_heads * shape.head_dim
        if "qkv_proj" in weights:
            joint = self.linear(x, layer, "qkv_proj")
            query, key, value = memory.split(joint, (q, kv, kv))
            del joint
        else:
            query, key, value = (self.linear(x, layer, name) for name in ("q_proj", "k_proj", "v_proj"))
            if shape.family != "gemma":
                query, key = self.norm_heads(query, key, weights)
            query, key = memory.transpose(query), memory.transpose(key)
            if shape.family == "gemma":
                query, key = self.norm_heads(query, key, weights)
        if shape.family != "gpt2":
            query, key = (self.rotary(x, rotary_width) for x in (query, key))
        result = self.attend(query, key, value, mask)
        del query, key, value
        return self.linear(result, layer, "o_proj")

    def norm_heads(self, query: Tensor, key: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys, normalised where the family does that."""
        if not self.shape.qk_norm:
            return query, key
        return self.norm(query, weights, "q_norm"), self.norm(key, weights, "k_norm")

    def rotary(self, x: Tensor, width: float) -> Tensor:
        """Rotary embedding of queries or keys; GPT-NeoX and Phi-3 turn a part and put the rest beside it again."""
        memory, fraction = self.memory, self.shape.rotary_fraction
        if self.shape.family not in ("gpt_neox", "phi3"):
            return memory.rotate(x, width)
        size = int(x.elements * fraction)
        turned, rest = memory.split(x, (size, x.elements - size), scratch=2 * x.elements * x.width)
        turned = memory.rotate(turned, width)
        return memory.op(x.elements, turned.width, [turned, rest])

    def feed_forward(self, x: Tensor, layer: int) -> Tensor:
        """The feed-forward part of a layer."""
        memory, name, weights = self.memory, self.shape.activation, self.layers[layer]
        if "router" in weights:
            return self.experts(x, layer)
        if "gate_proj" in weights:
            active = memory.activation(self.linear(x, layer, "gate_proj"), name)
            product = memory.multiply(active, self.linear(x, layer, "up_proj"))
            del active
        elif "gate_up_proj" in weights:
            joint = self.linear(x, layer, "gate_up_proj")
            gate, up = memory.split(joint, (joint.elements // 2,) * 2)
            product = memory.multiply(up, memory.activation(gate, name))
            del joint, gate, up
        else:
            product = memory.activation(self.linear(x, layer, "up_proj"), name)
        return self.linear(product, layer, "down_proj")

    def experts(self, x: Tensor, layer: int) -> Tensor:
        """Mixture of experts with grouped products: each token is copied once for each of its experts."""
        memory, shape, weights, tokens = self.memory, self.shape, self.layers[layer], self.settings.tokens
        copies = tokens * shape.experts_per_token
        h, i, width = shape.hidden_size, shape.intermediate_size, x.width
        logits = memory.matmul(x, weights["router"], tokens * shape.num_experts)
        scores = memory.op(tokens * shape.num_experts, 4, [memory.cast(logits, 4)], save_result=True)
        chosen = memory.op(copies, 4, [scores], [memory.new(copies, 8)])
        order = memory.new(copies, 8)
        selected = memory.op(copies * h, width, [x], [order], scratch=x.elements * width)
        if "experts_up" in self.adapters[layer]:  # peft makes both matrices once to register them, and again for use
            tape, memory.tape = memory.tape, None
            registered = [self.adapted(layer, name) for name in ("experts_down", "experts_up")]
            memory.tape = tape
            del registered
        up = self.adapted(layer, "experts_up")
        saves = [selected if up.source else None, up if selected.source else None]
        joint = memory.op(copies * 2 * i, width, [selected, up], saves)
        del selected
        gate, linear = memory.split(joint, (copies * i,) * 2)
        product = memory.multiply(memory.activation(gate, shape.activation), linear)
        del joint, gate, linear
        down = self.adapted(layer, "experts_down")
        saves = [product if down.source else None, down if product.source else None]
        result = memory.op(copies * h, width, [product, down], saves)
        del product
        weighted = memory.multiply(result, chosen)  # fp32, since the router's scores are
        del result
        sorted_back = memory.op(copies * h, 4, [weighted], [order], scratch=copies * h * 4)
        del weighted
        return memory.cast(memory.op(tokens * h, 4, [sorted_back]), width)

    def layer(self, x: Tensor, layer: int, mask: Tensor | None, rotary_width: float) -> Tensor:
        """One decoder layer: norm, attention, norm, feed-forward, with residual connections."""
        memory, shape, weights = self.memory, self.shape, self.layers[layer]
        self.attention_weights = None
        normed = self.norm(x, weights, "input_norm")
        attended = memory.dropout(self.attention(normed, layer, mask, rotary_width), shape.residual_dropout)
        attention_weights, self.attention_weights = self.attention_weights, None  # noqa: F841 - alive to the end
        del normed
        if shape.norms_after:
            attended = self.norm(attended, weights, "attended_norm")
        if shape.parallel_residual:  # GPT-NeoX: both parts read the layer's input
            changed = memory.dropout(
                self.feed_forward(self.norm(x, weights, "post_norm"), layer), shape.residual_dropout
            )
            return memory.add_(memory.add_(changed, attended), x)
        residual = memory.add_(x, attended)
        del x
        if shape.family != "gpt2":  # whose variable for it lives to the end of the layer
            del attended
        changed = self.feed_forward(self.norm(residual, weights, "post_norm"), layer)
        if shape.norms_after:
            changed = self.norm(changed, weights, "fed_norm")
        return memory.add_(residual, memory.dropout(changed, shape.residual_dropout))

    def hidden_states(self) -> Tensor:
        """Embedding, all layers and the last norm."""
        memory, shape, settings = self.memory, self.shape, self.settings
        batch, seq, tokens = settings.batch_size, settings.seq_len, settings.tokens
        ids = memory.new(tokens, 8)
        table = self.outer["embed_tokens"]
        x = memory.op(tokens * shape.hidden_size, table.width, [table], [ids])
        if shape.family == "gemma":
            x = memory.scale(x)
        if settings.gradient_checkpointing and settings.method in ("lora", "qlora") and memory.tape is not None:
            x.source = Leaf(is_parameter=False)  # transformers lets it require a gradient, and so it stays to the end
            self.embedded = x
        embedded = x  # noqa: F841 - `inputs_embeds`, alive until the last layer is through
        if "positions" in self.outer:
            positions = self.outer["positions"]
            place = memory.op(seq * shape.hidden_size, positions.width, [positions])
            x = memory.op(x.elements, x.width, [x, place], kind="same")
        x = memory.dropout(x, shape.embedding_dropout)
        rotary_width, angles = x.width, None
        if shape.family != "gpt2":
            size = 2 * seq * int(shape.head_dim * shape.rotary_fraction)
            angles = memory.new(self.rotations * size, rotary_width)  # noqa: F841
        kinds = {shape.slides(layer) for layer in range(shape.num_layers)}
        masks: dict[bool, Tensor | None] = {}  # one for layers with a window, one for those without
        for slides in (False, True) if shape.norms_after else sorted(kinds):
            masks[slides] = None
            if settings.attention == "eager":
                masks[slides] = memory.new(batch * seq * seq, x.width)  # 0 and -inf
            elif settings.padded or (slides and shape.sliding_window < seq):
                masks[slides] = memory.new(batch * seq * seq, 1)
        for layer in range(shape.num_layers):
            mask = masks[shape.slides(layer)]
            if not (settings.gradient_checkpointing and memory.tape is not None):
                x = self.layer(x, layer, mask, rotary_width)
                continue
            checkpoint = Checkpoint(lambda y, layer=layer, mask=mask: self.layer(y, layer, mask, rotary_width), x)
            tape, memory.tape = memory.tape, None
            result = self.layer(x, layer, mask, rotary_width)
            memory.tape = tape
            if x.source is not None or self.trained:
                result.source = checkpoint
                tape.append(checkpoint)
            x = result
            del result, checkpoint
        self.attention_weights = None
        return self.norm(x, self.outer, "norm")

    def loss(self) -> Tensor:
        """Cross-entropy of the next token: the logits, their fp32 copy and the log-probabilities."""
        memory, rows = self.memory, -(-self.settings.tokens // self.settings.loss_chunks)
        hidden = self.hidden_states()
        x, head = hidden, self.head
        if self.settings.autocast:
            x, head = memory.cast(x, 2), memory.cast_weight(head)
        memory.part = "logits"
        logits = memory.matmul(x, head, rows * self.shape.vocab_size)
        del x, head  # the 16-bit copies: autocast keeps that of a trained weight only, autograd what it needs
        high = memory.cast(logits, 4)
        log_probabilities = memory.op(high.elements, 4, [high], save_result=True)
        targets = memory.new(self.settings.tokens, 8)
        return memory.op(1, 4, [log_probabilities], [log_probabilities, targets])


def targeted(name: str, targets: str | tuple[str, ...]) -> bool:
    """Whether LoRA adapts this weight; "all-linear" is every matrix of the layers, as in peft, experts included."""
    if targets == "all-linear":
        return is_linear(name) or name in ("router", "experts_up", "experts_down")
    return name in targets


def quantised_size(size: tuple[int, ...], quantisation: str) -> int:
    """Bytes of a quantised matrix.

    nf4: bitsandbytes with double quantisation (Dettmers et al. 2023, section 3): half a byte for each weight, a byte
    for each block of 64 (its absolute maximum), an fp32 number for each 256 such blocks, two code books, an offset.
    int4: GPTQ and AWQ, half a byte, and a 16-bit scale and 4-bit zero for each group of 128. int8: LLM.int8, a byte
    and an fp32 scale for each row.
    """
    elements = math.prod(size)
    if quantisation == "int8":
        return elements + 4 * size[0]
    if quantisation == "int4":
        return math.ceil(elements * (0.5 + 2.5 / 128))
    blocks = -(-elements // 64)
    return -(-elements // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
