"""The calls of the fuzzer: functions of the public API with valid arguments."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tad_plugin
from tad_plugin import Hook, SampleState, data, iwd, tad
from tad_plugin.distill.gradient_distance import mse_distance
from tad_plugin.evaluate import EvaluateConfig, accuracy, evaluate, train_on_synthetic
from tad_plugin.nn.derivatives.vectors import cross_entropy
from tests.fuzz_values import Arguments, D, Draw, K, N, Pairs

#: name -> a function of a Draw that gives (callable, valid arguments)
CALLS: dict[str, Callable[[Draw], tuple[Callable[..., Any], Arguments]]] = {}


def call(build: Callable[[Draw], tuple[Callable[..., Any], Arguments]]) -> Any:
    CALLS[build.__name__] = build
    return build


METHODS: list[tuple[str, Arguments]] = [
    ("none", {}), ("none", {}), ("random", {}), ("oracle", {}), ("iwd", {"iwd": {"every": 1}}),
    ("tad", {"tad": {"warmup": 1}, "scorer": {"epochs": 2, "width": 2, "batch_size": 12}}),
]  # fmt: skip


@call
def attach(d: Draw) -> tuple[Callable[..., Any], Arguments]:
    method, config = d.random.choice(METHODS)
    images: Any = d.images()
    images = d.random.choice(
        [images, images.numpy(), list(images), Pairs(images), None if method == "none" else images]
    )
    given = {"method": method, "labels": d.labels(), "data": images, "num_classes": K, "seed": 1, "config": config}
    more = {"true_labels": d.labels(), "dataset": "digits", "ipc": 1, "noise_rate": 0.1, "device": "cpu"}
    more |= {"noise": "symmetric:0.2", "trains_on_real": False}
    keep = ["true_labels", *d.random.sample(sorted(more), 3)]
    return tad_plugin.attach, given | {name: more[name] for name in keep}


class Weighs(tad_plugin.Callback):
    """A method that is on."""

    name = "weighs"
    needs_graph = True

    def on_start(self, *, state: SampleState, data: Any) -> None:
        state.update(trusted=torch.arange(len(state)) % 7 > 0)
        state.set_weights(self.name, torch.arange(1.0, len(state) + 1))


def _hook(d: Draw) -> Hook:
    made = tad_plugin.attach("none", labels=d.labels(), data=d.images(), num_classes=K)
    return Hook(made.state, made.data, [Weighs()]).start() if d.random.random() < 0.6 else made


@call
def hook_handles(d: Draw) -> tuple[Callable[..., Any], Arguments]:
    hook, i, net = _hook(d), d.indices(), d.network()
    images, labels = d.images()[i], d.labels()[i]
    logits = net(images)
    loss = cross_entropy(logits, labels).mean()
    gradient = [torch.zeros_like(p) for p in net.parameters()]
    handles: list[tuple[Callable[..., Any], Arguments]] = [
        (hook.sample, {"c": 1, "n": 3, "generator": d.generator}),
        (hook.pool, {"c": 1}),
        (hook.pools, {}),
        (hook.drawn, {"indices": i}),
        (hook.targets, {"indices": i}),
        (hook.weights, {"indices": i}),
        (hook.reweight, {"rows": d.normal(6, 2), "indices": i}),
        (hook.weighted_loss, {"loss": loss, "logits": logits, "labels": labels, "indices": i}),
        (
            hook.matched_gradient,
            {"gradient": gradient, "network": net, "images": images, "labels": labels, "indices": i},
        ),
        (hook.load_state_dict, {"state": hook.state_dict()}),
        (hook.save_state, {"path": Path(tempfile.gettempdir()) / "tad_plugin_fuzz.safetensors"}),
        (hook.loader, {"loader": DataLoader(TensorDataset(d.images(), d.labels()), batch_size=4)}),
        (hook.criterion, {"criterion": nn.CrossEntropyLoss()}),
        (hook.epoch_end, {"network": net}),
        (hook.dataset, {"dataset": TensorDataset(d.images(), d.labels())}),
        (hook.loss, {"logits": logits, "labels": labels, "indices": i, "partner": i.flip(0), "share": 0.5}),
        (hook.loss, {"logits": logits, "labels": torch.eye(K)[labels], "indices": i}),
        (hook.batch_sampler, {"batch_size": 4, "shuffle": True, "drop_last": False, "generator": d.generator}),
        (hook.class_sampler, {"per_class": 2, "classes": [1], "batches": 3, "generator": d.generator}),
        (hook.class_indices, {"c": 1}),
    ]
    return d.random.choice(handles)


@call
def hook_kept(d: Draw) -> tuple[Callable[..., Any], Arguments]:
    hook = _hook(d)
    hook.drawn(d.indices())
    return hook.kept, {"rows": torch.tensor([3, 1])}


@call
def hook_criterion(d: Draw) -> tuple[Callable[..., Any], Arguments]:
    hook, net = _hook(d), d.network()
    criterion: Any = hook.criterion(nn.CrossEntropyLoss(label_smoothing=d.random.choice([0.0, 0.1])))
    if not hook.enabled:
        return hook.targets, {"indices": d.indices()}  # the criterion is PyTorch's own
    passing = iter(hook.loader(DataLoader(TensorDataset(d.images(), d.labels()), batch_size=6)))
    x, y = next(passing)

    def forward(logits: Any, labels: Any) -> Any:
        return criterion(logits, labels), passing

    return forward, {"logits": net(x), "labels": y}


@call
def state(d: Draw) -> tuple[Callable[..., Any], Arguments]:
    return SampleState, {"labels": d.labels(), "num_classes": K, "device": "cpu", "allow_empty": False}


@call
def state_methods(d: Draw) -> tuple[Callable[..., Any], Arguments]:
    made = SampleState(d.labels(), K)
    made.set_weights("m", d.uniform(N))
    saved = made.state_dict()

    def load(**parts: Any) -> SampleState:
        made.load_state_dict(parts)
        return made

    def update(**parts: Any) -> SampleState:
        made.update(**parts)
        return made

    def set_weights(**parts: Any) -> SampleState:
        made.set_weights(**parts)
        return made

    methods: list[tuple[Callable[..., Any], Arguments]] = [
        (update, {"target": d.labels(), "trusted": d.flags(), "trust": d.uniform(N)}),
        (set_weights, {"factor": "n", "values": d.uniform(N) * 10 ** d.random.uniform(-40, 38)}),
        (load, saved),
        (made.register, {"name": "mine", "values": d.normal(N, 2)}),
        (made.pool, {"c": 0}),
        (made.sample, {"c": 0, "n": 2, "generator": d.generator}),
        (made.weights, {"indices": d.indices()}),
        (made.training_weights, {"indices": d.indices()}),
        (made.targets, {"indices": d.indices()}),
    ]
    return d.random.choice(methods)


def _features(d: Draw) -> Arguments:
    labels = d.labels()
    spread = d.normal(N, D) + 3.0 * torch.nn.functional.one_hot(labels, D).float()
    return {"features": spread, "targets": labels, "trusted": d.flags(), "num_classes": K}


def _mixture(d: Draw) -> tuple[Tensor, Any]:
    losses = d.uniform(N) + 3.0 * (d.uniform(N) < 0.4)
    return losses, tad.fit_class_mixture(losses, d.labels(), K)


@call
def tad_functions(d: Draw) -> tuple[Callable[..., Any], Arguments]:
    f, (losses, mixture), labels = _features(d), _mixture(d), d.labels()
    anchors = d.normal(K, D)
    cholesky = torch.linalg.cholesky(torch.eye(D).double() * 2)
    distance, cosine, predictions = d.uniform(N, K), d.uniform(N, K), d.normal(N, K)
    ensemble = tad.TemporalEnsemble(N, K)
    model = tad.fit_features(**f)
    probabilities = predictions.softmax(1)
    functions: list[tuple[Callable[..., Any], Arguments]] = [
        (tad.fit_class_mixture, {"losses": losses, "labels": labels, "num_classes": K, "iterations": 20}),
        (mixture.posterior, {"losses": losses, "labels": labels, "monotone": True}),
        (mixture.density, {"index": 0, "grid": d.uniform(5)}),
        (tad.divide, {"losses": losses, "labels": labels, "mixture": mixture, "num_classes": K, "threshold": 0.5}),
        (tad.class_anchors, f),
        (tad.fit_features, {**f, "max_dim": 2}),
        (model.measure, {"features": f["features"]}),
        (tad.ledoit_wolf, {"residuals": d.normal(N, D)}),
        (tad.mahalanobis, {"features": f["features"], "anchors": anchors, "cholesky": cholesky}),
        (tad.whitened_measures, {"features": f["features"], "anchors": anchors, "cholesky": cholesky}),
        (tad.cosine, {"features": f["features"], "anchors": anchors}),
        (tad.principal_axes, {"features": f["features"], "dimensions": 2}),
        (tad.propose, {"distance": distance, "cosine": cosine, "predictions": predictions}),
        (tad.reliability_score, {"distance": distance, "cosine": cosine, "proposal": labels, "temperature": 1.0}),
        (tad.fit_temperature, {"distance": distance, "targets": labels}),
        (tad.reliability, {**f, "predictions": predictions, "temperature": 1.0}),
        (tad.calibrate_threshold, {**f, "predictions": predictions, "generator": d.generator, "observed": labels}),
        (tad.TemporalEnsemble, {"num_samples": N, "num_classes": K, "beta": 0.5, "device": "cpu"}),
        (ensemble.update, {"indices": d.indices(), "probabilities": probabilities[:6]}),
        (ensemble.ensemble, {"indices": d.indices()}),
        (tad.consistency_loss, {"logits": predictions, "targets_probs": probabilities}),
        (tad.ramp_up, {"epoch": 1.0, "length": 3.0, "maximum": 2.0}),
    ]
    return d.random.choice(functions)


@call
def iwd_functions(d: Draw) -> tuple[Callable[..., Any], Arguments]:
    net, images, labels = d.network(), d.images(), d.labels()
    synthetic, own = d.images(6).requires_grad_(), d.labels(6)
    scores, weights = d.normal(N), d.uniform(N).requires_grad_()
    on = {"network": net, "images": images, "labels": labels}
    with_set = {"synthetic": synthetic, "synthetic_labels": own}
    of_class = {"scores": scores, "labels": labels, "num_classes": K, "mask": d.flags()}
    gradient = torch.randn_like(synthetic)
    size = sum(p.numel() for p in net.parameters())
    direction, matrix = d.normal(size), torch.eye(D) * 2
    running = iwd.RunningScore(N, decay=0.9)
    fold = iwd.cross_fit(labels, K, 2, generator=d.generator)[0]
    steps = [iwd.SegmentStep(direction, 0.1), iwd.SegmentStep(direction * 2, 0.1)]
    loss = (weights[:, None] * net.embed(images)).mean() * synthetic.square().sum()  # type: ignore[operator]
    functions: list[tuple[Callable[..., Any], Arguments]] = [
        (iwd.standardise, of_class),
        (iwd.saturate, {**of_class, "share": 0.1}),
        (iwd.fit_temperature, {**of_class, "ess": 0.5}),
        (iwd.softmax_weights, {**of_class, "temperature": torch.ones(K)}),
        (iwd.weights_from_scores, {**of_class, "ess": 0.5}),
        (iwd.effective_sample_size, {"weights": d.uniform(N), "labels": labels, "num_classes": K}),
        (iwd.RunningScore, {"num_samples": N, "decay": 0.5, "device": "cpu"}),
        (running.add, {"indices": d.indices(), "scores": d.normal(6)}),
        (running.restore, {"estimate": d.normal(N), "counts": torch.ones(N, dtype=torch.int64)}),
        (running.forget, {"mask": d.flags()}),
        (iwd.cross_fit, {"labels": labels, "num_classes": K, "folds": 2, "generator": d.generator, "mask": d.flags()}),
        (
            iwd.held_out_folds,
            {"targets": labels, "num_classes": K, "held_out": 0.3, "usable": d.flags(), "generator": d.generator},
        ),
        (iwd.explicit_influence, {"loss": loss, "weights": weights, "synthetic": synthetic,
                                  "target_gradient": gradient}),
        (iwd.embedding_directions, {"embed": net.embed, **with_set, "target_gradient": gradient, "num_classes": K}),
        (
            iwd.dm_influence,
            {
                "embed": net.embed, "images": images, "labels": labels, **with_set, "target_gradient": gradient,
                "num_classes": K, "weights": d.uniform(N), "eta": 1.0,
            },
        ),
        (
            iwd.gradient_influence,
            {**on, **with_set, "target_gradient": gradient, "num_classes": K, "distance": mse_distance},
        ),
        (iwd.class_mean_distance, {**on, **with_set, "num_classes": K}),
        (iwd.validation_target, {**on, **with_set, "alpha": 0.01, "steps": 1}),
        (iwd.validation_gradient, {**on, **with_set, "alpha": 0.01, "steps": 1}),
        (
            iwd.target_gradient,
            {
                "target": "validation", "networks": [net], **with_set, "images": images, "labels": labels,
                "num_classes": K, "alpha": 0.01,
            },
        ),
        (
            iwd.score_on_network,
            {"network": net, "images": images, "targets": labels, "fold": fold, **with_set, "num_classes": K},
        ),
        (iwd.per_sample_gradients, on),
        (iwd.per_sample_directional, {**on, "direction": direction}),
        (iwd.curvature_product, {**on, "kind": "hessian"}),
        (iwd.inverse_hessian_influence, {**on, "direction": direction, "damping": 1.0, "max_iterations": 5}),
        (iwd.unrolled_influence, {"network": net, "steps": steps, "images": images, "labels": labels,
                                  "direction": direction, "momentum": 0.0}),
        (iwd.conjugate_gradient, {"matvec": lambda v: matrix @ v, "b": d.normal(D), "tolerance": 1e-6,
                                  "max_iterations": 10}),
    ]  # fmt: skip
    return d.random.choice(functions)


def _set(d: Draw) -> data.SyntheticSet:
    return data.SyntheticSet(d.images(6), d.labels(6), K, data.Preprocessing((0.0,), (1.0,)))


@call
def data_functions(d: Draw) -> tuple[Callable[..., Any], Arguments]:
    plain, path = data.Preprocessing((0.5,), (0.2,)), Path(tempfile.gettempdir()) / "tad_plugin_fuzz_set.safetensors"
    spec = data.NoiseSpec(d.random.choice(["symmetric", "pair", "instance"]), 0.3, seed=1)
    functions: list[tuple[Callable[..., Any], Arguments]] = [
        (data.RealData, {"images": d.images(), "labels": d.labels(), "num_classes": K, "ipc": 1, "noise_rate": 0.1}),
        (
            data.SyntheticSet,
            {
                "images": d.images(6), "labels": d.labels(6), "num_classes": K, "preprocessing": plain,
                "learning_rate": 0.1, "dataset": "digits",
            },
        ),
        (_set(d).save, {"path": path}),
        (_set(d).to, {"device": "cpu"}),
        (data.Preprocessing, {"mean": (0.5,), "std": (0.2,)}),
        (plain, {"images": d.images()}) if callable(plain) else (plain.inverse, {"images": d.images()}),
        (plain.inverse, {"images": d.images()}),
        (plain.check_same, {"other": data.Preprocessing((0.5,), (0.2,))}),
        (data.NoiseSpec, {"kind": "symmetric", "rate": 0.3, "seed": 0, "spread": 0.1}),
        (data.NoiseSpec.parse, {"text": "symmetric:0.4@seed=3"}),
        (data.NoiseSpec.from_dict, {"values": spec.to_dict()}),
        (spec.apply, {"labels": d.labels(), "num_classes": K, "images": d.uniform(N, 1, D, D)}),
        (data.load_dataset, {"name": "digits", "per_class": 5, "holdout": 0.1, "seed": 0, "device": "cpu"}),
        (data.read_label_file, {"path": "nowhere.pt"}),
        (data.human_labels, {"path": "nowhere.pt", "key": "aggre", "true_labels": d.labels(), "num_classes": K}),
    ]  # fmt: skip
    return d.random.choice(functions)


@call
def evaluation(d: Draw) -> tuple[Callable[..., Any], Arguments]:
    config = EvaluateConfig(width=2, runs=1, epochs=1, batch_size=6)
    test = (d.images(), d.labels())
    functions: list[tuple[Callable[..., Any], Arguments]] = [
        (evaluate, {"synthetic": _set(d), "test": test, "config": config, "generator": d.generator, "network": "mlp"}),
        (evaluate, {"synthetic": _set(d), "test": test, "config": config, "generator": d.generator, "runs": 1}),
        (
            train_on_synthetic,
            {"network": d.network(), "synthetic": _set(d), "config": config, "generator": d.generator},
        ),
        (accuracy, {"network": d.network(), "images": test[0], "labels": test[1]}),
        (EvaluateConfig, {"width": 4, "runs": 1, "epochs": 1, "batch_size": 6, "lr": 0.1, "network": "mlp"}),
    ]
    return d.random.choice(functions)
