"""Checks how notebooks and modules hang together.

    python .ci/structure_check.py

A notebook `nbs/PART/NNN_name.ipynb` exports to `PART/name.py`; its exported cells import only from smaller numbers,
name by name. Every notebook's title stands in a chapter of README.md. `nbdev_clean` and `nbdev_export` would change
nothing, every module comes from a notebook, and ruff finds no undefined name: a function that reads a notebook's
variable passes in the notebook and fails in its module.
No check compares by `zip`, compares a thing with itself, or accepts any error (`evidence.py`). Modules, tests, checks
and benchmarks hold no packed code, no names that are no words and no long cells (`house.py`). Records and
configurations name no folder of a machine.
"""
import ast, json, re, subprocess, sys
from collections import defaultdict
from pathlib import Path

from evidence import blind_checks
from house import density
from project import EXPORT, ROOT, cells, notebooks, python, scratch, settings, tell

def default_exp(path: Path) -> str | None:
    return next((c.marks['default_exp'] for c in cells(path) if 'default_exp' in c.marks), None)

def title(path: Path) -> str:
    return next((c.source.splitlines()[0].removeprefix('# ') for c in cells(path) if c.source.startswith('# ')), '')

def number(path: Path) -> int | None: return int(match[1]) if (match := re.match(r'(\d+)_', path.name)) else None

def imported(tree: ast.AST, modules: set[str], lib: str) -> list[str]:
    "The package's own modules that a piece of code imports; '*' for a star, '' for the package itself"
    own = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            own += [a.name.partition('.')[2] for a in node.names if a.name.split('.')[0] == lib]
        elif isinstance(node, ast.ImportFrom):
            own += ['*' for a in node.names if a.name == '*']
            if node.level or (node.module or '').split('.')[0] != lib: continue
            base = node.module.partition('.')[2]
            inner = [f'{base}.{a.name}'.lstrip('.') for a in node.names]
            public = any(a.name[0] not in '_*' for a in node.names)
            own += [m for m in inner if m in modules] or [base] * public
    return own

def numbering(root: Path) -> list[str]:
    "Names, numbers and imports of the notebooks"
    faults = []
    homes = defaultdict(list)
    numbers = defaultdict(list)
    lib = settings(root)['lib_name']
    for path in notebooks(root):
        rel = path.relative_to(root)
        if (order := number(path)) is not None: numbers[order].append(rel)
        if not (name := default_exp(path)): continue
        homes[name].append(path)
        parts = path.relative_to(root/'nbs').with_suffix('').parts
        want = '.'.join([*parts[:-1], re.sub(r'^\d+_', '', parts[-1])])
        if name != want: faults.append(f'{rel}: exports to {name}, its name says {want}')
        if order is None: faults.append(f'{rel}: exports, but has no number')
    faults += [f'{b}: number {order} is taken by {a}' for order, (a, *more) in numbers.items() for b in more]
    faults += [f'{b.relative_to(root)}: exports to {name} as {a.relative_to(root)} does'
               for name, (a, *more) in homes.items() for b in more]
    front = (root/'README.md').read_text('utf-8') if (root/'README.md').exists() else None
    faults += [f'{p.relative_to(root)}: no chapter of README.md has its title; run nbs/index.ipynb, make readme'
               for p in notebooks(root) if front is not None and number(p) and title(p) not in front]
    rank = {name: number(paths[0]) for name, paths in homes.items()}
    for path in notebooks(root):
        for i, cell in enumerate(cells(path)):
            long = [line for line in cell.source.splitlines() if len(line) > 120 and not line.startswith('#|')]
            if long and cell.cell_type == 'code':
                faults.append(f'{path.relative_to(root)}: cell {i}: a line over 120 characters: {long[0].strip()[:60]}')
            if not EXPORT & set(cell.marks): continue
            where = f'{path.relative_to(root)}: cell {i}'
            try:
                tree = ast.parse(cell.source)
            except SyntaxError as error:
                faults.append(f'{where}: {error.msg}')
                continue
            for module in imported(tree, set(rank), lib):
                if module == '*': faults.append(f'{where}: star import')
                elif module not in rank: faults.append(f'{where}: imports {lib}.{module}, which no notebook exports')
                elif (number(path) or 0) <= (rank[module] or 0):
                    faults.append(f'{where}: imports {module} ({rank[module]}), which is not before it')
    return faults

