"""Which file imports which: the structure of the library and of the experiments.

python experiments/benchmarks/module_graph.py

Prints a line for each file: what it imports from its own side, read off the source
without running it. ``tests/test_house.py`` holds it against the tables of
``CONTRIBUTING.md``.
"""

import ast
import pathlib

__all__ = ["graph"]

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def graph(folder: pathlib.Path, package: str = "") -> dict[str, list[str]]:
    """From each file below a folder to the files below it that it imports.

    Args:
        folder: The folder.
        package: What imports call the folder; nothing if it is on the path itself.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    return {
        name: sorted(
            {
                found
                for module in _imported(path)
                if (found := _file_of(module, package, files)) not in (None, name)
            }
        )
        for name, path in sorted(files.items())
    }


def _imported(path: pathlib.Path) -> list[str]:
    """All dotted names that a file imports, those of functions and the like too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _file_of(module: str, package: str, files: dict[str, pathlib.Path]) -> str | None:
    """The file that a dotted name leads to, if it is one of these."""
    parts = module.split(".")
    if package:
        if parts[0] != package:
            return None
        parts = parts[1:]
    for end in range(len(parts), 0, -1):
        stem = "/".join(parts[:end])
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            if name in files:
                return name
    return None


def main() -> None:
    """Prints both graphs."""
    for folder, package in (("st3jax", "st3jax"), ("experiments", "")):
        print(f"{folder}/")
        for name, imported in graph(ROOT / folder, package).items():
            print(f"  {name}: {', '.join(imported) or '-'}")


if __name__ == "__main__":
    main()
