# SPDX-License-Identifier: Apache-2.0
"""The transformers side of text_speed: eager PyTorch, sdpa attention, tuned by hand.

Nothing here knows of JAX: all it has of the package is the order of examples, in NumPy.
Tokens lie in memory, a batch is one gather, AdamW is fused, and no loss is read before
the epoch ends.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

from experiments.baselines.pytorch_mlp import DEVICE
from experiments.baselines.pytorch_mlp import make_loss as loss_of_logits
from jaxdistill.data import Batches

Batch = Mapping[str, torch.Tensor]


def network(config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> nn.Module:
    """The model that a configuration names, with these weights.

    Raises:
      ValueError: a weight without a place, or a place without a weight.
    """
    numbers = {k: v for k, v in config.items() if k != "model_type"}
    made = getattr(transformers, numbers.pop("architectures")[0])
    # Keys and values are kept where it generates alone.
    numbers |= {"attn_implementation": "sdpa", "use_cache": False}
    model = made(made.config_class(**numbers))
    tensors = {name: torch.tensor(array) for name, array in state.items()}
    missing, unknown = model.load_state_dict(tensors, strict=False)
    # The last matrix of a GPT is that of its embeddings.
    left = [name for name in missing if name != "lm_head.weight"] + unknown
    if left:
        raise ValueError(f"transformers and the weights differ in {left[0]!r}")
    return model.to(DEVICE)


def make_loss(temperature: float, hard: float, soft: float) -> Callable:
    """`(logits, batch) -> scalar`: `hard CE + soft T^2 KL` to the stored logits.

    Without a weight for them, the stored logits are not asked for.
    """

    both = loss_of_logits(temperature, hard, soft)

    def loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        classes = logits.shape[-1]
        logits, labels = logits.reshape(-1, classes), batch["labels"].reshape(-1)
        if soft:
            return both(logits, batch["logits"].reshape(-1, classes), labels)
        return hard * functional.cross_entropy(logits, labels)

    return loss


def place(examples: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Examples on the device; integers are long."""
    placed = {k: torch.tensor(v, device=DEVICE) for k, v in examples.items()}
    return {k: v if v.is_floating_point() else v.long() for k, v in placed.items()}


def adamw(model: nn.Module, learning_rate: float, decay: float):
    """AdamW as one kernel; every parameter decays."""
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=decay, fused=True
    )


def make_epoch(
    model: nn.Module, loss: Callable, optimizer, examples: Batch, batches: Batches
) -> Callable[[], float]:
    """A function that trains for an epoch; the mean of the batches' losses.

    A batch of texts of unlike length is padded to its longest; transformers then looks
    in each pass whether anything is masked.
    """
    model.train()
    done, length = 0, examples["input_ids"].shape[1]

    def epoch() -> float:
        nonlocal done
        stop = done + batches.steps_per_epoch
        order = torch.tensor(batches.indices(done, stop)["index"], device=DEVICE).long()
        done, total = stop, torch.zeros((), device=DEVICE)
        longest = [length] * len(order)
        if "attention_mask" in examples:
            longest = examples["attention_mask"].sum(1)[order].amax(1).tolist()
        for index, size in zip(order, longest, strict=True):
            batch = {name: x.index_select(0, index) for name, x in examples.items()}
            for name in ("input_ids", "attention_mask"):
                if name in batch:
                    batch[name] = batch[name][:, :size]
            total += step(model, loss, optimizer, batch)
        return total.item() / len(order)

    return epoch


def step(model: nn.Module, loss: Callable, optimizer, batch: Batch) -> torch.Tensor:
    """One optimizer step; the batch's loss."""
    value = gradient(model, loss, batch)
    optimizer.step()
    return value


def gradient(model: nn.Module, loss: Callable, batch: Batch) -> torch.Tensor:
    """Leaves the gradients in the parameters; the batch's loss."""
    model.zero_grad(set_to_none=True)
    value = loss(logits(model, batch), batch)
    value.backward()
    return value.detach()


def first_loss(model: nn.Module, loss: Callable, batch: Batch) -> float:
    """A batch's loss without dropout."""
    model.eval()
    with torch.no_grad():
        return float(loss(logits(model, batch), batch))


def logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A batch's logits; without a mask it is told of no padding."""
    mask = batch.get("attention_mask")
    return model(input_ids=batch["input_ids"], attention_mask=mask).logits


def make_stages(
    model: nn.Module, loss: Callable, optimizer, batch: Batch
) -> dict[str, Callable]:
    """What a step is made of, each stage with those before it."""

    def stage(training: bool, work: Callable, *given: Any):
        model.train(training)
        return work(model, loss, *given, batch)

    return {
        "forward": lambda: first_loss(model, loss, batch),
        "backward": lambda: stage(False, gradient),
        "dropout": lambda: stage(True, gradient),
        "AdamW": lambda: stage(True, step, optimizer).item(),
    }


def make_generate(model: nn.Module, prompt: np.ndarray, count: int) -> Callable:
    """A function that goes on by so many most likely tokens: `[B, L + count]`."""
    model.eval()
    drawn: Any = model
    drawn.generation_config.eos_token_id = None  # nothing ends early, or is forbidden
    ids = torch.tensor(prompt, device=DEVICE).long()
    config = transformers.GenerationConfig(
        max_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=0
    )

    def generate() -> np.ndarray:
        with torch.inference_mode():
            found = drawn.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
        return found.cpu().numpy()

    return generate
