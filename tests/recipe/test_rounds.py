"""Training with an encoder, small: rounds of EM and gradients, resumed, with encoders of our own and of users."""

import dataclasses
import functools
import math
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import redescribe
from small_runs import SMALL, read_metrics, run, without_times

from experiments.configs import EXPERIMENTS
from flax_hmog import AnalyticHMoG, fit_em
from flax_hmog.model.prepared import prepare
from flax_hmog.networks.encoders import ConvNet
from flax_hmog.recipe import EM, Augmentation, Gradient, Model, Rounds, Template, facts
from flax_hmog.recipe.encoders import init_encoder, make_encoder
from flax_hmog.recipe.gradient import Position
from flax_hmog.recipe.load import load
from flax_hmog.recipe.models import Extra, Teacher, Trainable
from flax_hmog.training import CheckpointError, processes, restore
from flax_hmog.training.describe import named_arrays


class Dropped(nn.Module):
    """An encoder of a user's own, with running averages and dropout, that wants to be told whether it is trained."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.1, deterministic=not train)(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.features)(x)


class Wide(nn.Module):
    """An encoder whose features are no vectors."""

    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(x)[:, None]


class Demanding(nn.Module):
    """An encoder that cannot be made of what an experiment knows."""

    features: int
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(x)


class Averaged(nn.Module):
    """Inputs normalised by running averages."""

    features: int
    momentum: float

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(self.features)(nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x))


WITH_ENCODER = dataclasses.replace(
    SMALL,
    encoder=Template("mlp", features=6),
    model=Model(lat_dim=3, n_components=8, n_clusters=4),
    rounds=Rounds(count=2, early_clusters=6, n_components=10, distil_epochs=1),
    gradient=Gradient(epochs=3, batch_size=256),
    augmentation=Augmentation(shift=1.0, rotation=10.0),
    heads=(Template("differentiable", lat_dim=3),),
    n_seeds=1,
)


def test_an_encoder_that_does_not_fit_is_named(tmp_path):
    """Before anything is fitted."""
    with pytest.raises(ValueError, match=r"to features \(B, F\); got features \(2, 1, 6\) for two inputs"):
        run(tmp_path / "run", WITH_ENCODER, encoder=Template(f"{__name__}:Wide", features=6))
    with pytest.raises(ValueError, match=r"Demanding must have a value for each of its arguments; .*'width'"):
        run(tmp_path / "run", WITH_ENCODER, encoder=Template(f"{__name__}:Demanding", features=6))
    rounds = Rounds(distil_epochs=1, reconstruction_weight=1.0)
    with pytest.raises(ValueError, match="must have a method `decode`"):
        run(tmp_path / "run", WITH_ENCODER, encoder=Template(f"{__name__}:Dropped", features=6), rounds=rounds)
    assert not (tmp_path / "run").exists()


def test_running_averages_of_an_untrained_encoder_are_those_of_the_rows():
    x = np.random.default_rng(0).normal(3.0, 2.0, (500, 64)).astype(np.float32)
    for momentum in (0.9, 0.99):
        encoder = Averaged(6, momentum)
        averages = init_encoder(encoder, jax.random.key(0), x)["batch_stats"]["BatchNorm_0"]
        np.testing.assert_allclose(averages["mean"], x.mean(axis=0), rtol=0.02)
        np.testing.assert_allclose(averages["var"], x.var(axis=0), rtol=0.02)


def test_clusters_of_rounds():
    """More in all rounds but the last, and not more than there are components."""
    config = dataclasses.replace(WITH_ENCODER, rounds=Rounds(3, early_clusters=20, n_components=12, distil_epochs=1))
    assert [config.round_clusters(number) for number in (0, 1, 2, 3)] == [4, 8, 12, 4]
    alone = dataclasses.replace(config, rounds=Rounds(2, distil_epochs=1))
    assert [alone.round_clusters(number) for number in (1, 2)] == [4, 4]


def test_few_steps_of_an_epoch_make_more_epochs():
    """Of rounds with an encoder, in proportion; what is resolved is what a run's configuration says."""
    config = dataclasses.replace(WITH_ENCODER, gradient=Gradient(20, least_steps=1000), rounds=Rounds())
    longer = config.with_least_steps(5)
    assert (longer.gradient.epochs, longer.rounds.distil_epochs, longer.rounds.mixed_epochs) == (200, 20, 10)
    as_it_is = dataclasses.replace(config, gradient=Gradient(20))
    assert longer.gradient.least_steps == 0
    assert config.with_least_steps(50) == as_it_is
    alone = dataclasses.replace(SMALL, gradient=Gradient(20, least_steps=1000))
    assert alone.with_least_steps(5) == dataclasses.replace(alone, gradient=Gradient(20))


