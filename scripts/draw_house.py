"""Draws docs/house.svg: the rooms of castling_jax/, and which room imports which, read from the imports themselves.

    python scripts/draw_house.py            # after a room or an import between rooms has come or gone
    python scripts/draw_house.py --check    # fails where the picture is not what the imports say

A room is a folder or a file of castling_jax/. It stands one floor above the highest room that it imports. Lines that
others imply are left out: a room that imports `training` reaches `models` through it.
"""

import argparse
import ast
import functools
import html
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, PICTURE = ROOT / "castling_jax", ROOT / "docs" / "house.svg"
WIDTH, HEIGHT, GAP, FLOOR = 170, 62, 16, 104  # of a room, between rooms, and from floor to floor, in pixels
LETTERS = 27  # in a line of a room's description
LINES = 3


def rooms() -> dict[str, list[Path]]:
    """The files of each room by its name; main.py is the room at the top, and imports the package through it."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":  # the public API: it has the names of all rooms
            found.setdefault(path.relative_to(PACKAGE).with_suffix("").parts[0], []).append(path)
    return found


def imported_by(files: list[Path], names: set[str]) -> set[str]:
    """The rooms that these files import, wherever in the file the import stands."""
    modules: list[str] = []
    for node in [node for path in files for node in ast.walk(ast.parse(path.read_text()))]:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [module.split(".") for module in modules if module.startswith("castling_jax.")]
    return {part[1] for part in parts if part[1] in names}


def description(files: list[Path]) -> list[str]:
    """What a room's docstring says first, in lines that fit."""
    first = next((path for path in files if path.name == "__init__.py"), files[0])
    text = (ast.get_docstring(ast.parse(first.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    text = text.split(". ")[0].split("; ")[0].removesuffix(".")
    return textwrap.wrap(text, LETTERS, max_lines=LINES, placeholder=" ...")


def draw() -> str:
    """The picture, as SVG."""
    files = rooms()
    imports = {name: imported_by(paths, set(files)) - {name} for name, paths in files.items()}

    @functools.cache
    def floor(name: str) -> int:
        return max((floor(other) + 1 for other in imports[name]), default=0)

    @functools.cache
    def reached(name: str) -> frozenset[str]:
        return frozenset(imports[name]).union(*(reached(other) for other in imports[name]))

    top = max(map(floor, files))
    floors = [[name for name in sorted(files) if floor(name) == level] for level in range(top, -1, -1)]
    width = max(map(len, floors)) * (WIDTH + GAP) + GAP
    corner: dict[str, tuple[float, float]] = {}
    for row, names in enumerate(floors):
        left = (width - len(names) * (WIDTH + GAP) + GAP) / 2
        corner |= {name: (left + column * (WIDTH + GAP), GAP + row * FLOOR) for column, name in enumerate(names)}

    lines, boxes = [], []
    for name in files:
        x, y = corner[name]
        for other in sorted(imports[name]):
            if not any(other in reached(between) for between in imports[name]):
                start, (left, below) = x + WIDTH / 2, corner[other]
                end = left + WIDTH / 2
                # A line that passes a floor swings out, so that it does not run behind the rooms in between.
                swing = 0 if floor(name) - floor(other) == 1 else WIDTH * (1 if end > start else -1)
                curve = f"C{start + swing:g},{y + FLOOR:g} {end + swing:g},{below - HEIGHT:g} {end:g},{below:g}"
                style = 'fill="none" stroke="#999" marker-end="url(#arrow)"'
                lines.append(f'<path d="M{start:g},{y + HEIGHT:g} {curve}" {style}/>')
        box = f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="#eef3fa" stroke="#456"/>'
        middle = x + WIDTH / 2
        said = "".join(
            f'<text x="{middle:g}" y="{y + 30 + 12 * row:g}" font-size="11">{html.escape(text)}</text>'
            for row, text in enumerate(description(files[name]))
        )
        boxes.append(f'{box}<text x="{middle:g}" y="{y + 16:g}" font-weight="bold">{name}</text>{said}')
    height = (top + 1) * FLOOR - (FLOOR - HEIGHT) + 2 * GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
    arrow = '<path d="M0,0 L8,4 L0,8 z" fill="#999"/>'
    marker = f'<marker id="arrow" markerWidth="8" markerHeight="8" refX="8" refY="4" orient="auto">{arrow}</marker>'
    return "\n".join(
        [
            f'{head} font-family="sans-serif" font-size="13" text-anchor="middle">',
            f'<defs>{marker}</defs><rect width="100%" height="100%" fill="white"/>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    picture = draw()
    if not parser.parse_args().check:
        PICTURE.write_text(picture)
    elif not PICTURE.exists() or PICTURE.read_text() != picture:
        sys.exit(f"'{PICTURE.relative_to(ROOT)}' is not what the imports say: run python scripts/draw_house.py.")


if __name__ == "__main__":
    main()
