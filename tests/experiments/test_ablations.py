"""The ablations of encoder experiments: what is compared, and the head by k-means that stands beside ours."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from experiments.benchmarks import ablations
from experiments.benchmarks.ablations import final_scores, spread, variants
from experiments.benchmarks.kmeans_head import KMeansHead
from experiments.configs import EXPERIMENTS
from flax_hmog import Head, warm_start
from flax_hmog.recipe import EM, Gradient, Model, Rounds, Template
from flax_hmog.recipe.facts import clusters_in_use, pair_agreement


def test_a_kmeans_head_is_a_mixture_of_equal_spheres():
    rng = np.random.default_rng(0)
    x, centres, variance = rng.standard_normal((6, 3)), rng.standard_normal((4, 3)), 0.7
    variables = {"params": {"centres": centres, "log_variance": np.log(variance)}}
    head = KMeansHead(2, 4, 3)
    output = head.apply(variables, x.astype(np.float32))
    joint = np.stack([multivariate_normal.logpdf(x, mean, variance) for mean in centres], axis=1) - np.log(4)
    np.testing.assert_allclose(output.log_density, logsumexp(joint, axis=1), rtol=1e-5)
    want = joint - logsumexp(joint, axis=1, keepdims=True)
    np.testing.assert_allclose(output.log_responsibilities, want, rtol=1e-4, atol=1e-5)
    nearest = np.argmin(((x[:, None] - centres) ** 2).sum(axis=-1), axis=1)
    np.testing.assert_array_equal(np.argmax(output.log_responsibilities, axis=1), nearest)
    assert isinstance(head, Head)
    assert head.init(jax.random.key(0), x)["params"]["centres"].shape == (4, 3)
    natural = head.clone(lat_dim=3).apply(variables, method="natural")
    started, info = warm_start(head.clone(lat_dim=3), natural)
    np.testing.assert_allclose(started["params"]["centres"], centres, atol=1e-4)
    np.testing.assert_allclose(info.log_likelihood_after, info.log_likelihood_before, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, config in EXPERIMENTS.items() if config.has_encoder])
def test_variants_differ_and_train_equally_long(name):
    config = EXPERIMENTS[name]
    found = [changed for _, changed in variants(config)]
    assert len({json.dumps(changed.result_options()) for changed in found}) == len(found)
    total = config.rounds.count * config.gradient.epochs
    for changed in found:
        if changed.has_encoder:
            assert changed.rounds.count * changed.gradient.epochs == total


@pytest.mark.slow
def test_a_ladder_ends_in_a_table(tmp_path, capsys, monkeypatch):
    """Its last step, with the k-means head: trained, and read the second time."""
    config = dataclasses.replace(
        EXPERIMENTS["digits_encoder"],
        workdir=str(tmp_path),
        encoder=Template("mlp", features=6),
        heads=(Template("differentiable", lat_dim=3),),
        model=Model(lat_dim=3, n_components=8, n_clusters=4),
        em=EM(max_steps=4),
        rounds=Rounds(distil_epochs=1),
        gradient=Gradient(epochs=6, batch_size=256),
        n_seeds=2,
    )
    last = [variant for variant in variants(config) if variant[0] in ("symmetric head", "k-means head")]
    monkeypatch.setattr(ablations, "variants", lambda config: iter(last))
    ablations.main("digits_encoder", config)
    first = capsys.readouterr().out
    ablations.main("digits_encoder", config)
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in first.splitlines() if line.startswith("│")}
    assert list(rows) == ["linear model, EM", "symmetric head", "k-means head"]
    agreement, in_use, objective, accuracy, _, by_seed = (cell.strip() for cell in rows["symmetric head"])
    assert 0 < float(agreement) < 1  # of a single pair of seeds
    assert all("±" in cell for cell in (in_use, objective, accuracy))
    assert 2 < float(in_use.split()[0]) <= 4
    kmeans = [float(value) for value in rows["k-means head"][-1].split()]
    assert len(kmeans) == len(by_seed.split()) == 2
    assert min(kmeans) > 0.2  # four clusters hold four of ten digits at most, .4, and a single one holds .1


def test_agreement_and_clusters_in_use():
    halves, collapsed = np.repeat([0, 1], 50), np.zeros(100, int)
    assert pair_agreement([halves, 1 - halves]) == [1]
    assert pair_agreement([collapsed, collapsed]) == [0]
    assert pair_agreement([halves, collapsed, halves]) == [0, 1, 0]
    np.testing.assert_allclose(clusters_in_use([halves, collapsed, np.arange(100)]), [2, 1, 100])


def test_final_scores_are_the_last_of_each_stage(tmp_path):
    lines = [
        {"seed": seed, "stage": stage, "accuracy": seed + epoch / 10, "nmi": 0.5}
        | ({} if stage == "em" else {"objective": epoch})
        for seed in (0, 1, 2)
        for stage in ("em", "symmetric-1")
        for epoch in (0, 1, 2)
    ]
    lines.insert(0, {"seed": 0, "stage": "em", "step": 1})  # a step of EM
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = final_scores(tmp_path, range(1, 3))
    assert scores == {
        "em": [{"accuracy": 1.2, "nmi": 0.5}, {"accuracy": 2.2, "nmi": 0.5}],
        "symmetric-1": [{"accuracy": seed + 0.2, "nmi": 0.5, "objective": 2} for seed in (1, 2)],
    }
    assert spread([0.5, 0.7]) == "0.600 ± 0.141"
    assert spread([np.nan, 1.0]) == ""