def test_losses_with_other_terms_are_no_divergence():
    history = [{"epoch": n, "objective": value} for n, value in enumerate((None, -0.3, -0.1, -2.0, 1.5))]
    at = lambda done: Position(None, 0, None, 0.9, history[: done + 1])  # noqa: E731
    assert [at(done).best_loss((2, 3)) for done in range(5)] == [0.9, 0.3, math.inf, math.inf, -1.5]
    assert [at(done).best_loss((0, 0)) for done in range(5)] == [0.9, 0.3, 0.1, 0.1, -1.5]


def test_a_class_of_ours_by_import_path_is_given_what_it_has_fields_for():
    config = dataclasses.replace(
        WITH_ENCODER, encoder=Template("flax_hmog.encoders:ConvNet", features=6, normalization="layer")
    )
    assert make_encoder(config, 64, (8, 8)) == ConvNet(6, (8, 8), normalization="layer")


ONE_ROUND = Rounds(distil_epochs=1)
STEP = 5  # some step of training


@pytest.fixture(scope="module")
def loss_at():
    """Loss of an encoder with a head, and its gradient, after `passed` of the two phases; of a config with changes."""
    x = load(WITH_ENCODER.data, 0).train.read(slice(0, 64)) / np.float32(16)
    factors = prepare(fit_em(AnalyticHMoG(3, 8), x, jax.random.key(0), max_steps=2).natural)

    @functools.cache
    def of_config(**weights):
        config = dataclasses.replace(WITH_ENCODER, rounds=dataclasses.replace(ONE_ROUND, **weights))
        model = Trainable(config, "differentiable", 4, 64, (8, 8))
        variables = nn.unbox(jax.jit(model.module.init)(jax.random.key(1), x))
        loss = lambda params, extra: model.encoder_loss(variables | {"params": params}, x, extra)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True)), variables["params"]

    def run(passed, clusters=(0, 1, 2, 3) * 2, **weights):
        phases = np.array([STEP + (passed < 1), STEP + (passed < 2)], np.uint32)
        key_data = jax.random.key_data(jax.random.key(2))
        extra = Extra(
            None,
            np.float32(1),
            Teacher(None, factors, jnp.array(clusters)),
            phases,
            key_data,
            np.uint32(STEP),
            np.float32(0),
        )
        function, params = of_config(**weights)
        (loss, _), gradient = function(params, extra)
        return float(loss), gradient

    return run


def test_distillation_gives_way_to_information(loss_at):
    (first, _), (mixed, _), (last, _) = (loss_at(passed) for passed in (0, 1, 2))
    assert mixed == pytest.approx((first + last) / 2, rel=1e-5)  # the views are the same
    others = {"clusters": (1, 0, 0, 2, 3, 3, 1, 2)}
    assert abs(loss_at(0, **others)[0] - first) > 1e-2
    assert loss_at(2, **others)[0] == last
    assert loss_at(0, information_weight=2.0)[0] == first
    assert abs(loss_at(2, information_weight=2.0)[0] - last) > 1e-3


def test_an_encoder_does_not_see_the_likelihood(loss_at):
    _, gradient = loss_at(2, information_weight=0.0)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient["encoder"]))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient["head"]))
    _, informed = loss_at(2)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(informed["encoder"]))


OF_FEATURES = Rounds(start="features", n_components=10, distil_epochs=1)
RECONSTRUCTING = dataclasses.replace(
    ONE_ROUND, start="nothing", distil_epochs=0, reconstruction_weight=1.0, adversarial_radius="measured"
)


