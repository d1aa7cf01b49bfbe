"""Train the `demo:digits` model: a small Vision Transformer that reads handwritten digits.

Data: the test part of the UCI "Optical Recognition of Handwritten Digits" set (E. Alpaydin and C. Kaynak),
as shipped with scikit-learn: 1,797 images of 8x8 pixels with values 0 to 16. Licence: CC BY 4.0. Nothing is
downloaded.

Each image is scaled to 56x56 pixels (bilinear), which gives 14x14 patches. A stratified fifth of the images
is the test split. It takes no part in training and is saved with the model.

    python examples/train_digits.py --out edgewise/demos/digits
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional
from training import LABELS, PatchDropout, accuracy, fit, save_split
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

SPLIT_SEED = 0


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """All images as uint8 (N, 1, 8, 8) with the values 0 to 255, and their labels."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return images[:, None], digits.target.astype(np.int64)


def augment(images: Tensor) -> Tensor:
    """A random rotation, scaling, shear and shift for every image; the background value is -1."""
    count = len(images)
    angle, shear = torch.empty(2, count).uniform_(-0.25, 0.25)
    width, height = torch.empty(2, count).uniform_(0.85, 1.15)
    shift = torch.empty(count, 2).uniform_(-0.15, 0.15)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), 1)
    skew = torch.stack((torch.stack((width, shear), -1), torch.stack((torch.zeros(count), height), -1)), 1)
    theta = torch.cat((rotation @ skew, shift[:, :, None]), dim=2)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images + 1, grid, align_corners=False) - 1


def main() -> None:
    """Train, save the model with its test split, and print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its test split")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    processor = ViTImageProcessor(size={"height": 56, "width": 56}, image_mean=[0.5], image_std=[0.5])
    images, labels = load_images()
    pixels = processor(list(images), return_tensors="np", input_data_format="channels_first")["pixel_values"]
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, labels, test_size=0.2, stratify=labels, random_state=SPLIT_SEED
    )
    inputs, targets = torch.from_numpy(train_x), torch.from_numpy(train_y)

    config = ViTConfig(
        image_size=56,
        patch_size=4,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    model = ViTForImageClassification(config)
    fit(
        model,
        model.vit.embeddings,
        PatchDropout(special=1, keep=(0.25, 0.5)),
        lambda epoch: (augment(inputs), targets),
        epochs=args.epochs,
        batch_size=48,
        learning_rate=1e-3,
        full_epochs=0.15,
    )

    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    save_split(args.out, model.main_input_name, test_x, test_y)
    print(f"test accuracy {accuracy(ViTForImageClassification, args.out):.4f} on {len(test_y)} images")


if __name__ == "__main__":
    main()
