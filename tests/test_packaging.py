"""Every way to get dscompile onto ``sys.path`` gives the same package, and ``torch.compile`` finds it by name.

The install tests (slow) work on a copy of the tree, in empty environments that borrow this one's dependencies through a
``.pth`` file, so each takes seconds and needs no network.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]
IMPORTS = "import " + ", ".join(FOLDERS)

COMPILE = """
import sys, torch
torch.manual_seed(0)
model, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
ours = {name for name, module in sys.modules.items() if module and name.partition(".")[0] == "dscompile"}
assert ours <= {"dscompile", "dscompile.accelerate_name"}, f"no part of the backend was imported yet: {ours}"
compiled = torch.compile(model, backend="dscompile", options={"regions": "aten", "cache": False})
torch.testing.assert_close(compiled(x), model(x))
compiled(x).sum().backward()
assert model.weight.grad is not None
print(sys.modules["dscompile"].__file__)
"""
PROBE = """
from pathlib import Path
import dscompile, dscompile.passes, dscompile.codegen, dscompile.runtime, dscompile.tools, dscompile.manager
def test_one_package():
    assert Path(dscompile.__file__).parent.parent == Path(__file__).parent.parent
    assert dscompile.passes.PIPELINES and dscompile.manager.REGISTRY
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


# -- the checkout ------------------------------------------------------------------------------------------------------


def test_bare_checkout_imports_every_package(tmp_path: Path) -> None:
    copy_tree(tmp_path)
    out = run(sys.executable, "-c", IMPORTS + "; print(dscompile.passes.__file__)", cwd=tmp_path)
    assert Path(out) == tmp_path / "passes" / "__init__.py"


def test_the_package_is_not_found_twice() -> None:
    importlib.import_module("dscompile")
    with pytest.raises(ModuleNotFoundError, match=r"dscompile\.dscompile"):
        importlib.import_module("dscompile.dscompile")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dscompile.dscompile.errors")


def test_every_code_folder_is_packaged() -> None:
    """A new folder with an ``__init__.py`` would work in the checkout and be missing from the wheel."""
    folders = {p.parent.relative_to(ROOT) for f in FOLDERS.values() for p in (ROOT / f).rglob("*.py")}
    assert folders == {Path(f) for f in FOLDERS.values()}
    assert set(FOLDERS) == set(PROJECT["tool"]["setuptools"]["packages"])


def test_entry_points_name_real_functions() -> None:
    project = PROJECT["project"]
    targets = [*project["scripts"].values(), *(t for group in project["entry-points"].values() for t in group.values())]
    for target in targets:
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_every_import_is_a_declared_dependency() -> None:
    """A module that only an extra, or another package's dependency, brings may be imported inside functions alone."""
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    owners = importlib.metadata.packages_distributions()
    undeclared = []
    for path in sorted(p for folder in FOLDERS.values() for p in (ROOT / folder).glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"dscompile"}:
                if not declared & {canonicalize_name(owner) for owner in owners.get(top, [])}:
                    undeclared.append(f"{path.relative_to(ROOT)}:{node.lineno}: {top}")
    assert not undeclared


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["test"], *extras["dev"], *extras["hf"], *extras["triton"]]
    for requirement in map(Requirement, wanted):
        if requirement.name != "dscompile":
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin), f"{requirement} does not admit {pin}"


# -- installs ----------------------------------------------------------------------------------------------------------


def copy_tree(to: Path) -> Path:
    """Copy what a checkout holds, without what builds and runs leave in it."""
    skip = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "runs", "results", "*.egg-info", "__pycache__", ".*_cache"
    )
    return Path(shutil.copytree(ROOT, to, ignore=skip, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_tree(tmp_path_factory.mktemp("tree"))
    (tree / "tests" / "test_probe.py").write_text(PROBE)
    return tree


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that has this environment's dependencies, and no dscompile."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--no-build-isolation", *what, cwd=cwd)


@pytest.fixture(scope="module")
def distributions(tree: Path) -> dict[str, Path]:
    """The built sdist and wheel, by suffix; the wheel is built from the sdist, as ``python -m build`` does."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    return {path.suffix: path for path in (tree / "dist").iterdir()}


@pytest.mark.slow
def test_pip_install(python: Path, tree: Path, tmp_path: Path) -> None:
    install(python, tree, cwd=tmp_path)
    assert "site-packages" in run(python, "-c", COMPILE, cwd=tmp_path)
    run(python, "-c", IMPORTS, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_pip_install_editable(python: Path, tree: Path, tmp_path: Path, mode: str) -> None:
    install(python, "--config-settings", f"editable_mode={mode}", "-e", tree, cwd=tmp_path)
    assert Path(run(python, "-c", COMPILE, cwd=tmp_path)).is_relative_to(tree)
    run(python, "-c", IMPORTS, cwd=tmp_path)
    run(python, "-m", "pytest", "tests/test_probe.py", cwd=tree)


@pytest.mark.slow
def test_built_wheel(python: Path, distributions: dict[str, Path], tree: Path, tmp_path: Path) -> None:
    install(python, distributions[".whl"], cwd=tmp_path)
    assert "site-packages" in run(python, "-c", COMPILE, cwd=tmp_path)
    refused = subprocess.run([python, "-c", "import dscompile.dscompile"], cwd=tmp_path, capture_output=True, text=True)
    assert "ModuleNotFoundError" in refused.stderr
    assert run(tmp_path / "venv" / "bin" / "dscompile", "--help", cwd=tmp_path)
    run(python, "-m", "pytest", "tests/test_probe.py", cwd=tree)


@pytest.mark.slow
def test_pytest_in_a_bare_checkout(tree: Path) -> None:
    run(sys.executable, Path(sys.executable).with_name("pytest"), "tests/test_probe.py", cwd=tree)


@pytest.mark.slow
def test_python_m_pytest_in_a_bare_checkout(python: Path, tree: Path) -> None:
    run(python, "-m", "pytest", "tests/test_probe.py", cwd=tree)


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(distributions: dict[str, Path], tree: Path) -> None:
    with zipfile.ZipFile(distributions[".whl"]) as wheel:
        names = set(wheel.namelist())
        info = next(n.split("/")[0] for n in names if ".dist-info/" in n)
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
        metadata = wheel.read(f"{info}/METADATA").decode()
    assert {n.split("/")[0] for n in names} == {"dscompile", info}
    assert f"{info}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert "[torch_dynamo_backends]\ndscompile = dscompile.backend:dscompile" in entry_points
    assert "[torch.backends]\ndscompile = dscompile.accelerate_name:register" in entry_points
    for package, folder in FOLDERS.items():
        prefix = Path(package.replace(".", "/"))
        files = {p.relative_to(tree / folder) for p in (tree / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"}
        missing = {f for f in files if (prefix / f).as_posix() not in names}
        assert not missing, f"{folder}: not in the wheel (package-data in pyproject.toml?): {missing}"


@pytest.mark.slow
def test_sdist_can_be_tested(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions[".gz"]) as sdist:
        names = {n.partition("/")[2] for n in sdist.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "pyproject.toml", "dscompile/py.typed"}
    wanted |= {
        "passes/__init__.py",
        "tests/test_packaging.py",
        "benchmarks/__init__.py",
        "docs/architecture.md",
        ".ci/run",
    }
    assert wanted <= names
    assert not [n for n in names if n.startswith(("runs/", "benchmarks/results/", ".git/")) or n.endswith(".pyc")]
