// GPU memory of a decoder-only model, as helpers/memory.py and helpers/memory_step.py compute it.
//
// Same names, same order of allocations. Python frees a tensor when the last reference to it is gone; here references
// are counted by hand: a function borrows its arguments, its result belongs to the caller, and `drop` ends a
// reference where Python's variable ends. site/calculator_cases.json holds the cases that check this file and the
// Python alike. Not here, and so not on the page: the CPU's attention with dropout, and LoRA on chosen matrices.
"use strict";

const PARTS = ["parameters", "gradients", "optimizer", "activations", "logits"];
const INFERENCE_PARTS = ["parameters", "kv_cache", "activations", "logits"];
const WEIGHT_BYTES = { fp32: 4, bf16: 2, fp16: 2, "bf16-mixed": 4, "fp16-mixed": 4 };
const CACHE_BITS = { fp32: 32, fp16: 16, bf16: 16, fp8: 8, int8: 8.5, int4: 4.5 };

const product = (numbers) => numbers.reduce((all, number) => all * number, 1);
const floorDivide = (a, b) => (a - (a % b)) / b;
const ceilDivide = (a, b) => floorDivide(a, b) + (a % b ? 1 : 0);
const isLinear = (name) => name.endsWith("_proj");
const targeted = (name) => isLinear(name) || ["router", "experts_up", "experts_down"].includes(name);

// The sizes of a model: ModelShape

function hasExperts(shape, layer) {
  return shape.num_experts > 0 && !shape.dense_layers.includes(layer);
}

function slides(shape, layer) {
  return shape.sliding_window !== null && !shape.full_layers.includes(layer);
}

function slidingLayers(shape) {
  return Array.from({ length: shape.num_layers }, (_, layer) => slides(shape, layer)).filter(Boolean).length;
}

function layerWeights(shape, layer) {
  const h = shape.hidden_size;
  const q = shape.num_heads * shape.head_dim;
  const kv = shape.num_kv_heads * shape.head_dim;
  const older = ["gpt2", "gpt_neox"].includes(shape.family);
  const weights = { input_norm: [h], post_norm: [h] };
  if (older) Object.assign(weights, { "input_norm.bias": [h], "post_norm.bias": [h] });
  if (older || shape.family === "phi3") {
    weights.qkv_proj = [q + 2 * kv, h];
    if (shape.qkv_bias) weights["qkv_proj.bias"] = [q + 2 * kv];
  } else {
    Object.assign(weights, { q_proj: [q, h], k_proj: [kv, h], v_proj: [kv, h] });
    if (shape.qkv_bias) Object.assign(weights, { "q_proj.bias": [q], "k_proj.bias": [kv], "v_proj.bias": [kv] });
  }
  weights.o_proj = [h, q];
  if (shape.output_bias) weights["o_proj.bias"] = [h];
  if (shape.qk_norm) Object.assign(weights, { q_norm: [shape.head_dim], k_norm: [shape.head_dim] });
  if (shape.norms_after) Object.assign(weights, { attended_norm: [h], fed_norm: [h] });
  if (hasExperts(shape, layer)) {
    const [i, experts] = [shape.intermediate_size, shape.num_experts];
    return Object.assign(weights, {
      router: [experts, h],
      experts_up: [experts, 2 * i, h],
      experts_down: [experts, h, i],
    });
  }
  const i = shape.num_experts ? shape.dense_intermediate_size : shape.intermediate_size;
  let names = { up_proj: [i, h], down_proj: [h, i] };
  if (shape.family === "phi3") names = { gate_up_proj: [2 * i, h], down_proj: [h, i] };
  else if (!older) names = { gate_proj: [i, h], ...names };
  if (shape.mlp_bias) for (const name of Object.keys(names)) names[`${name}.bias`] = [names[name][0]];
  return Object.assign(weights, names);
}

function outerWeights(shape) {
  const weights = { embed_tokens: [shape.vocab_size, shape.hidden_size], norm: [shape.hidden_size] };
  if (["gpt2", "gpt_neox"].includes(shape.family)) weights["norm.bias"] = [shape.hidden_size];
  if (shape.family === "gpt2") weights.positions = [shape.max_positions, shape.hidden_size];
  if (!shape.tied_embeddings) weights.lm_head = [shape.vocab_size, shape.hidden_size];
  return weights;
}

function numParameters(shape) {
  const count = (weights) => Object.values(weights).reduce((sum, size) => sum + product(size), 0);
  let total = count(outerWeights(shape));
  for (let layer = 0; layer < shape.num_layers; layer++) total += count(layerWeights(shape, layer));
  return total;
}

function quantisedSize(size, quantisation) {
  const elements = product(size);
  if (quantisation === "int8") return elements + 4 * size[0];
  if (quantisation === "int4") return Math.ceil(elements * (0.5 + 2.5 / 128));
  const blocks = ceilDivide(elements, 64);
  return ceilDivide(elements, 2) + blocks + 4 * ceilDivide(blocks, 256) + 4 * (16 + 256 + 1);
}

