"""Programs for other platforms: lowering proves that no operation is missing there; an exported model serves alone."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_hmog import (
    AnalyticHMoG,
    DifferentiableHMoG,
    PseudoCounts,
    SymmetricHMoG,
    em_step,
    moments_to_natural,
    posterior_hard_assignment,
    warm_start,
)
from flax_hmog.em.initialize import random_moments
from flax_hmog.model.kinds import Diagonal, PositiveDefinite, Scale
from flax_hmog.networks.encoders import MLP, Clusterer
from flax_hmog.training import (
    Affine,
    CheckpointError,
    CheckpointWriter,
    Log1p,
    Preprocessing,
    export,
    load_program,
    restore,
    write_program,
)

D, L, K, N = 8, 2, 3, 40
PLATFORMS = ("cpu", "cuda", "tpu")
X = np.abs(np.random.default_rng(0).standard_normal((N, D))).astype(np.float32)
REPS = {"scale": Scale, "diagonal": Diagonal, "full": PositiveDefinite}


def model(obs_rep):
    moments = random_moments(jax.random.key(0), D, L, K, REPS[obs_rep])
    return moments_to_natural(moments), PseudoCounts().regularizer(moments)


@pytest.mark.parametrize("obs_rep", REPS)
def test_an_em_step_lowers_for_every_platform(obs_rep):
    natural, regularizer = model(obs_rep)
    step = jax.jit(lambda natural, x: jax.tree.leaves(em_step(natural, x, None, regularizer)))
    assert jax.export.export(step, platforms=PLATFORMS)(natural, X).platforms == PLATFORMS


@pytest.mark.parametrize(
    "head",
    [DifferentiableHMoG(L, K), SymmetricHMoG(L, K, obs_rep="full"), DifferentiableHMoG(L, K, pst_rep="full")],
    ids=["diagonal", "symmetric", "full"],
)
def test_a_gradient_step_lowers_for_every_platform(head):
    params, optimizer = warm_start(head, model(head.obs_rep)[0])[0]["params"], optax.adam(1e-3)

    @jax.jit
    def step(params, state, x):
        def loss(params):
            return -head.apply({"params": params}, x, method="mean_log_density")

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return jax.tree.leaves((optax.apply_updates(params, updates), state))

    assert jax.export.export(step, platforms=PLATFORMS)(params, optimizer.init(params), X).platforms == PLATFORMS


def test_assignments_lower_for_every_platform():
    natural, _ = model("diagonal")
    step = jax.jit(lambda natural, x: posterior_hard_assignment(natural, x))
    assert jax.export.export(step, platforms=PLATFORMS)(natural, X).platforms == PLATFORMS


def saved(folder, head, encoder=None, preprocessing=None, clusters=None):
    module = head if encoder is None else Clusterer(encoder, head)
    variables = nn.unbox(module.init(jax.random.key(0), X))
    with CheckpointWriter(folder, head=head, encoder=encoder, preprocessing=preprocessing) as writer:
        writer.save(1, variables, clusters=clusters)
    return restore(folder)


@pytest.mark.parametrize(
    ("head", "encoder", "preprocessing", "clusters"),
    [
        (DifferentiableHMoG(L, K), None, Preprocessing((Affine.constant(D, scale=2.0), Log1p()), D), None),
        (SymmetricHMoG(L, K, obs_rep="full"), None, None, None),
        (AnalyticHMoG(L, K), None, None, [0, 1, 0]),
        (DifferentiableHMoG(L, K), MLP(4, (8,)), Preprocessing((Log1p(),), D), None),
    ],
    ids=["preprocessed", "symmetric", "merged", "encoder"],
)
def test_an_exported_model_says_what_the_checkpoint_says(head, encoder, preprocessing, clusters, tmp_path):
    restored = saved(tmp_path, head, encoder, preprocessing, clusters)
    program = jax.export.deserialize(export(restored).serialize())
    assert program.platforms == PLATFORMS
    want = restored(X)
    assert want.log_responsibilities.shape[1] == (K if clusters is None else 2)
    for rows in (slice(0, 1), slice(0, 7), slice(None)):
        got = program.call(X[rows])
        assert set(got) == {"log_density", "responsibilities", "assignment", "latent_mean"}
        np.testing.assert_allclose(got["log_density"], want.log_density[rows], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got["responsibilities"], np.exp(want.log_responsibilities[rows]), atol=1e-4)
        np.testing.assert_allclose(got["latent_mean"], want.latent_mean[rows], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(got["assignment"], want.log_responsibilities[rows].argmax(-1))


def test_an_exported_model_needs_no_library_but_jax(tmp_path):
    restored = saved(tmp_path, DifferentiableHMoG(L, K))
    write_program(export(restored, platforms=("cpu",)), tmp_path / "model")
    np.save(tmp_path / "x.npy", X)
    serve = (
        "import hashlib, sys, jax, numpy as np; from pathlib import Path; folder = Path(sys.argv[1]);"
        "_, digest, body = (folder / 'model').read_bytes().split(b'\\n', 2);"
        "assert hashlib.sha256(body).hexdigest() == digest.decode();"
        "program = jax.export.deserialize(bytearray(body.split(b'\\n', 1)[1]));"
        "np.save(folder / 'got.npy', program.call(np.load(folder / 'x.npy'))['log_density']);"
        "assert not {'flax', 'flax_hmog', 'orbax'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", serve, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(np.load(tmp_path / "got.npy"), restored(X).log_density, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def program():
    return jax.export.export(jax.jit(lambda x: 2 * x + 1))(jax.ShapeDtypeStruct((3,), jnp.float32))


def test_a_program_comes_back_from_its_file(program, tmp_path):
    path = tmp_path / "program"
    for _ in range(2):  # a file that is there is replaced
        write_program(program, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["program"]
    loaded = load_program(path)
    assert loaded.platforms == program.platforms
    np.testing.assert_array_equal(loaded.call(np.float32([0, 1, 5])), [1, 3, 11])
    with pytest.raises(TypeError, match="`program` must be Exported"):
        write_program(program.serialize(), path)
    with pytest.raises(
        CheckpointError, match=r"write_program: `path` must be a file that can be written; got .*NotADir"
    ):
        write_program(program, path / "below")


def test_nothing_of_a_damaged_program_is_deserialised(program, tmp_path, monkeypatch):
    path = tmp_path / "program"
    write_program(program, path)
    whole, called = path.read_bytes(), []
    monkeypatch.setattr(jax.export, "deserialize", lambda *arguments: called.append(arguments))
    rng = np.random.default_rng(0)
    # every byte of the lines before the program, some of it
    for position in [*range(len(whole) - len(program.serialize())), *rng.integers(len(whole), size=200)]:
        bit = 1 << int(rng.integers(8))
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match=f"load_program: `path` must be .*; got {path} with"):
            load_program(path)
    for content in (b"", whole[:-1], whole + b"\n", program.serialize()):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"got {path} with"):
            load_program(path)
    with pytest.raises(CheckpointError, match="nowhere, FileNotFoundError"):
        load_program(tmp_path / "nowhere")
    assert called == []
    path.write_bytes(whole)
    load_program(path)
    assert len(called) == 1


def test_a_program_of_another_jax_is_named(program, tmp_path, monkeypatch):
    path = tmp_path / "program"
    write_program(program, path)

    def refuse(_):
        raise ValueError("calling convention 99")

    monkeypatch.setattr(jax.export, "deserialize", refuse)
    with pytest.raises(
        CheckpointError, match=rf"calling convention 99\. It was written with .*{jax.__version__}.*again"
    ):
        load_program(path)


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"export: `model` must be Restored"):
        export(DifferentiableHMoG(L, K))
    restored = saved(tmp_path, DifferentiableHMoG(L, K), MLP(4, (8,)))
    with pytest.raises(ValueError, match="export: `obs_dim` must be given"):
        export(restored)
    assert export(restored, obs_dim=D).call(jnp.asarray(X))["assignment"].shape == (N,)
