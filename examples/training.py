"""Shared by the scripts that train the demo models: the loop, patch dropout and the final evaluation.

The models are ordinary Hugging Face classes and stay so. For most of the run every step sees only a random
part of the patches (patch dropout, a forward hook that lives in training only); the last epochs see all of
them. That makes training quick, and the models stay accurate when an edge compiler later merges tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

LABELS = {index: str(index) for index in range(10)}


class PatchDropout:
    """Forward hook for an embeddings module: while training, keep a random subset of the patch tokens.

    The first `special` tokens (class, distillation) always stay. Each call keeps a fraction of the patches
    drawn from `keep`. `importance(inputs)`, if given, returns one value per patch that is added to its random
    draw from [0, 1): patches with a higher value are kept more often. `kept` holds the indices of the patches that
    the last call kept, `(batch, count)`, or None where it kept them all.
    """

    def __init__(
        self, special: int, keep: tuple[float, float], importance: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.special, self.keep, self.importance = special, keep, importance
        self.active = True
        self.kept: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not (module.training and self.active):
            self.kept = None
            return output
        special, patches = output[:, : self.special], output[:, self.special :]
        low, high = self.keep
        count = round(patches.shape[1] * (low + (high - low) * torch.rand(()).item()))
        score = torch.rand(patches.shape[:2])
        if self.importance is not None:
            score = score + self.importance(args[0])
        self.kept = index = score.topk(count, dim=1).indices.sort(dim=1).values
        kept = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        return torch.cat((special, kept), dim=1)


def fit(
    model: PreTrainedModel,
    embeddings: nn.Module,
    dropout: PatchDropout,
    epoch_data: Callable[[int], tuple[Tensor, Tensor]],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    full_epochs: float,
) -> None:
    """Train with AdamW and a one-cycle schedule; the last part, `full_epochs`, runs without patch dropout.

    `epoch_data(epoch)` returns the freshly augmented inputs and the labels of one epoch.
    """
    inputs, labels = epoch_data(0)
    steps = -(-len(labels) // batch_size)
    decayed = [p for p in model.parameters() if p.ndim == 2 or p.ndim == 4]
    plain = [p for p in model.parameters() if not (p.ndim == 2 or p.ndim == 4)]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=epochs * steps, pct_start=0.15, cycle_momentum=False
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    hook = embeddings.register_forward_hook(dropout)
    model.train()
    for epoch in range(epochs):
        start, total, correct = time.perf_counter(), 0.0, 0
        dropout.active = epoch < round(epochs * (1 - full_epochs))
        if epoch:
            inputs, labels = epoch_data(epoch)
        for batch in torch.randperm(len(labels)).split(batch_size):
            logits = model(**{model.main_input_name: inputs[batch]}).logits
            loss = criterion(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
            correct += int((logits.argmax(-1) == labels[batch]).sum())
        print(
            f"epoch {epoch + 1:3d}/{epochs}  loss {total / len(labels):.4f}  "
            f"train accuracy {correct / len(labels):.4f}  {time.perf_counter() - start:.1f} s",
            flush=True,
        )
    hook.remove()
    model.eval()


def save_split(folder: Path, name: str, inputs: np.ndarray, labels: np.ndarray) -> None:
    """Write the model-ready test split next to the model."""
    arrays = {name: inputs.astype(np.float16), "labels": labels.astype(np.int64)}
    np.savez_compressed(folder / "split.npz", **arrays)


def accuracy(model_class: type[PreTrainedModel], folder: Path) -> float:
    """Test accuracy of the saved model on the saved split, both read back from `folder`, in fp32."""
    model = model_class.from_pretrained(folder)
    with np.load(folder / "split.npz", allow_pickle=False) as split:
        return accuracy_of(model, split[model.main_input_name].astype(np.float32), split["labels"])


@torch.inference_mode()
def accuracy_of(model: PreTrainedModel, inputs: np.ndarray, labels: np.ndarray) -> float:
    """The share of `inputs`, taken as the model's main input, that get their label."""
    model.eval()
    parts = torch.from_numpy(inputs).split(64)
    logits = torch.cat([model(**{model.main_input_name: part}).logits for part in parts])
    return (logits.argmax(-1) == torch.from_numpy(labels)).float().mean().item()
