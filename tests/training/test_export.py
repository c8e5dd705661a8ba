"""Programs for other platforms: lowering proves that no operation is missing there; an exported model serves alone."""

import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from own_networks import init

from flax_hmog import (
    AnalyticHMoG,
    DifferentiableHMoG,
    PseudoCounts,
    SymmetricHMoG,
    em_step,
    infer,
    mean_log_density,
    moments_to_natural,
    posterior_at,
    posterior_hard_assignment,
    prepare,
    warm_start,
)
from flax_hmog import nnx as heads
from flax_hmog.em.initialize import random_moments
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import Diagonal, PositiveDefinite, Scale
from flax_hmog.networks.encoders import MLP, Clusterer, ConvNet
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
HOLDS_ARRAYS = pytest.mark.one_device(reason="the function holds arrays of the mesh, which a program has none of")


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
    variables = init(module, jax.random.key(0), X)
    with CheckpointWriter(folder, head=head, encoder=encoder, preprocessing=preprocessing) as writer:
        writer.save(1, variables, clusters=clusters)
    return restore(folder)


PLAIN = {
    "add", "and", "argmax", "broadcast_in_dim", "concatenate", "convert_element_type", "div", "dot_general", "eq", "exp",
    "gather", "integer_pow", "is_finite", "le", "log", "log1p", "lt", "max", "mul", "ne", "not", "or", "reduce_and",
    "reduce_max", "reduce_or", "reduce_sum", "reshape", "scan", "select_n", "slice", "squeeze", "stop_gradient", "sub",
    "transpose",
}  # fmt: skip


def is_plain(program):
    """Nothing is factorised when it runs, and nothing depends on the platform."""
    equations = jax.make_jaxpr(program.function)(program.rows).eqns
    assert {equation.primitive.name for equation in equations} <= PLAIN
    assert set(re.findall(r"custom_call @(\w+)", program.exported.mlir_module())) <= {"shape_assertion"}


