"""Train the `demo:motion` model: a small VideoMAE that says which shape moves, and where to.

Data: drawn by `edgewise.demos.clips`, endless for training; the test split has seeds of its own, so that no clip
of it takes part in training. Nothing is downloaded.

While it is trained, the model is told of every patch, beside the class of the clip, which shape lies under it and how
that moves; the head that learns it is not kept. Most steps see a part of the patches, ground left out first.

    python examples/train_motion.py --out edgewise/demos/motion
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from training import PatchDropout, accuracy_of
from transformers import VideoMAEConfig, VideoMAEForVideoClassification
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from edgewise.demos import clips
from edgewise.demos.drawing import SHAPES

PATCH, TUBELET = 8, 2
GRID = clips.SIZE // PATCH
STEPS = [(0, 0), *clips.DIRECTIONS.values()]


def patch_labels(paths: list[clips.Path]) -> np.ndarray:
    """What lies under every patch `(patches, 2)`: the shape, and how it moves; 0 is the ground."""
    middles = np.arange(GRID) * PATCH + PATCH / 2
    labels = np.zeros((clips.FRAMES // TUBELET, GRID, GRID, 2), np.int64)
    for path in paths:
        x, y = (centre.reshape(-1, TUBELET).mean(1) for centre in (path.x, path.y))
        across = np.abs(middles - x[:, None]) <= path.radius
        down = np.abs(middles - y[:, None]) <= path.radius
        on = down[:, :, None] & across[:, None, :]
        labels[on] = SHAPES.index(path.shape) + 1, STEPS.index(path.step) + 1
    return labels.reshape(-1, 2)


def draw(first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """New clips `(count, 8, 3, 48, 48)`, their classes, and the labels of their patches `(count, patches, 2)`."""
    frames, labels, paths = zip(*(clips.clip("train", first + i) for i in range(count)), strict=True)
    patches = np.stack([patch_labels(one) for one in paths])
    return torch.from_numpy(clips.normalise(np.stack(frames))), torch.tensor(labels), torch.from_numpy(patches)


def train(model: VideoMAEForVideoClassification, steps: int, batch: int) -> None:
    """AdamW and a one-cycle schedule; the last fifth of the steps sees all patches."""
    head = nn.Linear(model.config.hidden_size, len(SHAPES) + 1 + len(STEPS) + 1)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    patches: Tensor
    dropout = PatchDropout(special=0, keep=(0.25, 0.5), importance=lambda pixels: 0.6 * (patches[..., 0] > 0))
    hook = model.videomae.embeddings.register_forward_hook(dropout)
    model.train()
    begin, sums = time.perf_counter(), np.zeros(3)
    for step in range(1, steps + 1):
        dropout.active = step < 0.8 * steps
        pixels, labels, patches = draw(step * batch, batch)
        output = model(pixels, output_hidden_states=True)
        told = patches
        if dropout.kept is not None:
            told = patches.gather(1, dropout.kept[..., None].expand(-1, -1, 2))
        shape, movement = head(output.hidden_states[-1]).flatten(0, 1).split([len(SHAPES) + 1, len(STEPS) + 1], dim=-1)
        aside = functional.cross_entropy(shape, told[..., 0].flatten())
        aside = aside + functional.cross_entropy(movement, told[..., 1].flatten())
        loss = functional.cross_entropy(output.logits, labels, label_smoothing=0.05)
        optimizer.zero_grad()
        (loss + aside).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        sums += loss.item(), aside.item(), (output.logits.argmax(-1) == labels).float().mean().item()
        if step % 50 == 0:
            loss, aside, right = sums / 50
            print(
                f"step {step}/{steps}  loss {loss:.4f}  patches {aside:.4f}  train accuracy {right:.4f}  "
                f"{time.perf_counter() - begin:.0f} s",
                flush=True,
            )
            sums = np.zeros(3)
    hook.remove()
    model.eval()


def main() -> None:
    """Train, save the model, and print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    labels = dict(enumerate(clips.LABELS))
    config = VideoMAEConfig(
        image_size=clips.SIZE,
        patch_size=PATCH,
        num_frames=clips.FRAMES,
        tubelet_size=TUBELET,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        initializer_range=0.06,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    size = {"height": clips.SIZE, "width": clips.SIZE}
    processor = VideoMAEImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[clips.MEAN] * 3, image_std=[clips.STD] * 3
    )
    model = VideoMAEForVideoClassification(config)
    train(model, args.steps, args.batch)

    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    found = accuracy_of(VideoMAEForVideoClassification.from_pretrained(args.out), *clips.whole_test_split())
    print(f"test accuracy {found:.4f} on {clips.TEST} clips")


if __name__ == "__main__":
    main()
