"""The package as readers and users meet it: few packages that say what they are for, public names, and a wheel that works."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import spade_faiss
from spade_faiss.search.recipe import recipe_names

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "spade_faiss"
# What the server's page is made of: templates, styles, scripts with their licenses.
PAGE_FILES = sorted(
    str(path.relative_to(PACKAGE / "serve/web/page"))
    for folder in ("templates", "static")
    for path in (PACKAGE / "serve/web/page" / folder).iterdir()
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def run_python(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True).stdout


def test_the_package_holds_few_packages_that_say_what_they_are_for() -> None:
    entries = {path for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    entries -= {PACKAGE / name for name in ("__init__.py", "__main__.py", "_version.py", "py.typed")}
    assert len(entries) <= 18
    for path in entries:
        source = path if path.is_file() else path / "__init__.py"
        docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
        assert docstring, path
        first = docstring.splitlines()[0]
        assert first[0].isupper(), path
        assert first.endswith("."), path
        assert len(first.split()) >= 5, path


def test_no_module_imports_the_package_root() -> None:
    """A module takes a name from where it stands: the root is for users, and knows every package."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert "spade_faiss" not in {alias.name for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                assert node.module != "spade_faiss", path


def test_public_names_are_documented_and_stand_where_the_package_says() -> None:
    for name in spade_faiss.__all__:
        value = getattr(spade_faiss, name)
        assert value.__name__ == name
        assert value.__doc__
        assert value.__module__ == f"spade_faiss.{spade_faiss._HOMES[name]}"
    assert dir(spade_faiss) == spade_faiss.__all__ == list(spade_faiss._HOMES)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = spade_faiss.nonsense


def test_public_names_are_imported_at_first_use() -> None:
    code = """
import sys, spade_faiss
print(sorted(name for name in sys.modules if name.startswith("spade_faiss.")))
spade_faiss.InputError
print("spade_faiss.core.errors" in sys.modules, "torch" in sys.modules)
"""
    assert run_python(code).splitlines() == [
        "['spade_faiss._version', 'spade_faiss.core', 'spade_faiss.core.process']",
        "True False",
    ]


@pytest.mark.parametrize("command", ["", "score", "recommend", "doctor"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = f"""
import runpy, sys
sys.argv = {["spade-faiss", *command.split(), "--help"]!r}
try:
    runpy.run_module("spade_faiss", run_name="__main__")
except SystemExit as end:
    heavy = ("torch", "faiss", "h5py", "numpy", "scipy", "PIL", "matplotlib", "yaml")
    print("\\n", end.code, [name for name in heavy if name in sys.modules])
"""
    assert run_python(code).splitlines()[-1].strip() == "0 []"


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert version("spade-faiss") == spade_faiss.__version__
    assert set(project["optional-dependencies"]) == {
        *(
            "cpu",
            "gpu",
            "edge",
            "demo",
            "dev",
            "tiff",
            "torch",
            "onnxruntime",
            "openvino",
            "serve",
            "video",
            "watch",
            "cluster",
            "s3",
        )
    }


def test_idle_openmp_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, spade_faiss; print(os.environ['OMP_WAIT_POLICY'])"
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        environment = {} if given is None else {"OMP_WAIT_POLICY": given}
        assert run_python(code, **environment).strip() == expected


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no compiler"])
def test_a_wheel_works_outside_of_the_checkout(compiler: bool, tmp_path: Path) -> None:
    """A wheel that is built without a compiler has no kernel, and works all the same."""
    source, environment = tmp_path / "source", dict(os.environ)
    for name in ("spade_faiss", "indexes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    if not compiler:
        environment |= {"CC": "no-compiler", "CXX": "no-compiler"}
    elif shutil.which("g++") is None:
        pytest.skip("there is no g++")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".cpp", ".hpp"))]
        archive.extractall(tmp_path / "site")  # what pip does with a wheel
    # What an editable installation finds in the checkout is not what the wheel holds.
    code = (
        "import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]; "
        "import spade_faiss.search.recipe as recipe; import spade_faiss.search.native.extension as kernel; "
        "from importlib.resources import files; "
        "print(recipe.__file__, recipe.load_recipe('exact').build, recipe.recipe_names(), "
        "(files('spade_faiss.report') / 'report.html.j2').is_file(), kernel.is_built()); "
        "page = files('spade_faiss.serve.web.page'); "
        "print([name for name in " + repr(PAGE_FILES) + " if not (page / name).is_file()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "image='Flat'" in done.stdout
    built = compiler and platform.machine() in ("x86_64", "AMD64")
    assert f"{recipe_names()} True {built}" in done.stdout
    assert "static/htmx.min.js" in PAGE_FILES
    assert done.stdout.splitlines()[-1] == "[]", "the wheel lacks files of the page"
