"""Functions without what does not depend on their argument."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.training.folding import folded

X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
MATRIX = jnp.eye(4) * 3 + 1


@jax.custom_vjp
def solved(x):
    return jnp.linalg.solve(MATRIX, x.T).T


solved.defvjp(lambda x: (solved(x), None), lambda _, cotangent: (cotangent,))


def function(x):
    chosen = jax.lax.platform_dependent(
        MATRIX, cpu=jnp.linalg.inv, default=lambda matrix: jnp.linalg.solve(matrix, jnp.eye(4))
    )
    shifted = jax.lax.platform_dependent(x, cpu=lambda x: x + 1, default=lambda x: x - 1)
    branch = jax.lax.cond(x.sum() > 0, lambda x: x @ MATRIX, lambda x: x, x)
    noise = jax.random.normal(jax.random.key(3), (4,))
    return {
        "product": jax.checkpoint(jax.jit(lambda x: jax.nn.relu(x) @ chosen))(x), "shifted": shifted, "branch": branch,
        "solved": solved(x), "noise": noise[None] + x, "constant": MATRIX, "count": jnp.full(3, x.shape[0]), "given": x,
    }  # fmt: skip


def test_what_depends_on_the_argument_is_left():
    want = function(jnp.asarray(X))
    (batch,) = jax.export.symbolic_shape("batch")
    for count in (5, batch):
        rows = jax.ShapeDtypeStruct((count, 4), jnp.float32)
        less = folded(function, rows)
        program = jax.export.export(jax.jit(less), platforms=("cpu", "cuda"))(rows)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), program.call(X), want)
        left = [equation.primitive.name for equation in jax.make_jaxpr(less)(rows).eqns]
        # platforms choose anew what depends on the rows: a program is made on one, and runs on others
        assert left.count("platform_index") == 1
        assert not {"cholesky", "lu", "triangular_solve", "custom_vjp_call", "checkpoint", "jit", "random_bits"} & set(
            left
        )