// Tensors without data, and autograd over them

class Storage {
  constructor(memory, size, part) {
    Object.assign(this, { memory, size, part, references: 1 });
    memory.add(part, size);
  }

  keep() {
    this.references += 1;
    return this;
  }

  drop() {
    this.references -= 1;
    if (this.references < 0) throw new Error("a storage was freed twice");
    if (!this.references) this.memory.take(this.part, this.size);
  }

  move(part, size) {
    this.memory.take(this.part, this.size);
    Object.assign(this, { part, size });
    this.memory.add(part, size);
  }
}

class Leaf {
  constructor(isParameter) {
    Object.assign(this, { isParameter, uses: 0, gradient: null });
  }
}

class Part {
  constructor(node) {
    this.node = node;
  }
}

class Tensor {
  // Takes over the reference to the storage.
  constructor(elements, width, storage, source = null) {
    Object.assign(this, { elements, width, storage, source, references: 1 });
    this.part = storage.part === "parameters" ? "activations" : storage.part;
  }

  withoutStorage() {
    const part = this.storage.part === "parameters" ? "activations" : this.storage.part;
    return { elements: this.elements, width: this.width, source: this.source, part };
  }
}

function keep(tensor) {
  if (tensor) tensor.references += 1;
  return tensor;
}

function drop(...tensors) {
  for (const tensor of tensors) {
    if (!tensor) continue;
    tensor.references -= 1;
    if (tensor.references < 0) throw new Error("a tensor was freed twice");
    if (!tensor.references) tensor.storage.drop();
  }
}

class Memory {
  constructor(settings) {
    this.settings = settings;
    this.live = Object.fromEntries([...PARTS, ...INFERENCE_PARTS].map((part) => [part, 0]));
    this.total = 0;
    this.highest = 0;
    this.peaks = {};
    this.phase = "forward";
    this.part = "activations";
    this.training = settings.method !== "frozen";
    this.tape = this.training ? [] : null;
    this.castWeights = new Map();
  }

  add(part, size) {
    this.live[part] += size;
    this.total += size;
    if (this.total > this.highest) {
      this.highest = this.total;
      this.peaks[this.phase] = { ...this.live };
    }
  }

  take(part, size) {
    this.live[part] -= size;
    this.total -= size;
  }

  enter(phase) {
    this.phase = phase;
    this.highest = 0;
    this.add("activations", 0);
  }

  create(elements, width, part = "") {
    return new Tensor(elements, width, new Storage(this, Math.trunc(elements * width), part || this.part));
  }

  op(elements, width, inputs, saves = [], { kind = "own", saveResult = false, scratch = 0, view = false } = {}) {
    inputs = inputs.filter(Boolean);
    const result = view ? new Tensor(elements, width, inputs[0].storage.keep()) : this.create(elements, width);
    const needing = inputs.filter((x) => x.source);
    if (this.tape && needing.length) {
      const saved = saves.filter(Boolean).map((x) => x.storage.keep());
      if (saveResult) saved.push(result.storage.keep());
      const edges = needing.map((x) => x.withoutStorage());
      result.source = { inputs: edges, kind, saved, scratch: Math.trunc(scratch) };
      this.tape.push(result.source);
      for (const x of needing) if (x.source instanceof Leaf) x.source.uses += 1;
    }
    return result;
  }

  backward(tape, gradients) {
    let gradient = null;
    while (tape.length) {
      const node = tape.pop();
      const arrived = gradients.get(node) ?? null;
      gradients.delete(node);
      drop(gradient); // that of a checkpoint lives until here
      gradient = arrived;
      if (!gradient) {
        for (const storage of node.saved.splice(0)) storage.drop();
        continue;
      }
      if (node instanceof Checkpoint) {
        node.backward(this, gradient, gradients);
        continue;
      }
      const scratch = new Storage(this, node.scratch, node.inputs[0].part);
      const made = node.inputs.map((x) => {
        if (node.kind === "own") return this.create(x.elements, x.width, x.part);
        if (node.kind === "same") return keep(gradient);
        return this.create(gradient.elements, gradient.width, gradient.part);
      });
      for (const storage of node.saved.splice(0)) storage.drop();
      drop(...(Array.isArray(gradient) ? gradient : [gradient]));
      gradient = null;
      scratch.drop();
      for (const x of node.inputs) {
        let raw = made.shift();
        if (raw.elements !== x.elements || raw.width !== x.width) {
          const fitted = this.create(x.elements, x.width, x.part);
          drop(raw);
          raw = fitted;
        }
        this.accumulate(x.source, raw, gradients);
        drop(raw);
      }
    }
    drop(gradient);
  }

