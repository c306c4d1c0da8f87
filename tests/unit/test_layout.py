"""Who may import whom: the layers of README's picture, held by reading the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VALUES = {"engine.errors", "engine.types"}  # every layer may use these
LOWER = {
    "engine/kernels": {"engine.kernels"},
    "engine/layers": {"engine.kernels", "engine.layers"},
    "engine/models": {"engine.kernels", "engine.layers", "engine.models"},
    "engine": {"engine"},
    "quant": {"quant", "engine.models", "engine.layers", "engine.tokenizer"},
    "ui": {"ui", "engine", "quant"},
}
ONLY_IN = {"gradio": ("ui", "app.py"), "triton": ("engine/kernels", "tests")}
FORBIDDEN_CALLS = {"torch.load", "pickle.load", "pickle.loads"}


def sources():
    folders = ["engine", "quant", "ui", "tests", "assets"]
    files = [ROOT / "app.py"] + [f for name in folders for f in (ROOT / name).rglob("*.py")]
    return sorted(str(f.relative_to(ROOT)) for f in files if f.exists())


def imports(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = ROOT / node.module.replace(".", "/") / alias.name
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def is_under(name, packages):
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize(
    "path", [p for p in sources() if p.split("/")[0] in ("engine", "quant", "ui")]
)
def test_a_layer_imports_only_what_lies_below_it(path):
    layer = max((name for name in LOWER if path.startswith(name + "/")), key=len)
    ours = [name for name in imports(path) if is_under(name, {"engine", "quant", "ui", "app"})]
    wrong = [name for name in ours if not is_under(name, LOWER[layer] | VALUES)]
    assert not wrong, f"{path} may not import {wrong}"


@pytest.mark.parametrize("path", [p for p in sources() if p.startswith("ui/")])
def test_the_ui_imports_package_roots_only(path):
    wrong = [name for name in imports(path) if name.startswith(("engine.", "quant."))]
    assert not wrong, f"{path} may not reach into {wrong}"


@pytest.mark.parametrize("path", sources())
def test_gradio_and_triton_stay_where_they_belong(path):
    for package, places in ONLY_IN.items():
        if not path.startswith((*places, "tests")):
            assert not [name for name in imports(path) if is_under(name, {package})], package


@pytest.mark.parametrize("path", [p for p in sources() if not p.startswith("tests")])
def test_nothing_executes_what_a_checkpoint_brings(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, ast.unparse(node)
            for keyword in node.keywords:
                is_trust = keyword.arg == "trust_remote_code"
                assert not (is_trust and ast.unparse(keyword.value) != "False"), ast.unparse(node)
