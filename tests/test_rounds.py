"""Training with an encoder, small: rounds of EM and gradients, resumed, with encoders of our own and of users."""

import dataclasses
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from small_runs import SMALL, read_metrics, run, without_times

from experiments import processes
from experiments.config import EM, Augmentation, Encoder, Gradient, Model, Rounds
from experiments.configs import EXPERIMENTS
from experiments.data import load
from experiments.encoders import make_encoder
from flax_hmog.encoders import ConvNet
from flax_hmog.training import restore


class Dropped(nn.Module):
    """An encoder of a user's own, with running averages and dropout, that wants to be told whether it is trained."""

    features: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.1, deterministic=not train)(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.features)(x)


class Wide(nn.Module):
    """An encoder that does not give the features asked for."""

    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features + 1)(x)


WITH_ENCODER = dataclasses.replace(
    SMALL,
    encoder=Encoder("mlp", features=6, lat_dim=3),
    model=Model(lat_dim=3, n_components=8, n_clusters=4),
    rounds=Rounds(count=2, early_clusters=6, n_components=10, distil_epochs=1),
    gradient=Gradient(epochs=3, batch_size=256),
    augmentation=Augmentation(shift=1.0, rotation=10.0),
    heads=("differentiable",),
    n_seeds=1,
)


def test_an_encoder_of_other_features_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"to features \(B, 6\); got features \(1, 7\) for one input"):
        run(tmp_path, WITH_ENCODER, encoder=Encoder(f"{__name__}:Wide", 6, lat_dim=3))


def test_clusters_of_rounds():
    """More in all rounds but the last, and not more than there are components."""
    config = dataclasses.replace(WITH_ENCODER, rounds=Rounds(3, early_clusters=20, n_components=12, distil_epochs=1))
    assert [config.round_clusters(number) for number in (0, 1, 2, 3)] == [4, 8, 12, 4]
    alone = dataclasses.replace(config, rounds=Rounds(2, distil_epochs=1))
    assert [alone.round_clusters(number) for number in (1, 2)] == [4, 4]


def test_a_class_of_ours_by_import_path_is_given_what_it_has_fields_for():
    config = dataclasses.replace(WITH_ENCODER, encoder=Encoder("flax_hmog.encoders:ConvNet", 6, "layer", 3))
    assert make_encoder(config, 64, (8, 8)) == ConvNet(6, (8, 8), normalization="layer")


ONE_ROUND = Rounds(distil_epochs=1)
OF_FEATURES = Rounds(start="features", n_components=10, distil_epochs=1)
RECONSTRUCTING = dataclasses.replace(
    ONE_ROUND, start="nothing", distil_epochs=0, reconstruction_weight=1.0, adversarial_radius=0.1
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"encoder": Encoder(f"{__name__}:Dropped", 6, lat_dim=3), "rounds": OF_FEATURES}, id="own"),
        pytest.param(
            {"encoder": Encoder("conv", 6, "layer", 3), "heads": ("symmetric",), "rounds": ONE_ROUND},
            id="conv",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"encoder": Encoder("mlp", 6, "none", 3), "heads": ("analytic",), "rounds": ONE_ROUND},
            id="analytic",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "encoder": Encoder("autoencoder", 6, lat_dim=3),
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
    head, last = config.heads[0], config.rounds.count
    restored = restore(tmp_path / f"checkpoints/seed0/{head}-{last}", allow_import=True)
    test = load(config.data, 0).test
    output = restored(test.read(slice(None)))
    assert output.log_responsibilities.shape == (360, 4)
    records = read_metrics(tmp_path, stage=f"{head}-{last}")
    assert float(output.log_density.mean()) == pytest.approx(records[-1]["test_log_density"], rel=1e-4)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert records[-1]["nmi"] > 0.2  # no collapse: one cluster would have 0


@pytest.mark.slow
def test_the_recipe_gains_on_the_linear_model(tmp_path):
    """On the digits, and without collapse: every cluster is in use, and the clusters agree better with the digits."""
    run(tmp_path, EXPERIMENTS["digits_encoder"], gradient=Gradient(40, 128, 2e-3))
    (linear,) = [record for record in read_metrics(tmp_path, stage="em") if "nmi" in record]
    last = read_metrics(tmp_path, stage="differentiable-1")[-1]
    assert last["nmi"] > linear["nmi"] + 0.02
    restored = restore(tmp_path / "checkpoints/seed0/differentiable-1")
    output = restored(load(EXPERIMENTS["digits_encoder"].data, 0).test.read(slice(None)))
    assert np.bincount(np.argmax(output.log_responsibilities, axis=1), minlength=10).min() > 10


@pytest.fixture(scope="module")
def rounds_folder(tmp_path_factory):
    """An uninterrupted run of two rounds: five models of EM, then fifteen steps in each round."""
    path = tmp_path_factory.mktemp("rounds") / "whole"
    run(path, WITH_ENCODER, em=EM(max_steps=4, tolerance=1e-9))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("steps", [pytest.param(8, id="first round"), pytest.param(20, id="before the second round")])
def test_interrupted_rounds_end_as_uninterrupted_ones(steps, rounds_folder, tmp_path):
    """Bit for bit, running averages and the clusters of the second round included."""
    config = dataclasses.replace(WITH_ENCODER, em=EM(max_steps=4, tolerance=1e-9))
    with pytest.raises(processes.Stopped):
        run(tmp_path, config, stop_at=steps)
    run(tmp_path, config)
    assert without_times(read_metrics(tmp_path)) == without_times(read_metrics(rounds_folder))
    for name in ("differentiable-1", "differentiable-2-em", "differentiable-2"):
        got, want = (restore(path / "checkpoints" / "seed0" / name) for path in (tmp_path, rounds_folder))
        for tree in ("variables", "encoder_variables", "state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(got, tree), getattr(want, tree))


@pytest.mark.slow
def test_a_round_that_is_made_again_leaves_one_line(rounds_folder, tmp_path):
    """Killed between its line of metrics and its checkpoint."""
    shutil.copytree(rounds_folder, tmp_path / "run")
    for name in ("differentiable-2-em", "differentiable-2"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "seed0" / name)
    run(tmp_path / "run", WITH_ENCODER, em=EM(max_steps=4, tolerance=1e-9))
    assert len(read_metrics(tmp_path / "run", stage="differentiable-2-em")) == 1