  accumulate(source, gradient, gradients) {
    const another = () => this.create(gradient.elements, gradient.width, gradient.part);
    if (source instanceof Leaf) {
      source.uses -= 1;
      const sum = source.gradient ? another() : keep(gradient);
      drop(source.gradient);
      source.gradient = sum;
      if (source.isParameter && !source.uses) {
        sum.storage.move("gradients", ceilDivide(sum.storage.size, this.settings.gradient_shards));
      }
    } else if (source instanceof Part) {
      if (!gradients.has(source.node)) gradients.set(source.node, []);
      gradients.get(source.node).push(keep(gradient));
    } else if (gradients.has(source)) {
      const sum = another();
      drop(gradients.get(source));
      gradients.set(source, sum);
    } else {
      gradients.set(source, keep(gradient));
    }
  }

  forgetCastWeights() {
    drop(...this.castWeights.values());
    this.castWeights.clear();
  }

  // Operations

  cast(x, width) {
    return x.width === width ? keep(x) : this.op(x.elements, width, [x]);
  }

  split(x, sizes, scratch = 0) {
    const whole = this.op(x.elements, x.width, [x], [], { view: true, scratch });
    const source = whole.source && new Part(whole.source);
    const views = sizes.map((size) => new Tensor(size, x.width, x.storage.keep(), source));
    drop(whole);
    return views;
  }

  transpose(x) {
    return this.op(x.elements, x.width, [x], [], { view: true });
  }

  sum(x, y) {
    return this.op(x.elements, Math.max(x.width, y.width), [x, y], [], { kind: "same" });
  }

  scale(x, width = 0) {
    return this.op(x.elements, Math.max(width, x.width), [x], [], { kind: "full" });
  }

  multiply(x, y) {
    const saves = [y.source && x, x.source && y];
    return this.op(Math.max(x.elements, y.elements), Math.max(x.width, y.width), [x, y], saves, { kind: "full" });
  }

  power(x) {
    return this.op(x.elements, x.width, [x], [x], { scratch: 2 * x.elements * x.width });
  }

  dropout(x, probability) {
    if (!probability || !this.training) return keep(x);
    const mask = this.create(x.elements, 1);
    const result = this.op(x.elements, x.width, [x], [mask], { kind: "full" });
    drop(mask);
    return result;
  }

  matmul(x, weight, elements, bias = null) {
    const autocast = this.settings.autocast;
    x = autocast ? this.cast(x, 2) : keep(x);
    bias = autocast && bias ? this.castWeight(bias) : keep(bias);
    weight = autocast ? this.castWeight(weight) : keep(weight);
    const saves = [weight.source && x, x.source && weight];
    const result = this.op(elements, x.width, [x, weight, bias], saves);
    drop(x, weight, bias);
    return result;
  }

  castWeight(weight) {
    if (this.castWeights.has(weight)) return keep(this.castWeights.get(weight));
    const copy = this.cast(weight, 2);
    if (weight.source && copy !== weight) this.castWeights.set(weight, keep(copy));
    return copy;
  }

  rmsNorm(x, weight, gemma = false) {
    const rows = floorDivide(x.elements, weight.elements);
    const high = this.cast(x, 4);
    const squares = this.power(high);
    const variance = this.op(rows, 4, [squares]);
    drop(squares);
    const inverse = this.op(rows, 4, [variance], [], { saveResult: true });
    const normed = this.multiply(high, inverse);
    drop(high, variance, inverse);
    if (gemma) {
      const weight32 = this.cast(weight, 4);
      const factor = this.scale(weight32);
      drop(weight32);
      const scaled = this.multiply(normed, factor);
      drop(normed);
      const result = this.cast(scaled, x.width);
      drop(scaled, factor);
      return result;
    }
    const low = this.cast(normed, x.width);
    drop(normed);
    const result = this.multiply(weight, low);
    drop(low);
    return result;
  }

  layerNorm(x, weight, bias) {
    const statistics = this.create(floorDivide(2 * x.elements, weight.elements), x.width);
    const result = this.op(x.elements, x.width, [x, weight, bias], [x, statistics]);
    drop(statistics);
    return result;
  }

  activation(x, name) {
    if (name !== "gelu_new" && name !== "gelu_fast") return this.op(x.elements, x.width, [x], [x]);
    const half = this.scale(x);
    const cube = this.power(x);
    const scaled = this.scale(cube);
    drop(cube);
    const together = this.sum(x, scaled);
    drop(scaled);
    const inner = this.scale(together);
    drop(together);
    const tanh = this.op(x.elements, x.width, [inner], [], { saveResult: true });
    drop(inner);
    const shifted = this.op(x.elements, x.width, [tanh], [], { kind: "same" });
    drop(tanh);
    const result = this.multiply(half, shifted);
    drop(half, shifted);
    return result;
  }