def same(got, want):
    """A program's answers are those of an output."""
    assert set(got) == {"log_density", "responsibilities", "assignment", "latent_mean"}
    np.testing.assert_allclose(got["log_density"], want.log_density, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got["responsibilities"], np.exp(want.log_responsibilities), atol=1e-4)
    np.testing.assert_allclose(got["latent_mean"], want.latent_mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(got["assignment"], want.log_responsibilities.argmax(-1))


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
    program = export(restored)
    is_plain(program)
    write_program(program, tmp_path / "program")
    program = load_program(tmp_path / "program")
    assert program.exported.platforms == PLATFORMS
    want = restored(X)
    assert want.log_responsibilities.shape[1] == (K if clusters is None else 2)
    for rows in (slice(0, 1), slice(0, 7), slice(None)):
        same(program(X[rows]), jax.tree.map(lambda leaf, rows=rows: leaf[rows], want))


class Pictures(nn.Module):
    """An encoder that takes images (B, H, W, C) only."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Conv(4, (3, 3))(x)).reshape(x.shape[0], -1))


def test_a_model_of_images_takes_images(tmp_path):
    """Their number a symbol, as a restored model takes them: with an axis of channels or without, and flat."""
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 6, 1)).astype(np.uint8)
    preprocessing = Preprocessing((Affine.constant(36, scale=255.0),), 36, (6, 6))
    module = Clusterer(ConvNet(4, (6, 6), widths=(3,), hidden=8), DifferentiableHMoG(L, K))
    with CheckpointWriter(tmp_path / "flat", module, preprocessing=preprocessing) as writer:
        writer.save(1, init(module, jax.random.key(0), preprocessing(images)))
    restored = restore(tmp_path / "flat")
    write_program(export(restored, platforms=("cpu",)), tmp_path / "file")
    program = load_program(tmp_path / "file")
    assert str(program.rows.shape) == "(batch, 6, 6)"
    for given in (images, images[..., 0], images.reshape(7, 36), images[:1], images[:0]):
        same(program(given), restored(given))
    same(program.exported.call(np.float32(images[:5, ..., 0])), restored(images[:5]))  # without this library
    with pytest.raises(ValueError, match=r"shape \(B, 6, 6\) or \(B, 6, 6, 1\) or \(B, 36\); got \(7, 4, 9\)"):
        program(images.reshape(7, 4, 9))
    with pytest.raises(ValueError, match=r"`inputs` must be rows of the model's shape \(6, 6\) or .*; got \(4, 9\)"):
        export(restored, inputs=images.reshape(7, 4, 9))
    flat = export(restored, inputs=images.reshape(7, 36), platforms=("cpu",))  # as is said
    assert str(flat.rows.shape) == "(batch, 36)"
    same(flat(images), restored(images))

    module, images = Clusterer(Pictures(), DifferentiableHMoG(L, K)), images.astype(np.float32) / 255
    with CheckpointWriter(tmp_path / "own", module, inputs=images, describe=False) as writer:
        writer.save(1, init(module, jax.random.key(0), images))
    restored = restore(tmp_path / "own", module=module)
    program = export(restored, platforms=("cpu",))
    assert str(program.rows.shape) == "(batch, 6, 6, 1)"
    same(program(images), restored(images))


class Net(nnx.Module):
    """A network of one's own, which behaves otherwise in training."""

    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(D, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = heads.SymmetricHMoG(L, K, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(self.norm(self.dense(x))))


def linen():
    """A linen network that is none of ours, with an encoder that is rematerialised."""
    module = nn.Sequential([nn.remat(MLP)(4, (8,)), DifferentiableHMoG(L, K, pst_rep="full")])
    variables = init(module, jax.random.key(0), X)
    return (module, variables), module.apply(variables, X)


def native():
    module = Net(nnx.Rngs(0))
    module.train()
    evaluated = nnx.clone(module)
    evaluated.eval()
    return (module,), evaluated(X)


def native_head():
    head = heads.DifferentiableHMoG(L, K, D, rngs=nnx.Rngs(0))
    return (head,), head(X)


def in_a_frame():
    natural = model("scale")[0].in_frame(Frame.of(np.full(D, 1e5), np.ones(D), np.float32))
    return (natural,), infer(natural, X + 1e5)


@pytest.mark.parametrize("kind", [linen, native, native_head, in_a_frame])
def test_whatever_gives_a_heads_output_is_exported(kind):
    model, want = kind()
    program = export(*model, inputs=None if kind in (native_head, in_a_frame) else X)
    same(program(X + (1e5 if kind is in_a_frame else 0)), want)
    is_plain(program)
    if kind is native:
        assert not model[0].dropout.deterministic, "the module is as it was"


@pytest.fixture(scope="module")
def natural():
    return model("full")[0]


@HOLDS_ARRAYS
def test_functions_of_ours_are_exported(natural):
    def answers(x):
        return {"mean": mean_log_density(natural, x), "at": posterior_at(natural, x), "one": jnp.ones(K)}

    program = export(answers, inputs=X, platforms=("cpu",))
    got, want = program(X), answers(X)
    np.testing.assert_allclose(got["mean"], want["mean"], rtol=1e-5)
    np.testing.assert_allclose(got["at"]["location"], want["at"].location, rtol=1e-4, atol=1e-5)
    assert got["one"].shape == (K,)
    with pytest.raises(ValueError, match=r"export: `model` must take any number of rows; got Symbolic .* inconclusive"):
        export(lambda x: jax.lax.map(jnp.sum, x, batch_size=4), inputs=X)
    with pytest.raises(TypeError, match=r"export: `model` must return floats, or .*; got bool\. Return int32"):
        export(lambda x: x[:, 0] > 0, inputs=X)


def test_rows_of_any_dtype_and_number_are_answered(natural):
    program = export(natural, platforms=("cpu",))
    for dtype in ("uint8", "int32", "int64", "float16", "bfloat16", "float64", "bool"):
        given = (3 * X[:4]).astype(dtype)  # of one number of rows: all of them run what one compiled
        got = program(given)
        same(got, infer(natural, given.astype(np.float32)))
        assert {array.dtype for array in got.values()} == {np.dtype("float32"), np.dtype("int32")}
    same(program(X[:4].tolist()), infer(natural, X[:4]))
    same(jax.jit(program)(X[:4]), infer(natural, X[:4]))
    for count in (3, 5, 6, 8, 4100):  # filled up: one program for 4, one for 8, one for 4,096
        rows = np.resize(X, (count, D))
        same(program(rows), infer(natural, rows))
    assert program._compiled._cache_size() == 3
    shapes = jax.tree.map(lambda array: (array.shape, str(array.dtype)), program(X[:0]))
    assert shapes["responsibilities"] == ((0, K), "float32")
    assert shapes["assignment"] == ((0,), "int32")
    for rows, error, said in [
        (X[:, :3], ValueError, r"`rows` must have shape \(B, 8\); got \(40, 3\)"),
        (X[0], ValueError, r"`rows` must have shape \(B, 8\); got \(8,\)"),
        (1j * X, TypeError, "`rows` must hold real numbers; got dtype complex64"),
    ]:
        with pytest.raises(error, match=f"Program: {said}"):
            program(rows)


@HOLDS_ARRAYS
def test_whole_numbers_stay_whole_numbers():
    table = jax.random.normal(jax.random.key(0), (256, 2))
    program = export(lambda x: table[x].sum(axis=1), inputs=np.zeros((1, 3), np.uint8), platforms=("cpu",))
    np.testing.assert_allclose(program([[1, 2, 255]]), table[jnp.array([[1, 2, 255]])].sum(axis=1), rtol=1e-5)
    with pytest.raises(ValueError, match="`rows` must hold numbers within uint8; got -1 to 300"):
        program([[1, -1, 300]])
    with pytest.raises(TypeError, match="`rows` must hold whole numbers, uint8; got float32"):
        program(np.float32([[1, 2, 3]]))


def test_rows_that_are_not_finite_are_in_no_cluster(tmp_path):
    """Also those that a network swallows, or that are finite and too large; numbers of others stay as they are."""
    encoder = nn.Sequential([jnp.nan_to_num, nn.Dense(4)])
    module = Clusterer(encoder, DifferentiableHMoG(L, K))
    variables = init(module, jax.random.key(0), X)
    program = export(module, variables, inputs=X, platforms=("cpu",))
    rows = X[:7].copy()
    rows[1, 2], rows[2], rows[4, 0], rows[5] = np.nan, np.inf, -np.inf, 1e38
    wide = rows.astype(np.float64)
    wide[5] = 1e300
    for given in (rows, wide):
        got = jax.tree.map(np.asarray, program(given))
        assert (got["assignment"] == -1).tolist() == [False, True, True, False, True, True, False]
        for name in ("responsibilities", "latent_mean"):
            assert np.isnan(got[name].sum(axis=1)).tolist() == (got["assignment"] == -1).tolist()
    good = [0, 3, 6]
    same(jax.tree.map(lambda array: array[np.array(good)], got), module.apply(variables, X[np.array(good)]))


def test_missing_entries_are_taken_where_that_is_said(natural):
    rows = X[:5].copy()
    rows[1, 2], rows[3, 0] = np.nan, np.inf
    program = export(model("diagonal")[0], platforms=("cpu",), missing="nan")
    got = jax.tree.map(lambda array: np.asarray(array)[:3], program(rows))
    same(got, infer(model("diagonal")[0], rows[:3], missing="nan"))
    assert program(rows)["assignment"][3] == -1


def test_a_program_computes_in_its_own_precision(natural, tmp_path):
    """Made in a process of either precision, from a model of either, and used in one of either."""
    made = []
    with jax.enable_x64(True):
        double = prepare(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), natural))
        want = infer(double, X).log_density
        made.append((export(double, inputs=X, platforms=("cpu",)), np.float64, 1e-12))
        made.append((export(prepare(natural), inputs=X.astype(float), platforms=("cpu",)), np.float32, 1e-4))
    made.append((export(jax.tree.map(np.asarray, double), platforms=("cpu",)), np.float64, 1e-12))
    made.append((export(prepare(natural), platforms=("cpu",)), np.float32, 1e-4))
    for program, dtype, tolerance in made:
        write_program(program, tmp_path / "program")
        for x64 in (False, True):
            with jax.enable_x64(x64):
                got = load_program(tmp_path / "program")(X)["log_density"]
            assert got.dtype == dtype
            np.testing.assert_allclose(got, want, rtol=tolerance)


