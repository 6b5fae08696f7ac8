"""The rooms of recipe/ and launch/, and which of them may import which: the arrows point one way."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may import itself, the vocabulary, and the rooms named here. The first match counts.
VOCABULARY = ("recipe.config", "recipe.errors", "recipe.configs")
ROOMS = {
    "recipe.config": (),
    "recipe.errors": (),
    "recipe.configs": (),
    "recipe.system": (),
    "recipe.rules": (),
    "recipe.ranks": ("recipe.system",),
    "recipe.keras": ("recipe.system", "recipe.rules", "recipe.ranks"),
    "recipe.data.prepare": ("recipe.system", "recipe.rules", "recipe.data", "recipe.cli"),
    "recipe.data.benchmark": ("recipe.system", "recipe.rules", "recipe.data", "recipe.cli"),
    "recipe.data": ("recipe.system", "recipe.rules"),
    "recipe.frameworks": (
        "recipe.system",
        "recipe.rules",
        "recipe.ranks",
        "recipe.data",
        "recipe.keras",
    ),
    "recipe.run": (
        "recipe.system",
        "recipe.rules",
        "recipe.ranks",
        "recipe.data",
        "recipe.frameworks",
    ),
    "recipe.cli": ("recipe.system", "recipe.ranks"),
    "recipe": ("recipe",),  # the programs and the benchmarks
    "launch.install": ("recipe.system", "recipe.data.decode_build"),
    "launch": ("launch", "recipe"),
}


def room_of(module: str) -> str:
    """Return the room of a module: the longest name that it begins with."""
    names = (name for name in ROOMS if module == name or module.startswith(f"{name}."))
    return max(names, key=len)


def imports(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                child = f"{node.module}.{alias.name}"
                is_module = (ROOT / child.replace(".", "/")).with_suffix(".py").exists()
                is_package = (ROOT / child.replace(".", "/")).is_dir()
                modules.add(child if is_module or is_package else node.module)
    return {module for module in modules if module.split(".")[0] in ("recipe", "launch")}


def files() -> list[Path]:
    return [path for folder in ("recipe", "launch") for path in (ROOT / folder).rglob("*.py")]


def test_the_arrows_between_rooms_point_one_way() -> None:
    wrong = []
    for path in files():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        room = room_of(module)
        allowed = (*VOCABULARY, *ROOMS[room])
        for imported in imports(path):
            if room_of(imported) == room:
                continue
            if not any(imported == name or imported.startswith(f"{name}.") for name in allowed):
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


def loaded_by(statement: str, **environment: str) -> set[str]:
    """Return the modules of ours that a new process has after a statement."""
    program = f"{statement}; import sys; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(output.split())


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_the_library_loads_only_what_it_needs(backend: str) -> None:
    modules = loaded_by("import recipe.keras", KERAS_BACKEND=backend)
    ours = {module for module in modules if module.startswith("recipe.")}
    rooms = {room_of(module) for module in ours}
    assert rooms == {
        "recipe.errors",
        "recipe.keras",
        "recipe.ranks",
        "recipe.rules",
        "recipe.system",
    }
    assert not {name for name in ours if "checkpoint" in name}
    assert "tensorflow_datasets" not in modules


def test_training_in_pytorch_loads_no_tensorflow() -> None:
    """Where PyTorch alone is installed it must run, on data that need no preparation."""
    for statement in (
        "import recipe.frameworks.torch.replica, recipe.data.pipeline, recipe.data.sources",
        "import recipe.train, recipe.evaluate, recipe.run.training",
        "import recipe.benchmark.gpu_row",
    ):
        assert "tensorflow" not in loaded_by(statement), statement


def test_the_network_in_pytorch_loads_no_data_pipeline() -> None:
    modules = loaded_by("import recipe.frameworks.torch.resnet")
    assert not {module for module in modules if module.startswith("recipe.data")}