  rotate(x, width) {
    const first = this.scale(x, width);
    const half = this.create(floorDivide(x.elements, 2), x.width);
    const turned = this.op(x.elements, x.width, [x], [], { scratch: x.elements * x.width });
    drop(half);
    const second = this.scale(turned, width);
    drop(turned);
    const result = this.sum(first, second);
    drop(first, second);
    return result;
  }
}

class Checkpoint {
  constructor(layer, x, mask) {
    Object.assign(this, { layer, mask: keep(mask), inputs: [x.withoutStorage()], saved: [x.storage.keep()] });
  }

  backward(memory, gradient, gradients) {
    const x = this.inputs[0];
    const outer = memory.tape;
    const start = x.source ? new Leaf(false) : null;
    memory.tape = [];
    const input = new Tensor(x.elements, x.width, this.saved.pop(), start);
    const result = this.layer(keep(input)); // the caller's frame holds the input until the layer is done
    drop(input);
    memory.forgetCastWeights();
    const inner = memory.tape;
    memory.tape = outer;
    const seed = new Map([[result.source, keep(gradient)]]);
    drop(result);
    memory.backward(inner, seed);
    drop(this.mask);
    if (start) {
      memory.accumulate(x.source, start.gradient, gradients);
      drop(start.gradient);
    }
  }
}

// The model, as transformers runs it

class Model {
  constructor(shape, memory) {
    Object.assign(this, { shape, memory, settings: memory.settings, trained: [], attentionWeights: null });
    const allocate = (sizes) =>
      Object.fromEntries(Object.entries(sizes).map(([name, size]) => [name, this.weight(name, size)]));
    this.outer = allocate(outerWeights(shape));
    this.sizes = Array.from({ length: shape.num_layers }, (_, layer) => layerWeights(shape, layer));
    this.layers = this.sizes.map(allocate);
    const frequencies = shape.family === "gpt2" ? 0 : 4 * Math.trunc(shape.head_dim * shape.rotary_fraction);
    this.buffers = new Storage(memory, this.rotations() * frequencies, "parameters");
    this.adapters = this.sizes.map((sizes) => {
      if (!["lora", "qlora"].includes(this.settings.method)) return {};
      const names = Object.keys(sizes).filter(targeted);
      return Object.fromEntries(names.map((name) => [name, this.adapter(name, sizes[name])]));
    });
  }

  get head() {
    return this.outer.lm_head ?? this.outer.embed_tokens;
  }

  rotations() {
    const sliding = slidingLayers(this.shape);
    return this.shape.norms_after && sliding > 0 && sliding < this.shape.num_layers ? 2 : 1;
  }

  shards() {
    return this.settings.zero_stage === 3 ? this.settings.num_gpus : 1;
  }

  weight(name, size) {
    const { precision, quantisation, method } = this.settings;
    const elements = product(size);
    const width = WEIGHT_BYTES[precision];
    const stored = quantisation && isLinear(name) ? quantisedSize(size, quantisation) : elements * width;
    if (method === "full") this.trained.push(size);
    const storage = new Storage(this.memory, ceilDivide(stored, this.shards()), "parameters");
    return new Tensor(elements, width, storage, method === "full" ? new Leaf(true) : null);
  }

  adapter(name, size) {
    const rank = this.settings.lora_rank * (size.length === 3 ? size[0] : 1) * (name === "experts_up" ? 2 : 1);
    const shapes = [[rank, size.at(-1)], [size.at(-2), rank]];
    return shapes.map((shape) => {
      this.trained.push(shape);
      const storage = new Storage(this.memory, ceilDivide(4 * product(shape), this.shards()), "parameters");
      return new Tensor(product(shape), 4, storage, new Leaf(true));
    });
  }

  linear(x, layer, name) {
    const { memory, settings } = this;
    const weight = this.layers[layer][name];
    const bias = this.layers[layer][`${name}.bias`] ?? null;
    const [outputs, inputs] = this.sizes[layer][name];
    const rows = floorDivide(x.elements, inputs);
    let low = null;
    let result;
    if (settings.quantisation) {
      low = memory.cast(x, settings.autocast ? 2 : x.width);
      const scratch = weight.elements * low.width;
      const computed = memory.op(rows * outputs, low.width, [low], [weight], { scratch });
      result = memory.cast(computed, x.width);
      drop(computed);
    } else {
      result = memory.matmul(x, weight, rows * outputs, bias);
    }
    if (!(name in this.adapters[layer])) {
      drop(low);
      return result;
    }
    const width = result.width;
    const qlora = settings.method === "qlora";
    const replace = (next) => {
      drop(result);
      result = next;
    };
    if (qlora) replace(memory.op(result.elements, width, [result], [], { kind: "same" }));
    const [down, up] = this.adapters[layer][name];
    x = qlora && settings.autocast ? keep(x) : memory.cast(x, 4);
    const inner = memory.matmul(x, down, rows * settings.lora_rank);
    const raw = memory.matmul(inner, up, rows * outputs);
    drop(inner);
    let change = memory.scale(raw);
    drop(raw);
    if (qlora && !settings.autocast) {
      const narrow = memory.cast(change, width);
      drop(change);
      change = narrow;
    }
    replace(memory.sum(result, change));
    if (!qlora) replace(memory.cast(result, width));
    drop(change, low, x);
    return result;
  }

