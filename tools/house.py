"""The house from its own imports: its faults, and its map.

    python tools/house.py              draw nbs/images/house.svg
    python tools/house.py --check      print faults of the order and exit 1; draw nothing

A notebook's number is its place in the reading order, the first digit its floor. A module may import only modules
of lower numbers, and on its own floor only its own room (late imports count). Exported code is followed by a call
that shows it: at most two exported cells stand in a row.
"""

import argparse
import ast
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

root = Path(__file__).resolve().parents[1]
picture = Path("nbs", "images", "house.svg")
most_exports_in_a_row = 2


@dataclass
class Module:
    """A notebook and the module it exports."""

    notebook: Path
    number: int
    name: str  # such as "model.open"
    cells: list
    imports: set = field(default_factory=set)  # names of modules

    @property
    def floor(self):
        return self.number // 100

    @property
    def room(self):
        return self.name.split(".")[0]


def read_modules(folder):
    """Read the numbered notebooks below `folder` and what they export: name -> Module, in reading order."""
    found = {}
    for path in sorted(folder.glob("nbs/*.ipynb")):
        numbered = re.match(r"(\d+)_(.+)$", path.stem)
        if not numbered:
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        module = Module(path.relative_to(folder), int(numbered[1]), numbered[2], cells)
        if any(re.search(r"^#\| *default_exp ", text_of(cell), re.M) for cell in cells):
            found[module.name] = module
    for module in found.values():
        for cell in module.cells:
            if is_exported(cell):
                module.imports |= imported(text_of(cell), found)
        module.imports.discard(module.name)
    return found


def text_of(cell):
    return "".join(cell["source"])


def is_exported(cell):
    return cell["cell_type"] == "code" and re.match(r"#\| *exporti?\b", text_of(cell)) is not None


def imported(code, known):
    """Name the modules that a piece of code imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    short = {name.removeprefix("longva.") for name in names if str(name).startswith("longva.")}
    return short & known.keys()


def order_faults(modules):
    """Say which imports go up, sideways or against the reading order."""
    for module in modules.values():
        for name in sorted(module.imports):
            other = modules[name]
            importing = f"{module.notebook} imports longva.{name}"
            if other.floor > module.floor:
                up = other.floor - module.floor
                yield f"{importing}, which is {up} floors up: move one of the two."
            elif other.floor == module.floor and other.room != module.room:
                yield f"{importing}, another room of its floor: move what both need one floor down."
            elif other.number >= module.number:
                yield f"{importing}, whose number is higher: renumber the notebooks or move the code."


def circles(modules):
    """Say which modules import each other in a circle."""
    done, path = set(), []

    def follow(name):
        if name in path:
            yield "These modules import each other in a circle: " + ", ".join([*path[path.index(name) :], name]) + "."
        elif name not in done:
            path.append(name)
            for below in sorted(modules[name].imports):
                yield from follow(below)
            done.add(path.pop())

    for name in modules:
        yield from follow(name)


def rhythm_faults(modules):
    """Say where more than two exported cells stand before a shown call."""
    for module in modules.values():
        waiting = 0
        for number, cell in enumerate(module.cells):
            if cell["cell_type"] != "code":
                continue
            tree = ast.parse(re.sub(r"(?m)^\s*[%!].*$", "pass", text_of(cell)))
            if is_exported(cell):
                waiting += any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body)
                if waiting == most_exports_in_a_row + 1:
                    yield (
                        f"{module.notebook} exports {waiting} cells in a row up to cell {number}: "
                        "show a call of what the first ones define."
                    )
            elif any(isinstance(node, ast.Call) for node in ast.walk(tree)):
                waiting = 0


def faults(folder):
    """All sentences about the order of the house."""
    modules = read_modules(folder)
    yield from circles(modules)
    yield from order_faults(modules)
    yield from rhythm_faults(modules)
    if not (folder / picture).is_file() or (folder / picture).read_text(encoding="utf-8") != draw(modules):
        yield f"{picture.as_posix()} is not what the imports make of it: run `make map`."


STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328 }
  .floor { font-size: 12px; fill: #59636e }
  .module { font-size: 11px }
  .name { font-weight: 600 }
  .room { fill: #f6f8fa; stroke: #8c959f }
  .arrow { stroke: #0969da; fill: none; opacity: .45 }
  #tip path { fill: #0969da }
  @media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .floor { fill: #9198a1 }
  .room { fill: #161b22; stroke: #6e7681 }
  .arrow { stroke: #4493f8 } #tip path { fill: #4493f8 } }
"""
width, row, column, left, gap = 1000, 17, 132, 30, 28


