"""Print the test folders and files that a change can have broken: python scripts/changed_tests.py [REVISION].

A module of src/ is tested by the folder of its name in tests/ (and `tests/test_MODULE.py`), and by each test that
imports it; whatever imports it, directly or not, is tested too. Real processes (tests/runs) and golden numbers
(tests/parity) belong to every change of what `train` imports; a change of conf/ belongs to tests/configs and
tests/parity.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import List, Set

ROOT = Path(__file__).resolve().parent.parent
SRC, TESTS = ROOT / "src" / "lit_glm", ROOT / "tests"
_FOLDER_OF = {"runs": "runs_folder", "config": "configs"}
"""Packages whose tests have another name: tests/runs starts real processes."""
_COMMANDS = {
    "verify": "verification",
    "plan": "planning",
    "tune": "tuning",
    "report": "reporting",
}


def changed_files(revision: str) -> List[str]:
    """Return paths that differ from a revision, and files that git does not track yet."""
    commands = (["git", "diff", "--name-only", revision], ["git", "ls-files", "--others", "--exclude-standard"])
    return [line for command in commands for line in subprocess.check_output(command, cwd=ROOT, text=True).splitlines()]


def imported_modules(file: Path) -> Set[str]:
    """Return the modules that a file imports, by dotted names below lit_glm."""
    names: Set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_glm"):
            base = (node.module or "")[len("lit_glm.") :]
            names |= {base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)}
    return names


def dependents(changed: Set[str]) -> Set[str]:
    """Return the changed modules and all that import them, directly or not."""
    graph = {
        ".".join(file.relative_to(SRC).with_suffix("").parts): imported_modules(file) for file in SRC.rglob("*.py")
    }
    reached = set(changed)
    while True:
        more = {module for module, used in graph.items() if used & reached} - reached
        if not more:
            return reached
        reached |= more


def tests_of(modules: Set[str]) -> Set[str]:
    """Return the test folders and files of modules."""
    tests: Set[str] = set()
    for module in modules:
        package = module.split(".")[0]
        folder = _FOLDER_OF.get(package, _COMMANDS.get(package, package))
        tests |= {f"tests/{name}" for name in (folder, f"test_{package}.py") if (TESTS / name).exists()}
    if "train" in modules:
        tests |= {"tests/runs", "tests/parity"}
    if "config.schema" in modules or "config.hydra_main" in modules:
        tests.add("tests/configs")
    return tests


def main(revision: str = "HEAD") -> int:
    """Print one folder or file per line."""
    files = changed_files(revision)
    modules = {
        ".".join(Path(file).relative_to("src/lit_glm").with_suffix("").parts)
        for file in files
        if "src/lit_glm/" in file
    }
    tests = tests_of(dependents(modules)) if modules else set()
    tests |= {str(file.relative_to(ROOT)) for file in TESTS.rglob("test_*.py") if imported_modules(file) & modules}
    if modules:  # what pages say of the code
        tests |= {f"tests/documents/test_{page}.py" for page in ("architecture", "schema")}
    for file in files:
        if file.startswith("tests/") and file.endswith(".py"):
            tests.add(file if Path(file).name.startswith("test_") else str(Path(file).parent))
        if file.startswith("conf/"):
            tests |= {"tests/configs", "tests/parity"}
        if file.startswith(("docs/", "README")):
            tests.add("tests/documents")
    for entry in sorted(entry for entry in tests if (ROOT / entry).exists()):
        if not any(str(parent) in tests for parent in Path(entry).parents):
            print(entry)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