  adapted(layer, name) {
    const { memory } = this;
    const weight = this.layers[layer][name];
    if (!(name in this.adapters[layer])) return keep(weight);
    const matrices = this.adapters[layer][name].map((matrix) => memory.cast(matrix, weight.width));
    const result = memory.op(weight.elements, weight.width, matrices, matrices);
    drop(...matrices);
    return result;
  }

  norm(x, weights, name) {
    const bias = weights[`${name}.bias`];
    if (bias) return this.memory.layerNorm(x, weights[name], bias);
    return this.memory.rmsNorm(x, weights[name], this.shape.family === "gemma");
  }

  attend(query, key, value, mask) {
    const { memory, shape, settings } = this;
    const groups = floorDivide(shape.num_heads, shape.num_kv_heads);
    const eager = settings.attention === "eager";
    let repeat = groups > 1 && (mask !== null || eager);
    query = keep(query);
    if (repeat) {
      const single = shape.num_kv_heads === 1;
      key = memory.op(groups * key.elements, key.width, [key], [], { view: single });
      value = memory.op(groups * value.elements, value.width, [value], [], { view: single });
      repeat = !single;
    } else {
      key = keep(key);
      value = keep(value);
    }
    if (eager) {
      const result = this.attendEagerly(query, key, value, mask, repeat);
      drop(query, key, value);
      return result;
    }
    if (settings.autocast) {
      const narrow = [query, key, value].map((x) => memory.cast(x, 2));
      drop(query, key, value);
      [query, key, value] = narrow;
    }
    const bias = mask && memory.create(mask.elements, query.width);
    const normaliser = memory.create(settings.batch_size * shape.num_heads * settings.seq_len, 4);
    const saves = [query, key, value, bias, normaliser];
    const result = memory.op(query.elements, query.width, [query, key, value], saves, { saveResult: true });
    drop(bias, normaliser, query, key, value);
    return result;
  }

  attendEagerly(query, key, value, mask, repeated) {
    const { memory, shape, settings } = this;
    const elements = settings.batch_size * shape.num_heads * settings.seq_len ** 2;
    const gpt2 = shape.family === "gpt2";
    const original = gpt2 ? value.width : query.width;
    const width = settings.autocast ? 2 : query.width;
    const joined = shape.family === "gpt_neox";
    const ready = (x, contiguous) => {
      const low = memory.cast(x, width);
      if (contiguous || settings.batch_size === 1) return low;
      const copy = memory.op(low.elements, width, [low]);
      drop(low);
      return copy;
    };
    const multiplied = (x, y, size) => {
      const result = memory.op(size, width, [x, y], [x, y]);
      drop(x, y);
      return result;
    };
    const raw = multiplied(ready(query, joined), ready(key, joined || repeated), elements);
    const scaled = memory.scale(raw);
    drop(raw);
    const scores = memory.op(elements, Math.max(width, mask.width), [scaled], [], { kind: "same" });
    drop(scaled);
    const high = gpt2 ? keep(scores) : memory.cast(scores, 4);
    const exact = memory.op(elements, high.width, [high], [], { saveResult: true });
    drop(high);
    if (gpt2) drop(scores);
    const cast = memory.cast(exact, original);
    drop(exact);
    if (!gpt2) drop(scores);
    const probabilities = memory.dropout(cast, shape.attention_dropout);
    drop(cast);
    this.attentionWeights = keep(probabilities);
    const result = multiplied(memory.cast(probabilities, width), ready(value, repeated), query.elements);
    const ordered = memory.op(query.elements, width, [result]);
    drop(result, probabilities);
    return ordered;
  }

  attention(x, layer, mask, rotaryWidth) {
    const { memory, shape } = this;
    const weights = this.layers[layer];
    const tokens = this.settings.tokens;
    const q = tokens * shape.num_heads * shape.head_dim;
    const kv = tokens * shape.num_kv_heads * shape.head_dim;
    let query, key, value;
    const replace = (change) => {
      const changed = [change(query, "q_norm"), change(key, "k_norm")];
      drop(query, key);
      [query, key] = changed;
    };
    if ("qkv_proj" in weights) {
      const joint = this.linear(x, layer, "qkv_proj");
      [query, key, value] = memory.split(joint, [q, kv, kv]);
      drop(joint);
    } else {
      [query, key, value] = ["q_proj", "k_proj", "v_proj"].map((name) => this.linear(x, layer, name));
      const gemma = shape.family === "gemma";
      const normHeads = () => shape.qk_norm && replace((states, name) => this.norm(states, weights, name));
      if (!gemma) normHeads();
      replace((states) => memory.transpose(states));
      if (gemma) normHeads();
    }
    if (shape.family !== "gpt2") replace((states) => this.rotary(states, rotaryWidth));
    const result = this.attend(query, key, value, mask);
    drop(query, key, value);
    const projected = this.linear(result, layer, "o_proj");
    drop(result);
    return projected;
  }