def draw(modules):
    """Draw floors, rooms with their modules, and arrows between rooms, as an SVG that follows light and dark mode."""
    rooms = {}
    for module in modules.values():
        rooms.setdefault((module.floor, module.room), []).append(module)
    places, shapes, y = {}, [], 12
    for floor in sorted({floor for floor, _ in rooms}, reverse=True):
        on_floor = [room for room in rooms if room[0] == floor]
        columns = columns_of(rooms, on_floor)
        height = 0
        wide = sum(columns[room] * column + 14 for room in on_floor) + 12 * (len(on_floor) - 1)
        x = left + (width - left - wide) // 2
        for room in on_floor:
            across = columns[room]
            down = -(-len(rooms[room]) // across)
            box = (x, y, across * column + 14, 28 + down * row)
            places[room[1]] = box
            shapes += room_shapes(room[1], rooms[room], box, down)
            x += box[2] + 12
            height = max(height, box[3])
        shapes.append(f'<text class="floor" x="8" y="{y + 18}">{floor}</text>')
        y += height + gap
    arrows = [arrow(places[below], places[above]) for above, below in room_arrows(modules)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" role="img">'
        "<title>Floors and rooms of longva; an arrow says: is used by</title>"
        f"<style>{STYLE}</style>"
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0 0 6 3 0 6z"/></marker></defs>'
    )
    return "\n".join([head, *shapes, *arrows, "</svg>"]) + "\n"


def columns_of(rooms, on_floor):
    """Share the width of a floor among its rooms: columns of modules for each."""
    free = (width - left - 14 - 12 * len(on_floor)) // column
    columns = {room: 1 for room in on_floor}
    while sum(columns.values()) < free - len(on_floor) // 4:
        tallest = max(on_floor, key=lambda room: len(rooms[room]) / columns[room])
        if len(rooms[tallest]) <= 2 * columns[tallest]:
            break
        columns[tallest] += 1
    for room, across in columns.items():
        down = -(-len(rooms[room]) // across)
        columns[room] = -(-len(rooms[room]) // down)
    return columns


def room_shapes(name, modules, box, down):
    x, y, wide, high = box
    yield f'<rect class="room" x="{x}" y="{y}" width="{wide}" height="{high}" rx="6"/>'
    yield f'<text class="name" x="{x + 9}" y="{y + 19}">{name}</text>'
    for place, module in enumerate(modules):
        label = module.name.split(".")[-1]
        across, line = divmod(place, down)
        yield (
            f'<text class="module" x="{x + 9 + across * column}" y="{y + 38 + line * row}">'
            f"{module.number} {label}</text>"
        )


def room_arrows(modules):
    """Pairs of rooms (user, used), those that another pair implies left out."""
    direct = {(m.room, modules[name].room) for m in modules.values() for name in m.imports}
    direct = {(above, below) for above, below in direct if above != below}
    uses = {}
    for above, below in direct:
        uses.setdefault(above, set()).add(below)

    def below_of(room, seen):
        for step in uses.get(room, set()) - seen:
            seen.add(step)
            below_of(step, seen)
        return seen

    plain = []
    for above, below in sorted(direct):
        others = uses[above] - {below}
        if not any(below in below_of(step, set()) for step in others):
            plain.append((above, below))
    return plain


def arrow(below, above):
    x1, y1 = below[0] + below[2] / 2, below[1]
    x2, y2 = above[0] + above[2] / 2, above[1] + above[3]
    curve = f"M{x1:.0f} {y1} C{x1:.0f} {y1 - 16} {x2:.0f} {y2 + 16} {x2:.0f} {y2 + 2}"
    return f'<path class="arrow" marker-end="url(#tip)" d="{curve}"/>'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        found = list(faults(root))
        sys.exit("\n".join(found) if found else 0)
    (root / picture).write_text(draw(read_modules(root)), encoding="utf-8")
    print(f"{picture.as_posix()} is drawn.")


if __name__ == "__main__":
    main()
