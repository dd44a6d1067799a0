"""Which part may import which, where torch may be imported, and what a light command must not import."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import tandem

ROOT = Path(tandem.__file__).parent
# Top may import below, never up; parts on one line never meet.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"api"},
    {"jobs"},
    {"engine"},
    {"scheduler", "memory", "model", "finetune"},
    {"ops"},
    {"tokenizer", "telemetry"},
    {"config", "hub", "gguf"},
    {"work", "errors"},
]
RANK = {name: depth for depth, names in enumerate(LAYERS) for name in names}
TORCH_ALLOWED = (
    "ops/", "model/", "finetune/", "memory/arena.py",
    "engine/worker.py", "engine/batch.py", "engine/sampler.py", "engine/trainer.py",
)  # fmt: skip
HEAVY = ("torch", "transformers", "fastapi")


def imports(path, root):
    """(module, line, at module level) for every import; `from tandem import engine` counts as tandem.engine."""
    here = [root.name, *path.relative_to(root).with_suffix("").parts]
    tree = ast.parse(path.read_text())
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            for alias in node.names:
                yield ".".join([*base, *filter(None, [node.module]), alias.name]), node.lineno, id(node) not in lazy
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) not in lazy


def violations(root):
    """Imports that go up, or sideways between siblings."""
    for path in sorted(root.rglob("*.py")):
        unit = path.relative_to(root).parts[0].removesuffix(".py")
        if unit == "__init__":
            continue
        if unit not in RANK:
            yield f"{path.relative_to(root)} belongs to no layer"
            continue
        for module, line, _ in imports(path, root):
            parts = module.split(".")
            if parts[0] != root.name or len(parts) < 2 or parts[1] in (unit, "__version__"):
                continue
            if parts[1] not in RANK or RANK[parts[1]] <= RANK[unit]:
                yield f"{path.relative_to(root)}:{line} imports {module}"


def torch_violations(root):
    """Imports of torch, also lazy ones, outside the files that handle tensors."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(TORCH_ALLOWED):
            continue
        for module, line, _ in imports(path, root):
            if module.split(".")[0] == "torch":
                yield f"{name}:{line} imports {module}"


def test_imports_go_down_only():
    assert list(violations(ROOT)) == []


def test_torch_only_where_tensors_are():
    assert list(torch_violations(ROOT)) == []


def test_every_module_opens_with_what_lives_there():
    bare = [
        str(path.relative_to(ROOT))
        for path in sorted(ROOT.rglob("*.py"))
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert bare == []


def test_the_check_sees_each_kind_of_violation(tmp_path):
    root = tmp_path / "tandem"
    for name in ("model", "memory", "engine", "cli"):
        (root / name).mkdir(parents=True)
    (root / "model" / "up.py").write_text("def f():\n    from tandem import engine\n")
    (root / "memory" / "sideways.py").write_text("from ..model import up\nimport torch\n")
    (root / "cli" / "down.py").write_text("import tandem.engine.engine\nfrom tandem import __version__\n")
    (root / "stray.py").write_text("")
    found = list(violations(root))
    assert len(found) == 3
    assert "memory/sideways.py:1" in found[0] and "model/up.py:2" in found[1] and "stray.py" in found[2]
    assert list(torch_violations(root)) == ["memory/sideways.py:2 imports torch"]


@pytest.mark.parametrize("argv", [["--help"], ["serve", "--help"], ["version"], ["bench", "serve", "--help"]])
def test_light_commands_import_nothing_heavy(argv):
    code = (
        "import sys\nfrom tandem.__main__ import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("HEAVY []"), done.stdout[-500:]


def test_help_answers_at_once():
    # Processor time, which is what an idle machine would need: other work on the machine must not fail this.
    best = min(_cpu_seconds([sys.executable, "-m", "tandem", "--help"]) for _ in range(3))
    assert best < 0.3, f"tandem --help took {best:.2f} s"


def _cpu_seconds(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
