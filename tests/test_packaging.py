"""What is installed: callbacks and recipes inside the package, and nothing beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("aihwkit_lora", "callbacks", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # setuptools leaves build/ and *.egg-info where it builds, so it builds in a copy.
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*build, str(copy)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_every_folder_with_python_files_is_a_package() -> None:
    found = set()
    for name in SOURCES:
        prefix = "" if name == "aihwkit_lora" else "aihwkit_lora."
        for file in (ROOT / name).rglob("*.py"):
            found.add(prefix + ".".join(file.parent.relative_to(ROOT).parts))
    assert found == set(SETUPTOOLS["packages"])


def test_the_wheel_holds_one_package_with_everything_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith("/entry_points.txt"))
        entry_points = archive.read(info).decode()
    assert {name.split("/")[0] for name in names} == {"aihwkit_lora", info.split("/")[0]}
    assert "aihwkit-lora = aihwkit_lora.recipes.cli:main" in entry_points
    for name in ("py.typed", "callbacks/__init__.py", "recipes/__init__.py", "recipes/cli.py"):
        assert f"aihwkit_lora/{name}" in names
    assert not [name for name in names if "test" in name]
    modules = {file.relative_to(ROOT) for name in SOURCES for file in (ROOT / name).rglob("*.py")}
    inside = {
        "aihwkit_lora" / Path(*file.parts[file.parts[0] == "aihwkit_lora" :]) for file in modules
    }
    assert {Path(name) for name in names if name.endswith(".py")} == inside


def test_an_installed_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
    program = (
        "import aihwkit_lora.callbacks as c, aihwkit_lora.recipes as r, importlib.util as u\n"
        "print(c.__file__, r.__file__, u.find_spec('callbacks'), u.find_spec('recipes'), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(target)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    inside = target / "aihwkit_lora"
    assert done.stdout.splitlines() == [
        str(inside / "callbacks" / "__init__.py"),
        str(inside / "recipes" / "__init__.py"),
        "None",
        "None",
    ]