@pytest.mark.parametrize(
    "options",
    [
        # of another seed: with 0 the smallest of the clusters to learn, those of untrained features, has 9 of 360 rows
        pytest.param(
            {"encoder": Template(f"{__name__}:Dropped", features=6), "rounds": OF_FEATURES, "first_seed": 1}, id="own"
        ),
        pytest.param(
            {
                "encoder": Template("conv", features=6, normalization="layer"),
                "heads": (Template("symmetric", lat_dim=3),),
                "rounds": ONE_ROUND,
            },
            id="conv",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "encoder": Template("mlp", features=6, normalization="none"),
                "heads": (Template("analytic", lat_dim=3),),
                "rounds": ONE_ROUND,
            },
            id="analytic",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "encoder": Template("autoencoder", features=6),
                "rounds": RECONSTRUCTING,
                "augmentation": Augmentation(),
            },
            id="autoencoder",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_training_with_an_encoder_ends_in_a_model_of_raw_data(options, tmp_path):
    run(tmp_path, WITH_ENCODER, **options)
    config = dataclasses.replace(WITH_ENCODER, **options)
    head, last, seed = config.labels[0], config.rounds.count, config.first_seed
    restored = restore(tmp_path / f"checkpoints/seed{seed}/{head}-{last}", allow_import=True)
    test = load(config.data, seed).test
    output = restored(test.read(slice(None)))
    assert output.log_responsibilities.shape == (360, 4)
    linear = restore(tmp_path / f"checkpoints/seed{seed}/em")
    assert linear(test.read(slice(None))).log_responsibilities.shape == (360, 4)
    assert linear.head.n_components == 8
    records = read_metrics(tmp_path, stage=f"{head}-{last}")
    kept = restored.progress["kept"]
    assert float(output.log_density.mean()) == pytest.approx(kept["test_log_density"], rel=1e-4)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    used = np.bincount(np.argmax(output.log_responsibilities, axis=1), minlength=4)
    assert used.min() > 0  # no collapse
    if config.rounds.start != "features":  # clusters of untrained features are nothing to improve in fifteen steps
        assert kept["nmi"] > records[0]["nmi"] + 0.04


DIGITS = EXPERIMENTS["digits_encoder"]
TWO_ROUNDS = dataclasses.replace(
    DIGITS, rounds=dataclasses.replace(DIGITS.rounds, count=2, distil_epochs=5), gradient=Gradient(20, 128, 2e-3)
)


@pytest.mark.slow
def test_the_recipe_gains_on_the_linear_model(optimized, tmp_path):
    """On the digits, and without collapse: every cluster is in use, and the clusters agree better with the digits.

    One round: docs/images.md, whose agreement is held as well.
    """
    run(tmp_path, TWO_ROUNDS)
    (linear,) = [record for record in read_metrics(tmp_path, stage="em") if "nmi" in record]
    stage = f"{TWO_ROUNDS.labels[0]}-{TWO_ROUNDS.rounds.count}"
    assert read_metrics(tmp_path, stage=stage)[-1]["nmi"] > linear["nmi"] + 0.02
    restored = restore(tmp_path / "checkpoints/seed0" / stage)
    output = restored(load(TWO_ROUNDS.data, 0).test.read(slice(None)))
    assert np.bincount(np.argmax(output.log_responsibilities, axis=1), minlength=10).min() > 10


@pytest.fixture(scope="module")
def rounds_folder(tmp_path_factory):
    """An uninterrupted run of two rounds: five models of EM, then fifteen steps in each round."""
    path = tmp_path_factory.mktemp("rounds") / "whole"
    run(path, WITH_ENCODER, em=EM(max_steps=4, tolerance=1e-9))
    return path


CALLED = []


def leave_a_mark(**arguments):
    """What no checkpoint may bring a run to call."""
    CALLED.append(arguments)


@pytest.mark.slow
def test_a_run_calls_nothing_that_its_checkpoints_name(rounds_folder, tmp_path):
    """Finished, resumed in its last round, or reported on with leave to import: only encoders of the configuration."""
    shutil.copytree(rounds_folder, tmp_path / "run")
    config = dataclasses.replace(WITH_ENCODER, em=EM(max_steps=4, tolerance=1e-9))

    def mark(arguments):
        if "encoder" in arguments:
            arguments["encoder"]["class"] = f"{__name__}:leave_a_mark"

    for step in (tmp_path / "run" / "checkpoints" / "seed0").glob("differentiable-*/*"):
        redescribe(step, lambda description: mark(description["module"]["arguments"]))
    run(tmp_path / "run", config)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "seed0" / "differentiable-2")
    run(tmp_path / "run", config)
    got, want = (read_metrics(path, stage="differentiable-2") for path in (tmp_path / "run", rounds_folder))
    assert without_times(got) == without_times(want)
    with pytest.raises(ValueError, match="`module` must be imported to take raw data"):
        facts.collect(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"the module must be mlp or .*; got .*:leave_a_mark"):
        facts.collect(tmp_path / "run", allow_import=True)
    assert CALLED == []


