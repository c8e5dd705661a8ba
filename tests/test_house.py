"""The house is as its plan says: import order, where flax may be, sizes, hops to the arithmetic."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections import deque
from pathlib import Path

import jax
import pytest
from cases import CASES

import flax_hmog

PACKAGE = Path(flax_hmog.__file__).parent
# a folder imports only from folders before it
ORDER = (
    "model",
    "data",
    "em",
    "inference",
    "heads",
    "nnx",
    "networks",
    "analysis",
    "model_file",
    "selection",
    "sklearn",
    "training",
    "recipe",
    "cli",
)
FORMER = ("encoders", "objectives")  # places that checkpoints of old name
PUBLIC = (
    "DifferentiableHMoG", "SymmetricHMoG", "AnalyticHMoG", "differentiable_hmog", "symmetric_hmog", "analytic_hmog",
    "Scale", "Diagonal", "PositiveDefinite", "Moments", "Natural", "Mean", "HMoGOutput", "moments_to_natural",
    "natural_to_moments", "natural_to_mean", "mean_to_natural", "ravel_natural", "unravel_natural", "ravel_mean",
    "unravel_mean", "log_observable_density", "posterior_at", "posterior_categorical", "posterior_soft_assignments",
    "posterior_assignments", "posterior_hard_assignment", "latent_mean", "sample", "expected_statistics",
    "whiten_prior", "split_conjugated", "join_conjugated", "log_partition", "negative_entropy", "kl_divergence",
    "fit_em", "em_step", "initialize_moments", "warm_start",
)  # fmt: skip
EXTRAS = (
    "cluster",
    "plots",
    "report",
    "train",
    "images",
    "export",
    "h5ad",
    "logs",
    "safetensors",
    "sentences",
    "sweep",
)
MAX_FILE, MAX_TEST_FILE, MAX_FUNCTION = 400, 450, 60
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def part(path):
    """The folder of a file, as `ORDER` names it, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def parse(path):
    return ast.parse(path.read_text())


