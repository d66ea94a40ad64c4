// The form of the calculator: reads it, asks memory.js, and writes the answer below it.
"use strict";

(() => {
  const form = document.getElementById("calculator-form");
  const output = document.getElementById("calculator-result");
  const rounding = { minimumFractionDigits: 2, maximumFractionDigits: 2, roundingMode: "halfEven", useGrouping: false };
  const gib = (bytes) => new Intl.NumberFormat("en-US", rounding).format(bytes / 2 ** 30);
  const SIZES = [
    "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
  ];
  const TEXT = {
    parameters: "parameters", gradients: "gradients", optimizer: "optimiser", activations: "activations",
    logits: "logits", kv_cache: "KV cache", forward: "forward", backward: "backward", prefill: "prefill",
    decode: "decode",
  };

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function fill(select, names, chosen) {
    for (const name of names) select.append(new Option(name, name, name === chosen, name === chosen));
  }

  function showSizes() {
    const shape = CALCULATOR.shapes[form.elements.model.value];
    for (const name of SIZES) form.elements[name].value = shape[name];
    form.elements.tied_embeddings.checked = shape.tied_embeddings;
  }

  function whole(input) {
    const value = Number(input.value);
    const name = input.closest("label").textContent.trim();
    if (!Number.isInteger(value) || value < 1) throw new RangeError(`${name}: enter a whole number of at least 1.`);
    return value;
  }

  function readShape() {
    const original = CALCULATOR.shapes[form.elements.model.value];
    const shape = { ...original, tied_embeddings: form.elements.tied_embeddings.checked };
    for (const name of SIZES) shape[name] = whole(form.elements[name]);
    if (shape.num_heads % shape.num_kv_heads) {
      throw new RangeError("Key and value heads: enter a divisor of the number of heads.");
    }
    const joint = ["gpt2", "gpt_neox"].includes(shape.family);
    if (joint && shape.num_heads !== shape.num_kv_heads) {
      throw new RangeError("Key and value heads: this family has as many as heads, enter the same number.");
    }
    if (shape.head_dim % 2 && shape.family !== "gpt2") {
      throw new RangeError("Size of a head: rotary embeddings turn pairs, enter an even number.");
    }
    return shape;
  }

  function readSettings(purpose) {
    const settings = {};
    for (const input of document.getElementById(`${purpose}-fields`).querySelectorAll("input, select")) {
      if (input.type === "checkbox") settings[input.name] = input.checked;
      else if (input.type === "number") settings[input.name] = whole(input);
      else settings[input.name] = input.name === "zero_stage" ? Number(input.value) : input.value || null;
    }
    return settings;
  }

  function estimate() {
    const purpose = form.elements.purpose.value;
    const shape = readShape();
    const settings = readSettings(purpose);
    const length = purpose === "training" ? settings.seq_len : settings.context_len;
    if (shape.family === "gpt2" && length > shape.max_positions) {
      throw new RangeError(`Tokens: this model has ${shape.max_positions} positions, enter at most that.`);
    }
    if (settings.zero_stage && settings.num_gpus === 1) {
      throw new RangeError("GPUs: with one there is nothing to divide, enter at least 2 or choose ZeRO stage 0.");
    }
    return purpose === "training" ? estimateTraining(shape, settings) : estimateInference(shape, settings);
  }

  function bar(result) {
    const strip = element("div", undefined, { class: "strip", "aria-hidden": "true" });
    for (const [part, bytes] of Object.entries(result.parts)) {
      strip.append(element("span", undefined, { class: `part-${part}`, style: `width:${(100 * bytes) / result.total}%` }));
    }
    return strip;
  }

  function table(result) {
    const phases = Object.keys(result.phases);
    const frame = element("div", undefined, { class: "pst-scrollable-table-container" });
    const made = element("table", undefined, { class: "table" });
    frame.append(made);
    made.append(element("caption", "GiB (2³⁰ bytes) on each GPU, at the peak of each phase"));
    const head = made.createTHead().insertRow();
    head.append(element("th", "part", { scope: "col" }));
    for (const phase of phases) {
      const name = phase === "optimizer" ? "update" : TEXT[phase];
      head.append(element("th", phase === result.phase ? `${name} (peak)` : name, { scope: "col" }));
    }
    const body = made.createTBody();
    const add = (name, label, value) => {
      const row = body.insertRow();
      const first = element("th", label, { scope: "row" });
      if (name !== "total") first.prepend(element("span", undefined, { class: `key part-${name}` }));
      row.append(first);
      for (const phase of phases) {
        row.append(element("td", gib(value(result.phases[phase])), { "data-bytes": value(result.phases[phase]) }));
      }
    };
    for (const part of Object.keys(result.parts)) add(part, TEXT[part], (parts) => parts[part]);
    add("total", "total", (parts) => Object.values(parts).reduce((sum, bytes) => sum + bytes, 0));
    return frame;
  }

  function update() {
    const purpose = form.elements.purpose.value;
    for (const name of ["training", "inference"]) {
      const fields = document.getElementById(`${name}-fields`);
      fields.hidden = fields.disabled = name !== purpose;
    }
    let result;
    try {
      result = estimate();
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      output.replaceChildren(element("p", error.message, { class: "verdict no", role: "alert" }));
      return;
    }
    const overhead = CALCULATOR.context + Math.trunc(CALCULATOR.fragmentation * result.total);
    const fits = (name) => result.total + overhead <= CALCULATOR.gpus[name];
    const gpu = form.elements.gpu.value;
    const verdict = `${gib(result.total + overhead)} GiB: it ${fits(gpu) ? "fits" : "does not fit"} in the ${gib(CALCULATOR.gpus[gpu])} GiB of a ${gpu}.`;
    const summary = `${(result.num_parameters / 1e9).toFixed(2)} B parameters. At the peak ${gib(result.total)} GiB, which are ${result.total.toLocaleString("en-US")} bytes, and about ${gib(overhead)} GiB of CUDA context and fragmentation.`;
    const others = Object.keys(CALCULATOR.gpus).filter(fits);
    const parts = [
      element("p", verdict, { class: `verdict ${fits(gpu) ? "yes" : "no"}` }),
      element("p", summary, { id: "calculator-total", "data-bytes": result.total }),
      bar(result),
      table(result),
    ];
    if (result.host) parts.push(element("p", `Paged optimiser state in main memory: ${gib(result.host)} GiB.`));
    parts.push(element("p", others.length ? `It fits: ${others.join(", ")}.` : "It fits none of the GPUs known here."));
    output.replaceChildren(...parts);
  }

  fill(form.elements.model, Object.keys(CALCULATOR.shapes), "Qwen/Qwen2.5-7B");
  fill(form.elements.gpu, Object.keys(CALCULATOR.gpus), "T4");
  showSizes();
  form.elements.model.addEventListener("change", showSizes);
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
})();