@pytest.mark.slow
def test_interrupted_rounds_end_as_uninterrupted_ones(rounds_folder, tmp_path):
    """Before the second one; bit for bit, running averages and the clusters of the second round included."""
    config = dataclasses.replace(WITH_ENCODER, em=EM(max_steps=4, tolerance=1e-9))
    with pytest.raises(processes.Stopped):
        run(tmp_path, config, stop_at=20)
    run(tmp_path, config)
    assert without_times(read_metrics(tmp_path)) == without_times(read_metrics(rounds_folder))
    for name in ("differentiable-1", "differentiable-2-em", "differentiable-2"):
        got, want = (restore(path / "checkpoints" / "seed0" / name) for path in (tmp_path, rounds_folder))
        for tree in ("variables", "encoder_variables", "state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(got, tree), getattr(want, tree))


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [True, False])
def test_a_round_has_a_fresh_encoder_or_that_of_the_round_before(fresh, rounds_folder, tmp_path):
    folder = rounds_folder
    if not fresh:
        folder, rounds = tmp_path, dataclasses.replace(WITH_ENCODER.rounds, fresh=False)
        run(folder, WITH_ENCODER, em=EM(max_steps=4, tolerance=1e-9), rounds=rounds)
    before = restore(folder / "checkpoints/seed0/differentiable-1").encoder_variables
    clustered = restore(folder / "checkpoints/seed0/differentiable-2-em")
    jax.tree.map(np.testing.assert_array_equal, clustered.encoder_variables, before)  # whose features EM has seen
    start = {name: clustered.state[f"encoder/{name}"] for name in named_arrays(before)}
    same = [np.array_equal(start[name], leaf) for name, leaf in named_arrays(before).items()]
    assert all(same) != fresh


@pytest.mark.slow
def test_without_a_refit_a_round_merges_the_clusters_of_the_head_before(rounds_folder, tmp_path):
    em, rounds = EM(max_steps=4, tolerance=1e-9), dataclasses.replace(WITH_ENCODER.rounds, refit=False)
    run(tmp_path, WITH_ENCODER, em=em, rounds=rounds)
    before, after = (
        restore(tmp_path / f"checkpoints/seed0/{name}") for name in ("differentiable-1", "differentiable-2-em")
    )
    rows = load(WITH_ENCODER.data, 0).test.read(slice(None))
    whole = dataclasses.replace(after, clusters=None)(rows)  # six clusters of the round before, not yet merged to four
    want = before(rows).log_responsibilities
    np.testing.assert_allclose(np.exp(whole.log_responsibilities), np.exp(want), atol=1e-3)
    assert sorted(set(after.clusters)) == [0, 1, 2, 3]
    refitted = restore(rounds_folder / "checkpoints/seed0/differentiable-2-em")
    assert refitted.head.n_components == WITH_ENCODER.rounds.n_components


@pytest.mark.slow
def test_a_round_that_is_made_again_leaves_one_line(rounds_folder, tmp_path):
    """Killed between its line of metrics and its checkpoint."""
    shutil.copytree(rounds_folder, tmp_path / "run")
    for name in ("differentiable-2-em", "differentiable-2"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "seed0" / name)
    run(tmp_path / "run", WITH_ENCODER, em=EM(max_steps=4, tolerance=1e-9))
    assert len(read_metrics(tmp_path / "run", stage="differentiable-2-em")) == 1
