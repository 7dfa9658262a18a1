"""Class maps of asymmetric label noise: which class is mistaken for which.

CIFAR-10 and CIFAR-100 after Patrini et al. (CVPR 2017) [paper], digits [ours].
"""

from __future__ import annotations

from collections.abc import Sequence

from tad_plugin.errors import ConfigError, explain

__all__ = ["CIFAR10_CLASSES", "CIFAR100_SUPERCLASSES", "DIGITS_CLASSES", "asymmetric_map"]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS_CLASSES = tuple("0123456789")

# The fine classes of each of the 20 superclasses, as fine labels in ascending order.
CIFAR100_SUPERCLASSES = (
    (4, 30, 55, 72, 95),  # aquatic mammals
    (1, 32, 67, 73, 91),  # fish
    (54, 62, 70, 82, 92),  # flowers
    (9, 10, 16, 28, 61),  # food containers
    (0, 51, 53, 57, 83),  # fruit and vegetables
    (22, 39, 40, 86, 87),  # household electrical devices
    (5, 20, 25, 84, 94),  # household furniture
    (6, 7, 14, 18, 24),  # insects
    (3, 42, 43, 88, 97),  # large carnivores
    (12, 17, 37, 68, 76),  # large man-made outdoor things
    (23, 33, 49, 60, 71),  # large natural outdoor scenes
    (15, 19, 21, 31, 38),  # large omnivores and herbivores
    (34, 63, 64, 66, 75),  # medium-sized mammals
    (26, 45, 77, 79, 99),  # non-insect invertebrates
    (2, 11, 35, 46, 98),  # people
    (27, 29, 44, 78, 93),  # reptiles
    (36, 50, 65, 74, 80),  # small mammals
    (47, 52, 56, 59, 96),  # trees
    (8, 13, 48, 58, 90),  # vehicles 1
    (41, 69, 81, 85, 89),  # vehicles 2
)

# truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog
_CIFAR10 = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
_DIGITS = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}
_CIFAR100 = {c: group[(i + 1) % 5] for group in CIFAR100_SUPERCLASSES for i, c in enumerate(group)}

_MAPS = {"cifar10": (_CIFAR10, 10), "cifar100": (_CIFAR100, 100), "digits": (_DIGITS, 10)}


def asymmetric_map(dataset: str | None, num_classes: int, class_names: Sequence[str] | None = None) -> dict[int, int]:
    """The confusable class of each class of a known dataset. A class that is not a key never flips.

    CIFAR-10 as an image folder is recognised by its class names.

    Args:
        dataset: "cifar10", "cifar100", "digits", another name, or None.
        num_classes: number of classes K.
        class_names: names of the K classes in label order, or None.

    Raises:
        ConfigError: neither the name nor the class names have a map of K classes.
    """
    name = (dataset or "").lower()
    if class_names is not None and name not in _MAPS:
        lowered = tuple(n.lower() for n in class_names)
        name = "cifar10" if lowered == CIFAR10_CLASSES else name
    if name in _MAPS and _MAPS[name][1] == num_classes:
        return dict(_MAPS[name][0])
    raise ConfigError(
        explain(
            f"a dataset with a class map for asymmetric noise ({', '.join(sorted(_MAPS))})",
            f"{dataset!r} with {num_classes} classes",
            "Give a map of your own, as in 'asymmetric:0.4@map=7-1/2-7', or use pair or symmetric noise",
        )
    )
