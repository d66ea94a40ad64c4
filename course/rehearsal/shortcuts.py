"""Leaves out what a rehearsal has already done: steps that cannot hold more memory than one before them.

A training step whose batch is no larger than one that was computed in the same training holds no more; and of the
tokens that a model writes one by one, each holds what the one before it held and one more place in the cache.
"""

from functools import wraps

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from course.rehearsal.device import DeviceTensor
from helpers import training
from helpers.training import loop

COMPUTED = 2  # steps of each training that are always computed: the first makes the optimiser's state
EVERY = 16  # tokens between two that are computed in full


def install() -> None:
    """From now on training and decoding leave out repetitions."""
    loop.train = training.train = _train_without_repetitions(loop.train)
    PreTrainedModel.__call__ = _decode_without_repetitions(PreTrainedModel.__call__)


def _train_without_repetitions(train):
    @wraps(train)
    def shortened(model, batches, config, *, loss_fn=None, **settings):
        compute = loss_fn or loop.causal_lm_loss
        sizes: list[int] = []  # of the batches that were computed

        def loss(parallel_model, batch):
            size = max(tensor.numel() for tensor in batch.values() if isinstance(tensor, torch.Tensor))
            if config.accumulation_steps > 1 or sizes.count(max(sizes, default=0)) < COMPUTED or size > max(sizes):
                sizes.append(size)
                return compute(parallel_model, batch)
            trained = [parameter for parameter in parallel_model.parameters() if parameter.requires_grad]
            return min(trained, key=torch.Tensor.numel).float().mean()

        return train(model, batches, config, loss_fn=loss, **settings)

    return shortened


def _decode_without_repetitions(call):
    @wraps(call)
    def shortened(self, *arguments, **inputs):
        cache, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        if (
            isinstance(cache, DynamicCache)
            and isinstance(ids, DeviceTensor)
            and ids.shape[1:] == (1,)
            and not torch.is_grad_enabled()
            and not any(inputs.get(name) for name in ("output_hidden_states", "output_attentions", "labels"))
            and cache.get_seq_length() % EVERY
            and (head := self.get_output_embeddings()) is not None
        ):
            for layer in cache.layers:
                batch, heads, _, head_dim = layer.keys.shape
                new = layer.keys.new_empty(batch, heads, 1, head_dim)
                layer.update(new, new)
            logits = torch.empty(ids.shape[0], 1, head.weight.shape[0], dtype=layer.keys.dtype, device=ids.device)
            return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        return call(self, *arguments, **inputs)

    return shortened
