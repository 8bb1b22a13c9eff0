"""Measures the house, and finds packed code; `structure_check.py` refuses it.

    python .ci/house.py                 modules, exported lines, public names, packed statements, duplicates ...
    python .ci/house.py --list [PATHS]  what breaks the rule on density, a line each

The rule: one statement on a line in `try`, `except` and `finally`; no packed assignments of unrelated values; no
conditional lambdas; nothing reached through `__globals__`; at most eight positional parameters; local names are words,
but for the indices i, j, k and, in `theory`, the symbols of the equations; exported cells of at most 40 lines.
"""
import argparse, ast, configparser, re
from collections import defaultdict
from pathlib import Path
from typing import Iterable, Iterator

from project import EXPORT, ROOT, cells, notebooks, settings

INDICES = {'i', 'j', 'k', '_'}
VAGUE = {'made', 'found', 'said', 'told'}
LONGEST = 40 # lines of an exported cell
WINDOW = 6   # equal lines in a row that count as a duplicate
Fault = tuple[int, str]

def needs_both(targets: list[ast.expr], values: list[ast.expr]) -> bool:
    "Whether two lines could not say it, as in `a, b = b, a + b`: a later value uses what an earlier target had"
    used = [{ast.unparse(node) for node in ast.walk(value) if isinstance(node, ast.expr)} for value in values]
    return any(ast.unparse(target) in later for i, target in enumerate(targets) for later in used[i + 1:])

def packed(tree: ast.AST) -> Iterator[Fault]:
    "Statements that hold more than one"
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            yield from packed_try(node)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and not needs_both(target.elts, node.value.elts):
                yield node.lineno, f'packed assignment: {ast.unparse(node)[:60]}'
        if isinstance(node, ast.IfExp) and any(isinstance(part, ast.Lambda) for part in (node.body, node.orelse)):
            yield node.lineno, 'conditional lambda'
        if isinstance(node, ast.Lambda) and isinstance(node.body, ast.IfExp):
            yield node.lineno, 'conditional lambda'
        if isinstance(node, ast.Attribute) and node.attr == '__globals__':
            yield node.lineno, 'reaches into __globals__'
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)) and len(node.generators) > 1:
            if any(isinstance(part, ast.NamedExpr) for part in ast.walk(node)):
                yield node.lineno, 'comprehension of two loops with a walrus'
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            count = len(node.args.posonlyargs) + len(node.args.args)
            if count > 8: yield node.lineno, f'{node.name}: {count} positional parameters'
        for name in ('body', 'orelse', 'finalbody'):
            lines = [part.lineno for part in getattr(node, name, None) or [] if isinstance(part, ast.stmt)] \
                if isinstance(getattr(node, name, None), list) else []
            for line in lines[1:]:
                if lines.count(line) > 1:
                    yield line, 'several statements on a line'
                    break

def packed_try(node: ast.Try) -> Iterator[Fault]:
    "Parts of a `try` that stand on its keyword's line"
    if node.body[0].lineno == node.lineno: yield node.lineno, '`try:` with its statement on the line'
    for handler in node.handlers:
        if handler.body[0].lineno == handler.lineno: yield handler.lineno, '`except:` with its statement on the line'
    for part in (node.orelse, node.finalbody):
        before = (node.handlers[-1] if node.handlers else node.body[-1]).end_lineno
        if part and part[0].col_offset > node.col_offset + 4 and part[0].lineno > before:
            yield part[0].lineno, '`else:` or `finally:` with its statement on the line'

def bound(tree: ast.AST) -> Iterator[tuple[int, str]]:
    "Names that statements bind: assignments, loops, `with`, `except` and parameters; not those of comprehensions"
    inner = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, inner): continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.lineno, node.id
        if isinstance(node, ast.ExceptHandler) and node.name: yield node.lineno, node.name
        if isinstance(node, ast.arg): yield node.lineno, node.arg
        stack += ast.iter_child_nodes(node)

def fields(tree: ast.AST) -> set[tuple[int, str]]:
    "Fields of classes: not local, and some are another library's, as PEFT's `r`"
    return {(part.lineno, part.target.id) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
            for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)}

def vague(tree: ast.AST) -> Iterator[Fault]:
    "Local names that are no words, or words that say nothing"
    public = fields(tree)
    for line, name in bound(tree):
        if (line, name) in public: continue
        if len(name) == 1 and name not in INDICES: yield line, f'one letter: {name}'
        if name in VAGUE: yield line, f'says nothing: {name}'