  rotary(x, width) {
    const { memory, shape } = this;
    if (!["gpt_neox", "phi3"].includes(shape.family)) return memory.rotate(x, width);
    const size = Math.trunc(x.elements * shape.rotary_fraction);
    const [part, rest] = memory.split(x, [size, x.elements - size], 2 * x.elements * x.width);
    const turned = memory.rotate(part, width);
    drop(part);
    const result = memory.op(x.elements, turned.width, [turned, rest]);
    drop(turned, rest);
    return result;
  }

  feedForward(x, layer) {
    const { memory } = this;
    const name = this.shape.activation;
    const weights = this.layers[layer];
    if ("router" in weights) return this.experts(x, layer);
    let joined;
    if ("gate_proj" in weights) {
      const gate = this.linear(x, layer, "gate_proj");
      const active = memory.activation(gate, name);
      drop(gate);
      const up = this.linear(x, layer, "up_proj");
      joined = memory.multiply(active, up);
      drop(up, active);
    } else if ("gate_up_proj" in weights) {
      const joint = this.linear(x, layer, "gate_up_proj");
      const half = floorDivide(joint.elements, 2);
      const [gate, up] = memory.split(joint, [half, half]);
      const active = memory.activation(gate, name);
      joined = memory.multiply(up, active);
      drop(active, joint, gate, up);
    } else {
      const up = this.linear(x, layer, "up_proj");
      joined = memory.activation(up, name);
      drop(up);
    }
    const result = this.linear(joined, layer, "down_proj");
    drop(joined);
    return result;
  }

  experts(x, layer) {
    const { memory, shape } = this;
    const weights = this.layers[layer];
    const tokens = this.settings.tokens;
    const copies = tokens * shape.experts_per_token;
    const [h, i, width] = [shape.hidden_size, shape.intermediate_size, x.width];
    const logits = memory.matmul(x, weights.router, tokens * shape.num_experts);
    const high = memory.cast(logits, 4);
    const scores = memory.op(tokens * shape.num_experts, 4, [high], [], { saveResult: true });
    drop(high);
    const indices = memory.create(copies, 8);
    const chosen = memory.op(copies, 4, [scores], [indices]);
    drop(indices);
    const order = memory.create(copies, 8);
    const selected = memory.op(copies * h, width, [x], [order], { scratch: x.elements * width });
    if ("experts_up" in this.adapters[layer]) {
      const tape = memory.tape;
      memory.tape = null;
      const registered = ["experts_down", "experts_up"].map((name) => this.adapted(layer, name));
      memory.tape = tape;
      drop(...registered);
    }
    const up = this.adapted(layer, "experts_up");
    const saves = [up.source && selected, selected.source && up];
    const joint = memory.op(copies * 2 * i, width, [selected, up], saves);
    const heldSelected = up.source ? keep(selected) : null; // Python's list of what is saved holds it too
    drop(selected);
    const [gate, linear] = memory.split(joint, [copies * i, copies * i]);
    const active = memory.activation(gate, shape.activation);
    const joined = memory.multiply(active, linear);
    drop(active, joint, gate, linear);
    const down = this.adapted(layer, "experts_down");
    const heldJoined = down.source ? keep(joined) : null;
    drop(heldSelected);
    const result = memory.op(copies * h, width, [joined, down], [heldJoined, joined.source && down]);
    drop(joined);
    const weighted = memory.multiply(result, chosen);
    drop(result);
    const sortedBack = memory.op(copies * h, 4, [weighted], [order], { scratch: copies * h * 4 });
    drop(weighted);
    const summed = memory.op(tokens * h, 4, [sortedBack]);
    const mixed = memory.cast(summed, width);
    drop(summed, sortedBack, heldJoined, down, up, order, chosen, scores, logits);
    return mixed;
  }

