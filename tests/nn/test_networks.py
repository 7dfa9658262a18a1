from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tad_plugin.errors import ConfigError, InvalidInputError, UnknownNameError
from tad_plugin.nn.blocks import NetworkOptions
from tad_plugin.nn.networks import NETWORKS, convnet, make_network, reinitialise, seeded
from tests.checkouts import copy_parameters, import_upstream

# (name, image size) of the smallest images that each takes with its default norm.
SMALLEST = {"convnet": 8, "mlp": 1, "alexnet": 8, "vgg11": 32, "resnet18": 9, "resnet18ap": 16}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str = "convnet", seed: int = 0, **options):
    settings = {
        "in_channels": 3,
        "num_classes": 5,
        "image_size": 32,
        "width": 16,
        "generator": generator(seed),
    } | options
    return make_network(name, **settings)


def bits(network: nn.Module) -> torch.Tensor:
    return torch.cat([t.double().flatten() for t in network.state_dict().values()])


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("channels, size", [(1, 28), (3, 32), (1, 32), (3, (32, 48))])
def test_logits_and_features(name, channels, size):
    network = build(name, in_channels=channels, image_size=size)
    seen = []
    network.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, channels, height, width, generator=generator(1))
    logits, features = network(images), network.embed(images)
    assert logits.shape == (2, 5) and network.num_classes == 5
    assert features.shape == (2, network.feature_dim)
    assert torch.equal(seen[0], features)
    assert torch.equal(logits, network.classifier(features))
    assert features.std() > 0


def test_convnet_has_the_field_s_size_and_computes_its_definition():
    network = build(num_classes=10, width=128)
    assert sum(p.numel() for p in network.parameters()) == 320_010  # CIFAR-10 ConvNet-3 of the literature
    images = torch.randn(2, 3, 32, 32, generator=generator(1))
    p = list(network.parameters())
    x = images
    for block in range(3):
        weight, bias, gain, shift = p[4 * block : 4 * block + 4]
        x = F.instance_norm(F.conv2d(x, weight, bias, padding=1), weight=gain, bias=shift)
        x = F.avg_pool2d(F.relu(x), 2)
    assert torch.allclose(network.embed(images), x.flatten(1), atol=1e-5)
    assert torch.allclose(network(images), F.linear(x.flatten(1), p[-2], p[-1]), atol=1e-5)


def test_only_28_pixel_grey_images_are_padded():
    assert build(in_channels=1, image_size=28).feature_dim == 16 * 4 * 4
    assert build(in_channels=3, image_size=28).feature_dim == 16 * 3 * 3
    assert build(in_channels=1, image_size=8).feature_dim == 16


@pytest.mark.parametrize("norm", ["instance", "batch", "group", "layer", "none"])
@pytest.mark.parametrize("pooling, activation", [("avg", "relu"), ("max", "leaky"), ("none", "sigmoid")])
def test_convnet_options(norm, pooling, activation):
    network = build(image_size=8, norm=norm, pooling=pooling, activation=activation, depth=2)
    kinds = {"instance": nn.GroupNorm, "batch": nn.BatchNorm2d, "group": nn.GroupNorm, "layer": nn.LayerNorm}
    norms = [m for m in network.modules() if isinstance(m, tuple(set(kinds.values())))]
    assert len(norms) == (0 if norm == "none" else 2)
    assert all(isinstance(m, kinds[norm]) for m in norms)
    assert network.feature_dim == 16 * (64 if pooling == "none" else 4)
    assert network(torch.randn(2, 3, 8, 8, generator=generator())).shape == (2, 5)


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "resnet18", "resnet18ap"])
def test_batch_norm_replaces_the_default(name):
    kinds = {type(m) for m in build(name, norm="batch").modules()}
    assert nn.BatchNorm2d in kinds and nn.GroupNorm not in kinds
    default = {type(m) for m in build(name).modules()}
    assert (nn.GroupNorm in default) == (name != "alexnet") and nn.BatchNorm2d not in default


@pytest.mark.parametrize("name, size", SMALLEST.items())
def test_smallest_images(name, size):
    network = build(name, image_size=size)
    assert network.embed(torch.randn(2, 3, size, size, generator=generator())).std() > 0
    if size > 1:
        with pytest.raises(ConfigError, match=f"{name}.* {size - 1}x{size - 1}"):
            build(name, image_size=size - 1)


def test_too_deep_a_convnet_says_so():
    with pytest.raises(ConfigError, match="depth 4.* 8x8"):
        build(depth=4, image_size=8)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"norm": "instancenorm"}, "norm.*instancenorm"),
        ({"pooling": "mean"}, "pooling.*mean"),
        ({"activation": "gelu"}, "activation.*gelu"),
        ({"width": 0}, "width.* 0"),
        ({"depth": 0}, "depth.* 0"),
        ({"num_classes": 0}, "num_classes.* 0"),
        ({"image_size": (8, 0)}, "image_size.* 0"),
        ({"norm": "group", "width": 6}, "group.* 6"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ConfigError, match=words):
        build(**options)


def test_unknown_name_suggests_the_closest():
    with pytest.raises(UnknownNameError, match="'convnet'"):
        build("ConvNet")


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_same_generator_same_bits_and_the_global_one_is_untouched(name):
    before = torch.get_rng_state()
    first, second, other = build(name, 3), build(name, 3), build(name, 4)
    assert torch.equal(bits(first), bits(second))
    assert not torch.equal(bits(first), bits(other))
    reinitialise(first, generator(4))
    assert torch.equal(before, torch.get_rng_state())


