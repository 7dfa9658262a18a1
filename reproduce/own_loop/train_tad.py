"""A user's own script: a Dataset with random crops, a DataLoader with two workers, CutMix. 40% of the labels are wrong.

python reproduce/own_loop/train.py prints the accuracy on the test images. train_tad.py is the same script with TAD.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import tad_plugin
from tad_plugin.data import NoiseSpec, load_dataset  # for the images and their wrong labels


class Images(Dataset):
    def __init__(self, images: Tensor, labels: Tensor, transform: nn.Module) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(self.images[i]), int(self.labels[i])


def main(
    seed: int = 0,
    epochs: int = 80,
    noise: str = "symmetric:0.4",
    leave_out: Sequence[int] = (),
    predict: Tensor | None = None,
) -> Any:
    """Test accuracy in percent; or class probabilities [M,10] of the images ``predict``, as an array."""
    splits = load_dataset("digits")
    labels = splits.apply_noise(NoiseSpec.parse(noise, seed=seed))[0].labels
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[list(leave_out)] = False

    torch.manual_seed(seed)
    train_set = Images(splits.train_images[kept], labels[kept], v2.RandomCrop(8, padding=1, fill=-1))
    train_set, hook = tad_plugin.attach_dataset("tad", train_set, scoring_transform=nn.Identity(), dataset="digits")
    loader = DataLoader(train_set, batch_size=64, shuffle=True, num_workers=2, persistent_workers=True)
    cutmix = v2.RandomApply([v2.CutMix(alpha=0.2, num_classes=10)], p=0.5)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, targets, idx in loader:
            images, targets = cutmix(images, targets)
            loss = hook.loss(model(images), targets, idx, partner=idx.roll(1, 0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        if predict is not None:
            return model(predict).softmax(1).numpy()
        return 100 * float((model(splits.test_images).argmax(1) == splits.test_labels).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains a network on digits with wrong labels.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=80)
    print(f"test accuracy {main(**vars(parser.parse_args())):.1f} %")