  // Takes over the reference to x.
  layer(x, layer, mask, rotaryWidth) {
    const { memory, shape } = this;
    const weights = this.layers[layer];
    const gpt2 = shape.family === "gpt2";
    const normed = this.norm(x, weights, "input_norm");
    const raw = this.attention(normed, layer, mask, rotaryWidth);
    let attended = memory.dropout(raw, shape.residual_dropout);
    drop(raw);
    const attentionWeights = this.attentionWeights; // alive to the end
    this.attentionWeights = null;
    drop(normed);
    if (shape.norms_after) {
      const given = attended;
      attended = this.norm(given, weights, "attended_norm");
      drop(given);
    }
    let result;
    if (shape.parallel_residual) {
      const second = this.norm(x, weights, "post_norm");
      const fed = this.feedForward(second, layer);
      drop(second);
      const changed = memory.dropout(fed, shape.residual_dropout);
      drop(fed);
      const both = memory.sum(changed, attended);
      result = memory.sum(both, x);
      drop(both, changed, attended, x);
    } else {
      const residual = memory.sum(x, attended);
      drop(x);
      if (!gpt2) drop(attended);
      const second = this.norm(residual, weights, "post_norm");
      let changed = this.feedForward(second, layer);
      drop(second);
      if (shape.norms_after) {
        const given = changed;
        changed = this.norm(given, weights, "fed_norm");
        drop(given);
      }
      const thinned = memory.dropout(changed, shape.residual_dropout);
      result = memory.sum(residual, thinned);
      drop(thinned, changed, residual);
      if (gpt2) drop(attended);
    }
    drop(attentionWeights);
    return result;
  }

  hiddenStates() {
    const { memory, shape, settings } = this;
    const { batch_size: batch, seq_len: seq, tokens } = settings;
    const ids = memory.create(tokens, 8);
    const table = this.outer.embed_tokens;
    let x = memory.op(tokens * shape.hidden_size, table.width, [table], [ids]);
    const replace = (next) => {
      drop(x);
      x = next;
    };
    if (shape.family === "gemma") replace(memory.scale(x));
    if (settings.gradient_checkpointing && ["lora", "qlora"].includes(settings.method) && memory.tape) {
      x.source = new Leaf(false);
      keep(x); // to the end of the step
    }
    const embedded = keep(x);
    let place = null;
    if ("positions" in this.outer) {
      const positions = this.outer.positions;
      place = memory.op(seq * shape.hidden_size, positions.width, [positions]);
      replace(memory.op(x.elements, x.width, [x, place], [], { kind: "same" }));
    }
    replace(memory.dropout(x, shape.embedding_dropout));
    const rotaryWidth = x.width;
    let angles = null;
    if (shape.family !== "gpt2") {
      const size = 2 * seq * Math.trunc(shape.head_dim * shape.rotary_fraction);
      angles = memory.create(this.rotations() * size, rotaryWidth);
    }
    const sliding = slidingLayers(shape);
    const masks = new Map(); // one for layers with a window, one for those without
    for (const windowed of [false, true]) {
      if (!shape.norms_after && !(windowed ? sliding : shape.num_layers - sliding)) continue;
      let made = null;
      if (settings.attention === "eager") made = memory.create(batch * seq * seq, x.width);
      else if (settings.padded || (windowed && shape.sliding_window < seq)) made = memory.create(batch * seq * seq, 1);
      masks.set(windowed, made);
    }
    for (let layer = 0; layer < shape.num_layers; layer++) {
      const mask = masks.get(slides(shape, layer));
      const run = (states) => this.layer(states, layer, mask, rotaryWidth);
      if (!(settings.gradient_checkpointing && memory.tape)) {
        replace(run(keep(x)));
        continue;
      }
      const checkpoint = new Checkpoint(run, x, mask);
      const tape = memory.tape;
      memory.tape = null;
      const result = run(keep(x));
      memory.tape = tape;
      result.source = checkpoint;
      tape.push(checkpoint);
      replace(result);
    }
    const normed = this.norm(x, this.outer, "norm");
    drop(x, embedded, ids, place, angles, ...masks.values());
    return normed;
  }

  loss() {
    const { memory, settings } = this;
    const rows = ceilDivide(settings.tokens, settings.loss_chunks);
    const hidden = this.hiddenStates();
    const x = settings.autocast ? memory.cast(hidden, 2) : keep(hidden);
    const head = settings.autocast ? memory.castWeight(this.head) : keep(this.head);
    memory.part = "logits";
    const logits = memory.matmul(x, head, rows * this.shape.vocab_size);
    drop(x, head);
    const high = memory.cast(logits, 4);
    const logProbabilities = memory.op(high.elements, 4, [high], [], { saveResult: true });
    const targets = memory.create(settings.tokens, 8);
    const loss = memory.op(1, 4, [logProbabilities], [logProbabilities, targets]);
    drop(hidden, logits, high, logProbabilities, targets);
    return loss;
  }
}

// Estimates

function complete(settings) {
  return {
    ...settings,
    autocast: settings.precision.endsWith("-mixed"),
    quantisation: settings.method === "qlora" ? "nf4" : settings.weights ?? null,
    gradient_shards: settings.zero_stage >= 2 ? settings.num_gpus : 1,
    tokens: settings.batch_size * settings.seq_len,
  };
}