def faults(path: Path, root: Path) -> list[Fault]:
    "What breaks the rule in a file, by line; ruff names a file that is no Python"
    try:
        tree = ast.parse(path.read_text('utf-8'))
    except SyntaxError:
        return []
    where = path.relative_to(root).parts
    names = [] if 'theory' in where else vague(tree)
    return sorted([*packed(tree), *names])

def sources(root: Path) -> list[Path]:
    "Modules, tests, checks and benchmarks"
    parts = settings(root)['lib_path'], 'tests', '.ci', 'benchmarks'
    return [path for part in parts for path in sorted((root/part).rglob('*.py')) if path.name != '_modidx.py']

CELL = re.compile(r'^# %% .*#[\w-]+$', re.M)

def long_cells(path: Path) -> Iterator[Fault]:
    "Exported cells of more than `LONGEST` lines"
    text = path.read_text('utf-8')
    marks = [*CELL.finditer(text)]
    for mark, after in zip(marks, [*marks[1:], None]):
        count = len(text[mark.end():after.start() if after else None].strip().splitlines())
        if count > LONGEST: yield text.count('\n', 0, mark.start()) + 1, f'a cell of {count} lines'

def density(root: Path, inside: Iterable[Path] = ()) -> list[str]:
    "What breaks the rule, a line each; `inside`: only in these files and folders"
    def is_asked(path: Path) -> bool: return not inside or any(path.is_relative_to(part) for part in inside)
    modules = [f'{path.relative_to(root)}:{line}: {why}' for path in filter(is_asked, sources(root))
               for line, why in [*faults(path, root), *long_cells(path)]]
    pages = [f'{path.relative_to(root)}: cell {i}: line {line}: {why}' for path in filter(is_asked, notebooks(root))
             for i, line, why in packed_cells(path)]
    return modules + pages

def packed_cells(path: Path) -> Iterator[tuple[int, int, str]]:
    "Packed statements of a page's own cells; those that are exported are looked at in their module"
    for i, cell in enumerate(cells(path)):
        if cell.cell_type != 'code' or EXPORT & set(cell.marks): continue
        try:
            tree = ast.parse(cell.source)
        except SyntaxError:
            continue  # a shell line, or what the run of the page tells
        for line, why in packed(tree): yield i, line, why

def duplicates(paths: list[Path]) -> int:
    "Pairs of places that share `WINDOW` equal lines of code or more, each pair once however long"
    places = defaultdict(list)
    runs = set()
    for path in paths:
        lines = [line.strip() for line in path.read_text('utf-8').splitlines()]
        lines = [line for line in lines if line and not line.startswith(('#', 'import ', 'from ', ')', '@'))]
        for start in range(len(lines) - WINDOW + 1):
            places[tuple(lines[start:start + WINDOW])].append((str(path), start))
    for same in places.values():
        for i, (one, at) in enumerate(same):
            runs |= {(one, at, other, there) for other, there in same[i + 1:]}
    return sum((one, at - 1, other, there - 1) not in runs for one, at, other, there in runs)

def public_names(path: Path) -> int:
    "Names in the `__all__` of a module"
    for node in ast.parse(path.read_text('utf-8')).body:
        is_list = isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        if is_list and ast.unparse(node.targets[0]) == '__all__': return len(node.value.elts)
    return 0

def table(root: Path) -> list[tuple[str, int]]:
    "The measures of the house"
    modules = [path for path in sources(root) if path.is_relative_to(root/'ches_align') and path.name != '__init__.py']
    counts = defaultdict(int)
    for path in modules:
        tree = ast.parse(path.read_text('utf-8'))
        lines = path.read_text('utf-8').splitlines()
        counts['exported lines'] += sum(bool(line.strip()) and not line.startswith('#') for line in lines)
        counts['public names'] += public_names(path)
        counts['bound names'] += sum(1 for _ in bound(tree))
        counts['one-letter names'] += sum(len(name) == 1 and name not in INDICES for _, name in bound(tree))
        counts['vague names'] += sum(name in VAGUE for _, name in bound(tree))
        counts['packed statements'] += sum(1 for _ in packed(tree))
        counts['cells over 40 lines'] += sum(1 for _ in long_cells(path))
        counts['modules over 350 lines'] += len(lines) > 350
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    commands = len(config['DEFAULT'].get('console_scripts', '').split())
    return [('modules', len(modules)), *counts.items(), ('duplicate pairs', duplicates(sources(root))),
            ('console scripts', commands)]

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--list', nargs='*', metavar='PATH', help='faults of these files or folders; none: of all')
    chosen = parser.parse_args().list
    if chosen is None:
        for name, value in table(ROOT): print(f'{value:7,}  {name}')
        return
    for line in density(ROOT, [Path(part).resolve() for part in chosen]): print(line)

if __name__ == '__main__': main()
