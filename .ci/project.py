"What the checks share: settings, notebooks, directives, and a scratch copy of the project to run nbdev in."
import os, re, shutil, subprocess, sys, tempfile
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from execnb.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
EXPORT = {'export', 'exports', 'exporti'}

def settings(root: Path) -> dict[str, str]:
    config = ConfigParser(delimiters=['='])
    config.read(root/'settings.ini', encoding='utf-8')
    return dict(config['DEFAULT'])

def notebooks(root: Path) -> list[Path]:
    "The notebooks nbdev sees, in reading order"
    nbs = root/'nbs'
    return sorted(p for p in nbs.rglob('*.ipynb') if not any(q[0] in '_.' for q in p.relative_to(nbs).parts))

def directives(source: str) -> dict[str, str]:
    "The `#|` lines at the top of a cell; a deeper indented line goes on with the value before it."
    marks: dict[str, str] = {}
    for line in source.splitlines():
        if not line.strip(): continue
        if not (match := re.match(r'#\|(\s*)([\w-]+)?:?\s*(.*)', line)): break
        if len(match[1]) > 2 and marks:
            last = list(marks)[-1]
            marks[last] = f'{marks[last]} {line[2:].strip()}'.lstrip('>| ')
        elif match[2]: marks[match[2]] = match[3].strip().strip('"\'')
    return marks

def cells(path: Path) -> list:
    "A notebook's cells, each with its directives and output data at hand"
    out = read_nb(path).cells
    for cell in out:
        cell.marks = directives(cell.source) if cell.cell_type == 'code' else {}
        cell.shown = [o.get('data', {}) for o in cell.get('outputs', [])]
    return out

def hidden(cell) -> bool:
    "Does nbdev leave the whole cell out of its page?"
    return bool({'hide', 'export', 'exporti', 'default_exp'} & set(cell.marks)) or cell.marks.get('include') == 'false'

def has_image(cell) -> bool: return any(kind.startswith('image/') for data in cell.shown for kind in data)

@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    "A copy of what nbdev reads and writes, so that a check leaves the working tree as it is"
    lib = settings(root)['lib_path']
    ignore = shutil.ignore_patterns('__pycache__', '.*')
    with tempfile.TemporaryDirectory() as tmp:
        for name in ('settings.ini', '_quarto.yml'): shutil.copy(root/name, tmp)
        for name in ('nbs', lib): shutil.copytree(root/name, Path(tmp)/name, symlinks=True, ignore=ignore)
        yield Path(tmp)

def python(code: str, where: Path) -> subprocess.CompletedProcess:
    "Run `code` in `where`. With IN_TEST set, nbdev's export would do nothing, in silence."
    env = os.environ | dict(MPLBACKEND='agg', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
    env.pop('IN_TEST', None)
    return subprocess.run([sys.executable, '-c', code], cwd=where, env=env, capture_output=True, text=True)

def tell(faults: list[str], what: str) -> None:
    "Print the faults and end with exit code 1, or one line"
    print(*(faults or [f'{what}: no faults']), sep='\n')
    sys.exit(bool(faults))