def test_a_program_needs_no_library_but_jax(natural, tmp_path):
    write_program(export(natural, platforms=("cpu",)), tmp_path / "model")
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
    np.testing.assert_allclose(np.load(tmp_path / "got.npy"), infer(natural, X).log_density, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def program():
    return export(lambda x: 2 * x + 1, inputs=X[:, :3], platforms=("cpu",))


def test_a_program_comes_back_from_its_file(program, tmp_path):
    path = tmp_path / "program"
    for _ in range(2):  # a file that is there is replaced
        write_program(program, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["program"]
    loaded = load_program(path)
    assert loaded.exported.platforms == ("cpu",)
    assert loaded.function is None
    np.testing.assert_array_equal(loaded([[0, 1, 5]]), [[1, 3, 11]])
    with pytest.raises(TypeError, match="`program` must be Program"):
        write_program(program.exported, path)
    with pytest.raises(
        CheckpointError, match=r"write_program: `path` must be a file that can be written; got .*NotADir"
    ):
        write_program(program, path / "below")


def test_nothing_of_a_damaged_program_is_deserialised(program, tmp_path, monkeypatch):
    path = tmp_path / "program"
    write_program(program, path)
    whole, content, called = path.read_bytes(), bytes(program.exported.serialize()), []
    monkeypatch.setattr(jax.export, "deserialize", lambda content: called.append(content) or program.exported)
    rng = np.random.default_rng(0)
    # every byte of the lines before the program, some of it
    for position in [*range(len(whole) - len(content)), *rng.integers(len(whole), size=200)]:
        bit = 1 << int(rng.integers(8))
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match=f"load_program: `path` must be .*; got {path} with"):
            load_program(path)
    for other in (b"", whole[:-1], whole + b"\n", content):
        path.write_bytes(other)
        with pytest.raises(CheckpointError, match=f"got {path} with"):
            load_program(path)
    with pytest.raises(CheckpointError, match="nowhere, FileNotFoundError"):
        load_program(tmp_path / "nowhere")
    assert called == []
    path.write_bytes(whole)
    load_program(path)
    assert len(called) == 1


def test_a_program_that_does_not_run_here_is_named(program, tmp_path, monkeypatch):
    """When it is loaded, not when it is called first."""
    path = tmp_path / "program"
    write_program(export(lambda x: 2 * x, inputs=X, platforms=("tpu",)), path)
    with pytest.raises(
        CheckpointError, match=r"load_program: .*platforms '\('tpu',\)'.*written with .*\['tpu'\].*again"
    ):
        load_program(path)
    write_program(program, path)

    def refuse(_):
        raise ValueError("calling convention 99")

    monkeypatch.setattr(jax.export, "deserialize", refuse)
    with pytest.raises(CheckpointError, match=rf"convention 99\. It was written with .*{jax.__version__}.*again"):
        load_program(path)


def test_what_cannot_be_exported_is_named(natural, tmp_path):
    head = DifferentiableHMoG(L, K)
    variables = init(head, jax.random.key(0), X)
    for arguments, options, error, said in [
        (
            (3,),
            {},
            TypeError,
            "`model` must be what restore, fit_em or load return, a module, or a function of rows; got int",
        ),
        ((head,), {"inputs": X}, ValueError, "`variables` must be given with a linen module"),
        ((natural, variables), {}, ValueError, "`variables` must be given with a linen module, and with nothing else"),
        ((head, variables), {}, ValueError, "`inputs` must be rows"),
        ((natural,), {"inputs": X[:, :3]}, ValueError, r"`inputs` must be rows of .* shape \(8,\); got \(3,\)"),
        ((natural,), {"platforms": "cpu"}, ValueError, r"`platforms` must be a sequence.*Write \('cpu',\)"),
    ]:
        with pytest.raises(error, match=f"export: {said}"):
            export(*arguments, **options)
    restored = saved(tmp_path, head, MLP(4, (8,)))
    with pytest.raises(ValueError, match="export: `inputs` must be rows"):
        export(restored)
    assert export(restored, inputs=X, platforms=("cpu",))(X)["assignment"].shape == (N,)


def test_a_program_is_for_one_device_wherever_its_model_lies(natural):
    mesh = jax.make_mesh((len(jax.devices()),), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.device_put(natural, jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        program = export(prepare(spread), platforms=("cpu",))
        assert program.exported.nr_devices == 1
        got = [program(X), program(jax.device_put(X, jax.NamedSharding(mesh, jax.P("rows"))))]
    for answers in got:
        same(jax.device_get(answers), infer(natural, X))
