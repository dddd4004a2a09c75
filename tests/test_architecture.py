"""Imports run one way, optional packages stay optional, and nothing evaluates text."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "proxyq"

# A module may import its own stage and those before it.
STAGES = [
    (
        "devices",
        "errors",
        "executor",
        "files",
        "record_file",
        "installed",
        "checkpoint",
        "progress",
        "registry",
        "shelf",
        "version",
        "provenance",
        "psd",
        "widths",
    ),
    ("model",),
    ("data",),
    ("quantize",),
    ("engine",),
    ("proxies",),
    ("search",),
    ("ptq",),
    ("auto",),
    ("export",),
    ("report",),
    ("api", "testing"),
    ("cli",),
    ("__init__", "__main__"),
]
RANK = {name: rank for rank, names in enumerate(STAGES) for name in names}
OPTIONAL = {
    *("torch", "torchvision", "timm", "datasets", "sklearn", "ray", "pyscipopt", "deap", "sympy"),
    *("onnx", "onnxruntime", "onnxscript", "torchao", "compressed_tensors", "qwix"),
}


def modules():
    return sorted(ROOT.rglob("*.py"))


def stage(path: Path) -> str:
    part = path.relative_to(ROOT).parts[0]
    return part.removesuffix(".py")


def imported(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "proxyq":
            yield from ((f"proxyq.{alias.name}", node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = RANK[stage(path)]
    if stage(path) == "__init__":
        return
    for name, node in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "proxyq":
            target = parts[1] if len(parts) > 1 else "__init__"
            assert RANK.get(target, -1) <= own, f"line {node.lineno} imports {name}, a later stage"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_inside_functions(path):
    tree = ast.parse(path.read_text())
    guarded = [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    inside = {id(n) for block in guarded for n in ast.walk(block)}
    for node in tree.body:
        for name, statement in imported(node):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) or id(statement) in inside:
                continue
            assert name.split(".")[0] not in OPTIONAL, f"line {statement.lineno} imports {name}"


UNPICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EVALUATES = {"eval", "exec", "compile", "builtins.eval", "builtins.exec"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_evaluates_or_unpickles(path):
    tree = ast.parse(path.read_text())
    for name, node in imported(tree):
        assert name.split(".")[0] not in UNPICKLES, f"line {node.lineno} imports {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in EVALUATES, f"line {node.lineno}"
        if called.endswith("torch.load"):
            assert "weights_only=True" in ast.unparse(node), f"line {node.lineno}"
        if called == "np.load":
            assert "allow_pickle=False" in ast.unparse(node), f"line {node.lineno}"


def test_import_is_light():
    code = (
        "import sys, proxyq; "
        "heavy = {'jax', 'torch', 'scipy', 'matplotlib', 'flax'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve():
    import proxyq

    for name in dir(proxyq):
        assert getattr(proxyq, name) is not None
    assert callable(proxyq.search) and proxyq.search.allocate is not None
