"""Which lines of the exported modules do the notebooks' checks and the tests reach?

    python .ci/coverage_run.py [--least 90] [--notebooks] [--out benchmarks/records/coverage.json]

A notebook defines its exported functions itself, so a plain run would measure nothing of the module. Here the exported
cells give way to the module's own names: every check of the notebook then meets the installed module. The commands'
processes are not measured, the functions that they call are. Needs the `coverage` package; takes as long as the tests.
"""
import argparse, json, os, platform, re, subprocess, sys
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ['TQDM_DISABLE'] = os.environ['IN_TEST'] = '1'

from run_notebooks import FLAGS, ROOT, directives, notebooks

GIVE = ("import importlib as _importlib\n"
        "globals().update({{k: v for k, v in vars(_importlib.import_module('ches_align.{0}')).items() "
        "if not k.startswith('__')}})")

def run(path: Path) -> str:
    "Execute a notebook's checks against its module, measured; what went wrong, or nothing"
    import coverage
    cov = coverage.Coverage(data_file=str(ROOT/'.coverage'), data_suffix=True, source=['ches_align'])
    cov.start()
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    os.chdir(path.parent)
    shell = CaptureShell()
    module = None
    try:
        for cell in read_nb(path).cells:
            if cell.cell_type != 'code': continue
            marks, off = directives(cell.source)
            if named := re.match(r'#\| *default_exp (\S+)', cell.source): module = named[1]
            if off or FLAGS & marks or 'nbdev_export(' in cell.source: continue
            shell.run(GIVE.format(module) if marks & {'export', 'exporti'} else cell.source)
            if shell.exc: return f'{path.relative_to(ROOT)}: {shell.exc!r}'
    finally:
        cov.stop()
        cov.save()
    return ''

def record(out: Path, notebooks_only: bool, failed: list[str]) -> None:
    process = subprocess.run([sys.executable, '-m', 'coverage', 'json', '-q', '-o', '-'], cwd=ROOT, capture_output=True)
    report = json.loads(process.stdout)
    def numbers(summary): return {k: summary[k] for k in ('num_statements', 'missing_lines')}
    modules = {name: numbers(f['summary']) for name, f in report['files'].items() if not name.endswith('_modidx.py')}
    total = {k: sum(m[k] for m in modules.values()) for k in ('num_statements', 'missing_lines')}
    out.write_text(json.dumps(dict(
        config=dict(notebooks_only=notebooks_only, flags=[]), versions=dict(python=platform.python_version(),
        coverage=report['meta']['version']), total=total, failed=failed, modules=modules), indent=1) + '\n')

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--least', type=float, default=0, help='fail below this share of lines, in percent')
    ap.add_argument('--notebooks', action='store_true', help='without the tests')
    ap.add_argument('--out', help='a file for the record: statements, how many are missed, by module')
    args = ap.parse_args()
    def measure(*command): return subprocess.run([sys.executable, '-m', 'coverage', *command], cwd=ROOT).returncode
    measure('erase')
    with get_context('spawn').Pool(2, maxtasksperchild=1) as pool:
        failed = [x for x in pool.map(run, notebooks(), 1) if x]
    if not args.notebooks:
        measure('run', '--parallel-mode', '--source=ches_align', '-m', 'pytest', '-q',
                '--ignore=tests/test_notebooks.py')
    measure('combine', '--quiet')
    print(*failed, sep='\n')
    if args.out: record(Path(args.out), args.notebooks, failed)
    sys.exit(bool(failed) or measure('report', '--skip-covered', '--sort=cover', f'--fail-under={args.least}'))
