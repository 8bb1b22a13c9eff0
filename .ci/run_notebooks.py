"""Executes notebooks and stores their outputs, the way the pages show them.

    python .ci/run_notebooks.py [--flags "slow hub"] [--check] [NOTEBOOK ...]

Cells that carry a flag of settings.ini's `tst_flags` keep their stored output unless the flag is named.
`--check` writes nothing and fails where a fresh run prints something else than what is stored.
"""
import argparse, os, sys, time
from configparser import ConfigParser
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('TQDM_DISABLE', '1')   # a bar's timing would differ in every run
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ['IN_TEST'] = '1'

from evidence import install
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory

ROOT = Path(__file__).resolve().parent.parent
config = ConfigParser(delimiters=['='])
config.read(ROOT/'settings.ini')
FLAGS = set(config['DEFAULT']['tst_flags'].split())

def notebooks():
    return sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(q.startswith(('_', '.')) for q in p.parts))

def directives(source):
    lines = [l[2:].strip() for l in source.splitlines() if l.startswith('#|')]
    return {l.split()[0].rstrip(':') for l in lines if l}, any(l.replace(' ', '') == 'eval:false' for l in lines)

def visible(outputs):
    "What a reader sees, without execution counts and metadata."
    return [{k: v for k, v in o.items() if k in ('data', 'text', 'output_type', 'name')} for o in outputs]

def run(path, flags, check):
    nb = read_nb(path)
    shell = install(CaptureShell)(path, mpl_format='png')
    stale = []
    with working_directory(path.parent):
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != 'code': continue
            marks, off = directives(cell.source)
            if off or (marks & FLAGS) - flags or 'nbdev_export(' in cell.source: continue
            shell._cell_idx = i + 1  # for prettytb
            before = visible(cell.get('outputs', []))
            cell.outputs = [output for output in shell.run(cell.source) if output.get('name') != 'stderr']
            if shell.exc:
                raise SystemExit(f'{path.relative_to(ROOT)}: cell {i} failed\n{shell.prettytb(fname=path)}')
            cell.execution_count = None
            for output in cell.outputs:
                if 'execution_count' in output: output['execution_count'] = None
            if before != visible(cell.outputs): stale.append(i)
    if not check: write_nb(nb, path)
    return stale

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('paths', nargs='*', type=Path)
    ap.add_argument('--flags', default='')
    ap.add_argument('--check', action='store_true')
    args = ap.parse_args()
    bad = 0
    for path in args.paths or notebooks():
        start = time.time()
        stale = run(path.resolve(), set(args.flags.split()), args.check)
        bad += bool(stale)
        other = f', other output in cells {stale}' if stale else ''
        print(f'{path.resolve().relative_to(ROOT)}: {time.time()-start:.1f} s{other}', flush=True)
    sys.exit(bool(args.check and bad))