def imported_modules(tree):
    """Dotted names that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from flax_hmog import inference` imports a module, `from flax_hmog.em.step import em_step` a name of one
            names = [alias.name for alias in node.names]
            yield from ([f"{node.module}.{name}" for name in names] if node.module == "flax_hmog" else [node.module])


def inner_imports(tree):
    return {name.split(".")[1] for name in imported_modules(tree) if name.startswith("flax_hmog.")}


@pytest.mark.parametrize(
    "path", [path for path in FILES if part(path) in ORDER], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_folders_import_only_from_those_before_them(path):
    later = inner_imports(parse(path)) - set(ORDER[: ORDER.index(part(path)) + 1])
    assert not later, f"{path.name} imports from {later}, which do not come before {part(path)}"


def test_every_file_is_in_a_folder():
    assert {part(path) for path in FILES} == {*ORDER, *FORMER, "__init__", "serialization", "toy"}


def test_tests_lie_in_the_folders_of_what_they_test():
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/test_*.py")}
    assert folders == {*ORDER, "experiments"} - {"cli", "model_file", "sklearn"}


@pytest.mark.parametrize("path", [path for path in FILES if part(path) in ORDER[: ORDER.index("heads")]], ids=str)
def test_files_with_formulas_import_no_flax(path):
    modules = {module.split(".")[0] for module in imported_modules(parse(path))}
    assert not modules & {"flax", "optax", "orbax"}


def test_heads_hold_no_linear_algebra():
    tree = parse(PACKAGE / "heads" / "modules.py")
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"matmul", "einsum", "linalg", "cholesky", "solve", "dot", "exp", "log", "logsumexp"}
    assert not any(isinstance(node, ast.MatMult) for node in ast.walk(tree))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = (ast.get_docstring(node) or "").count("\n")
            length = node.end_lineno - node.lineno + 1 - documented
            assert length <= MAX_FUNCTION, f"{node.name} has {length} lines beside its docstring"


def test_files_of_tests_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in Path(__file__).parent.rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > MAX_TEST_FILE}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_assert_and_no_bare_exception(path):
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        raised = getattr(node.exc, "func", node.exc) if isinstance(node, ast.Raise) else None
        assert getattr(raised, "id", "") not in ("Exception", "BaseException"), f"line {node.lineno}"


INLINED = (ast.ListComp, ast.SetComp, ast.DictComp)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.GeneratorExp)


def confused_names(function):
    """Names that one comprehension of a function binds and another one takes from around the function."""
    own, bound, taken = set(), set(), set()

    def visit(node, hidden=None):  # by comprehensions around the node; None outside of them
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            own.add(node.id)
        elif isinstance(node, ast.Name) and hidden is not None and node.id not in hidden:
            taken.add(node.id)
        elif not isinstance(node, ast.keyword):
            own.update(getattr(node, field, None) for field in ("arg", "asname", "name"))
        if isinstance(node, INLINED):
            first, *others = node.generators
            targets = {
                name.id for part in node.generators for name in ast.walk(part.target) if isinstance(name, ast.Name)
            }
            bound.update(targets)
            visit(first.iter, hidden)  # which the scope around computes
            inner = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            inner += first.ifs + [child for part in others for child in (part.iter, *part.ifs)]
            for child in inner:
                visit(child, targets | (hidden or set()))
        elif not isinstance(node, SCOPES):
            for child in ast.iter_child_nodes(node):
                visit(child, hidden)

    for node in ast.iter_child_nodes(function):
        visit(node)
    return (bound & taken) - own


def test_no_name_of_one_comprehension_is_that_of_something_else_in_another():
    """Python 3.12 and later compute both in the function: an UnboundLocalError where they do not keep them apart."""
    functions = lambda tree: (node for node in ast.walk(tree) if isinstance(node, SCOPES[:3]))  # noqa: E731
    confused = "def f(rows): return [x for x in rows], {row: g(x) for row in rows}"
    apart = "def f(rows, x): return [y for y in rows], {row: g(x, x=y) for row in rows for y in row}, [x for x in x]"
    assert [confused_names(f) for text in (confused, apart) for f in functions(ast.parse(text))] == [{"x"}, set()]
    root = PACKAGE.parent
    for path in [*FILES, *root.glob("examples/**/*.py"), *root.glob("experiments/**/*.py")]:
        for function in functions(parse(path)):
            assert not confused_names(function), (
                f"{path}: {getattr(function, 'name', 'lambda')}, line {function.lineno}"
            )


def test_names_that_users_were_promised_are_public():
    assert set(PUBLIC) <= set(flax_hmog.__all__)


def test_the_package_file_lists_names_only():
    for node in parse(PACKAGE / "__init__.py").body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_names = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").startswith("__")
        assert isinstance(node, ast.Import | ast.ImportFrom) or is_docstring or is_names, ast.unparse(node)


@functools.cache
def functions_of(module):
    """Functions (and methods, by "Class.name") of a module, and what its imported names stand for."""
    tree, functions, names = parse(PACKAGE / f"{module.replace('.', '/')}.py"), {}, {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            functions |= {f"{node.name}.{f.name}": f for f in node.body if isinstance(f, ast.FunctionDef)}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("flax_hmog"):
            home = node.module.removeprefix("flax_hmog").removeprefix(".")
            is_module = [(PACKAGE / home.replace(".", "/") / f"{alias.name}.py").exists() for alias in node.names]
            names |= {
                alias.asname or alias.name: (f"{home}.{alias.name}", None) if module else (home, alias.name)
                for alias, module in zip(node.names, is_module, strict=True)
            }
    return functions, names


def called_by(module, function):
    """Package functions (module, name) that the body of a function calls, or passes on to be called."""
    functions, names = functions_of(module)
    for node in ast.walk(functions[function]):
        if isinstance(node, ast.Name):
            if node.id in functions:
                yield module, node.id
            elif names.get(node.id, (None, None))[1]:
                yield names[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            home, name = names.get(node.value.id, (None, "a name, not a module"))
            if name is None:
                yield home, node.attr


def path_to(start, goal):
    """The shortest chain of calls from one function to another."""
    queue, seen = deque([[start]]), {start}
    while queue:
        path = queue.popleft()
        if path[-1] == goal:
            return path
        for step in called_by(*path[-1]):
            if step not in seen and step[1] in functions_of(step[0])[0]:
                seen.add(step)
                queue.append([*path, step])
    return None


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        ("log_observable_density", "component_logits"),
        ("log_observable_density", "shared_log_density"),
        ("posterior_soft_assignments", "component_logits"),
        ("posterior_hard_assignment", "component_logits"),
        ("latent_mean", "posterior_gain"),
        ("__call__", "component_logits"),
    ],
)
def test_three_hops_from_a_method_to_the_arithmetic(method, formula):
    first = ("heads.modules", "HMoGHead.__call__") if method == "__call__" else ("heads.answers", f"Answers.{method}")
    path = path_to(first, ("model.prepared", formula))
    assert path is not None, "the formula is not reached: was it renamed?"
    assert len(path) - 1 <= 3, " -> ".join(".".join(step) for step in path)
    assert len({module for module, _ in path}) <= 5


@pytest.mark.parametrize("method", ["log_observable_density", "posterior_soft_assignments"])
def test_few_functions_run_between_a_method_and_its_result(method):
    """All of ours that run for one call on a model: goal-jax needs 94 functions in 15 files for the assignments."""
    case = CASES["differentiable-diagonal-diagonal-4.2.3"]
    natural, x = case.natural("float32"), case.x()
    function, ran = getattr(flax_hmog, method), set()

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            ran.add((Path(frame.f_code.co_filename).stem, frame.f_code.co_qualname))

    with jax.disable_jit():
        sys.setprofile(profile)
        try:
            function(natural, x)
        finally:
            sys.setprofile(None)
    named = {(file, name) for file, name in ran if "<lambda>" not in name and "<genexpr>" not in name}
    assert ("prepared", "component_logits") in named
    assert len(named) <= 47, sorted(named)
    assert len({file for file, _ in named}) <= 8, sorted(named)


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1].split():
    sys.modules[name] = None  # as where it is not installed
for module in sys.argv[2].split():
    importlib.import_module(module)
"""


def test_modules_import_without_optional_packages():
    """The packages of extras are needed by calls, which name them, not by imports; scipy is one of JAX."""
    with (PACKAGE.parent / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = {name for extra in EXTRAS for name in project["optional-dependencies"][extra]}
    names = {re.match(r"[\w-]+", name)[0] for name in extras} - {"flax-hmog", "scipy"}
    optional = {{"scikit-learn": "sklearn", "pillow": "PIL"}.get(name, name.replace("-", "_")) for name in names}
    assert optional > {"matplotlib", "sklearn", "tyro", "pandas"}
    of_all = [path for path in FILES if part(path) != "sklearn"]  # an estimator is a class of scikit-learn's
    modules = [".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)) for path in of_all]
    command = [sys.executable, "-c", IMPORT_ALL, " ".join(optional), " ".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