def test_seeded_takes_one_draw_and_restores_after_an_error():
    before, mine, reference = torch.get_rng_state(), generator(7), generator(7)
    with pytest.raises(RuntimeError), seeded(mine):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(before, torch.get_rng_state())
    torch.randint(0, 2**63 - 1, (1,), generator=reference)
    assert torch.equal(mine.get_state(), reference.get_state())
    with seeded(generator(7)) as a, seeded(generator(7)) as b:
        assert a == b


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("norm", ["instance", "batch", "layer"])
def test_reinitialise_equals_a_new_network(name, norm):
    used, mine = build(name, 1, norm=norm), generator(2)
    used(torch.randn(4, 3, 32, 32, generator=generator())).sum().backward()
    with torch.no_grad():
        for parameter in used.parameters():
            parameter.add_(1.0)
    identities = [id(p) for p in used.parameters()]
    reinitialise(used, mine)
    assert torch.equal(bits(used), bits(build(name, 2, norm=norm)))
    assert [id(p) for p in used.parameters()] == identities
    assert all(p.grad is None for p in used.parameters())
    reinitialise(used, mine)  # the generator moved on
    assert not torch.equal(bits(used), bits(build(name, 2, norm=norm)))


@pytest.mark.parametrize("change", [lambda n: n.double(), lambda n: n.to(memory_format=torch.channels_last)])
def test_reinitialise_gives_the_same_numbers_in_other_types_and_layouts(change):
    used = change(build(seed=1, norm="batch"))
    reinitialise(used, generator(2))
    assert torch.equal(bits(used), bits(build(seed=2, norm="batch")))


def test_reinitialise_refuses_what_it_cannot_redraw():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gain = nn.Linear(2, 2), nn.Parameter(torch.ones(1))

    network = Scaled()
    before = bits(network)
    with pytest.raises(InvalidInputError, match="Scaled"):
        reinitialise(network, generator())
    assert torch.equal(before, bits(network))


UPSTREAM_CONVNET = [
    # channels, size, norm, pooling, activation, depth
    (3, 32, "instance", "avg", "relu", 3),
    (1, 28, "instance", "avg", "relu", 3),
    (3, 64, "instance", "avg", "relu", 4),
    (3, 32, "batch", "max", "leaky", 2),
    (3, 32, "layer", "none", "sigmoid", 1),
    (3, 32, "group", "avg", "relu", 3),
    (3, 32, "none", "avg", "relu", 3),
]


@pytest.mark.parametrize("codebase", ["dm", "mtt"])
@pytest.mark.parametrize("channels, size, norm, pooling, activation, depth", UPSTREAM_CONVNET)
def test_convnet_is_the_public_one(codebase, channels, size, norm, pooling, activation, depth):
    theirs_of = import_upstream(codebase, "networks.py").ConvNet
    named = {"leaky": "leakyrelu"}.get(activation, activation)
    norms, pools = (norm if norm == "none" else f"{norm}norm"), (pooling if pooling == "none" else f"{pooling}pooling")
    with seeded(generator(5)):
        theirs = theirs_of(channels, 7, 8, depth, named, norms, pools, (size, size))
    options = {"norm": norm, "pooling": pooling, "activation": activation, "depth": depth}
    ours = make_network(
        "convnet", in_channels=channels, num_classes=7, image_size=size, width=8, generator=generator(5), **options
    )
    assert torch.equal(bits(ours), bits(theirs))
    ours.load_state_dict(theirs.state_dict())  # by name as well
    images = torch.randn(3, channels, size, size, generator=generator(1))
    if pooling == "avg":  # adds in another order
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(
    "name, theirs_name, norm",
    [
        ("mlp", "MLP", None),
        ("alexnet", "AlexNet", None),
        ("alexnet", "AlexNetBN", "batch"),
        ("vgg11", "VGG11", None),
        ("vgg11", "VGG11BN", "batch"),
        ("resnet18", "ResNet18", None),
        ("resnet18", "ResNet18BN", "batch"),
        ("resnet18ap", "ResNet18_AP", None),
        ("resnet18ap", "ResNet18BN_AP", "batch"),
    ],
)
@pytest.mark.parametrize("channels, size", [(3, 32), (1, 28)])
def test_other_networks_are_the_public_ones(name, theirs_name, norm, channels, size):
    theirs_of = getattr(import_upstream("dm", "networks.py"), theirs_name)
    with seeded(generator(5)):
        theirs = theirs_of(channels, 7)
    ours = build(name, in_channels=channels, num_classes=7, image_size=size, width=128, norm=norm, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    reinitialise(ours, generator(6))
    copy_parameters(theirs, ours)
    images = torch.randn(2, channels, size, size, generator=generator(1))
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


def test_a_builder_can_be_called_by_itself():
    with seeded(generator()):
        network = convnet(NetworkOptions(in_channels=3, num_classes=5, image_size=(32, 32), width=16))
    assert torch.equal(bits(network), bits(build()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_gpu_gets_the_same_bits(name):
    before = torch.cuda.get_rng_state()
    there = build(name, 3, norm="batch", device="cuda")
    assert torch.equal(bits(there).cpu(), bits(build(name, 3, norm="batch")))
    reinitialise(there, generator(4))
    assert torch.equal(bits(there).cpu(), bits(build(name, 4, norm="batch")))
    assert torch.equal(before, torch.cuda.get_rng_state())