def contents(root: Path) -> dict[str, bytes]:
    files = [*notebooks(root), *(root/settings(root)['lib_path']).rglob('*.py')]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}

def unchanged(root: Path) -> list[str]:
    "`nbdev_clean` and `nbdev_export` must leave everything as it is: tried in a copy without the generated modules."
    before = contents(root)
    faults = []
    with scratch(root) as tmp:
        run = python('from nbdev.clean import nbdev_clean; nbdev_clean()', tmp)
        if run.returncode: return [f'nbdev_clean fails: {run.stderr.strip()[-500:]}']
        after = contents(tmp)
        faults += [f'{name}: nbdev_clean changes it' for name in before
                   if name.endswith('.ipynb') and before[name] != after[name]]
        for name, text in before.items():
            if name.endswith('.py') and b'# AUTOGENERATED! DO NOT EDIT!' in text: (tmp/name).unlink()
        run = python('from nbdev.doclinks import nbdev_export; nbdev_export()', tmp)
        if run.returncode: return faults + [f'nbdev_export fails: {run.stderr.strip()[-500:]}']
        after = contents(tmp)
    modules = {name for name in before | after if name.endswith('.py')}
    faults += [f'{name}: no notebook exports it' for name in sorted(modules - set(after))]
    faults += [f'{name}: nbdev_export was not run' for name in sorted(modules & set(after))
               if before.get(name) != after[name]]
    return faults

# Ruff takes a shape of one axis, as in Float[Tensor, "batch"], for the name of a type.
SHAPE = re.compile(r'\[[\w. |]+, *["\'][^"\']*$')

def lint(root: Path) -> list[str]:
    "Undefined names, unused imports and syntax errors of the modules"
    command = 'ruff check --isolated --no-cache --select F,E9 --ignore F722 --output-format json'.split()
    command = [sys.executable, '-m', *command, settings(root)['lib_path']]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if run.returncode > 1 or not run.stdout: return [f'ruff fails: {run.stderr.strip()}']
    faults = []
    for fault in json.loads(run.stdout):
        path = Path(fault['filename'])
        at = fault['location']
        lines = path.read_text(encoding='utf-8').splitlines()
        if fault['code'] == 'F821' and SHAPE.search(lines[at['row']-1][:at['column']-1]): continue
        faults.append(f"{path.relative_to(root.resolve())}:{at['row']}: {fault['code']} {fault['message']}")
    return faults

def blind(root: Path) -> list[str]:
    "Checks of notebooks and tests that pass whatever the code does"
    sources = [(f'{path.relative_to(root)}: cell {i}', cell.source) for path in notebooks(root)
               for i, cell in enumerate(cells(path)) if cell.cell_type == 'code' and not cell.source.startswith('%')]
    sources += [(str(path.relative_to(root)), path.read_text('utf-8')) for path in sorted((root/'tests').glob('*.py'))]
    faults = []
    for where, source in sources:
        try:
            named = blind_checks(ast.parse(source))
        except SyntaxError:
            continue  # `numbering` and the run of the notebook tell
        faults += [f'{where}: line {line}: {why}' for line, why in named]
    return faults

# A record is read on other machines: its folders are not there, and nobody's business.
PLACE = re.compile(r'(?<![\w.<])(?:~|/(?:tmp|home|root|work|mnt|scratch|Users|private|var))/[\w.-][^"\'\s]*')

def places(root: Path) -> list[str]:
    "Absolute paths of a machine in records and configurations"
    faults = []
    for path in sorted(path for name in ('nbs', 'benchmarks', 'configs') for path in (root/name).rglob('*')):
        if path.suffix not in ('.json', '.jsonl', '.yaml', '.yml'): continue
        if 'runs' in path.relative_to(root).parts: continue
        for number, line in enumerate(path.read_text('utf-8').splitlines(), 1):
            if match := PLACE.search(line):
                faults.append(f'{path.relative_to(root)}:{number}: {match[0]}, on a machine')
    return faults

def check(root: Path) -> list[str]:
    return numbering(root) + blind(root) + density(root) + unchanged(root) + lint(root) + places(root)

if __name__ == '__main__': tell(check(ROOT), 'structure')