function optimizerState(optimizer, sizes, width) {
  let [kept, paged] = [0, 0];
  for (const size of sizes) {
    const elements = product(size);
    if (optimizer === "adamw") {
      kept += 2 * elements * width + 4;
    } else if (optimizer === "adafactor") {
      const factored = floorDivide(elements, size.at(-1)) + floorDivide(elements, size.at(-2) ?? 1);
      kept += 4 + width * (size.length > 1 ? factored : elements);
    } else if (optimizer.endsWith("8bit")) {
      const state = elements < 4096 ? 8 * elements : 2 * elements + 8 * ceilDivide(elements, 256);
      if (optimizer.startsWith("paged") && elements >= 1e5) paged += state;
      else kept += state;
    }
  }
  return [kept, paged];
}

function summary(shape, phases, parts, host = 0) {
  const sum = (phase) => parts.reduce((total, part) => total + phases[phase][part], 0);
  const names = Object.keys(phases);
  const phase = names.reduce((best, name) => (sum(name) > sum(best) ? name : best));
  const chosen = Object.fromEntries(
    names.map((name) => [name, Object.fromEntries(parts.map((part) => [part, phases[name][part]]))]),
  );
  return { num_parameters: numParameters(shape), phase, parts: chosen[phase], total: sum(phase), host, phases: chosen };
}

const TRAINING_DEFAULTS = {
  method: "full",
  optimizer: "adamw",
  precision: "bf16",
  batch_size: 1,
  seq_len: 1024,
  gradient_checkpointing: false,
  attention: "sdpa",
  lora_rank: 16,
  zero_stage: 0,
  num_gpus: 1,
  padded: true,
  loss_chunks: 1,
};

function estimateTraining(shape, chosen) {
  const settings = complete({ ...TRAINING_DEFAULTS, ...chosen });
  const memory = new Memory(settings);
  const model = new Model(shape, memory);
  let gathered = null;
  if (settings.zero_stage === 3) {
    const bytes = (weights) => Object.values(weights).reduce((sum, w) => sum + w.elements * w.width, 0);
    const largest = Math.max(...model.layers.map(bytes));
    gathered = new Storage(memory, 2 * largest + bytes(model.outer), "parameters");
  }
  const adapters = ["lora", "qlora"].includes(settings.method);
  const width = adapters ? 4 : WEIGHT_BYTES[settings.precision];
  const [kept, paged] = optimizerState(settings.optimizer, model.trained, width);
  const shards = settings.zero_stage >= 1 ? settings.num_gpus : 1;
  new Storage(memory, ceilDivide(kept, shards), "optimizer");
  memory.peaks = {};
  memory.enter("forward");
  const loss = model.loss();
  memory.forgetCastWeights();
  memory.part = "activations";
  if (memory.tape) {
    memory.enter("backward");
    memory.backward(memory.tape, new Map([[loss.source, memory.create(1, 4)]]));
    if (gathered) gathered.drop();
    memory.enter("optimizer");
    if (settings.optimizer === "adafactor") {
      const largest = model.trained.reduce((most, size) => Math.max(most, product(size)), 0);
      new Storage(memory, floorDivide(largest * width, shards), "optimizer").drop();
    }
  }
  return summary(shape, memory.peaks, PARTS, ceilDivide(paged, shards));
}

const INFERENCE_DEFAULTS = {
  precision: "fp16",
  batch_size: 1,
  context_len: 2048,
  quantization: null,
  cache_precision: null,
  attention: "sdpa",
};

function estimateInference(shape, chosen) {
  const asked = { ...INFERENCE_DEFAULTS, ...chosen };
  const { precision, batch_size, context_len, quantization, attention } = asked;
  const bits = CACHE_BITS[asked.cache_precision || precision];
  const row = (2 * shape.num_kv_heads * shape.head_dim * batch_size * bits) / 8;
  const windowed = slidingLayers(shape);
  const sliding = windowed * Math.min(context_len, shape.sliding_window || context_len);
  const cache = Math.ceil(row * ((shape.num_layers - windowed) * context_len + sliding));
  const phases = {};
  for (const [phase, seq_len] of [["prefill", context_len], ["decode", 1]]) {
    const fixed = { method: "frozen", padded: false, weights: quantization };
    const settings = complete({ ...TRAINING_DEFAULTS, ...fixed, batch_size, seq_len, precision, attention });
    const memory = new Memory(settings);
    const model = new Model(shape, memory);
    new Storage(memory, cache, "kv_cache");
    memory.peaks = {};
    memory.enter(phase);
    if (phase === "decode") new Storage(memory, Math.trunc((row / 2) * context_len), "activations").drop();
    const x = model.hiddenStates();
    memory.part = "logits";
    const logits = memory.create(batch_size * shape.vocab_size, x.width);
    memory.cast(logits, 4);
    phases[phase] = memory.peaks[phase];
  }
  return summary(shape, phases, INFERENCE_PARTS);
}

if (typeof module !== "undefined") module.exports = { estimateTraining, estimateInference };
