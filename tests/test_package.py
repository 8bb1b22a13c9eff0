"What is built is what is here: wheel and sdist hold all modules and files that the package reads; its commands exist."
import ast, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser
from importlib import import_module

import pytest
from project import ROOT, settings

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A copy of what git tracks, built without network and without isolation; folder of the two archives"
    place = tmp_path_factory.mktemp('build')
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split('\0')):
        if name.startswith(('nbs/', 'benchmarks/', 'tests/')) or not (ROOT/name).is_file(): continue
        (place/name).parent.mkdir(parents=True, exist_ok=True)
        (place/name).write_bytes((ROOT/name).read_bytes())
    def build(*command): subprocess.run([sys.executable, *command], cwd=place, check=True, capture_output=True)
    build('setup.py', '-q', 'sdist', '-d', 'dist')
    build('-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', 'dist', '.')
    return place/'dist'

def wanted():
    "Modules and data files of the package"
    files = (p for p in (ROOT/'ches_align').rglob('*') if p.is_file() and p.suffix != '.pyc')
    return {p.relative_to(ROOT).as_posix() for p in files}

def test_wheel(built):
    (wheel,) = built.glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {n for n in names if not n.split('/')[0].endswith('.dist-info')} == wanted()
    meta = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith('/METADATA'))).decode()
    version = settings(ROOT)['version']
    assert f'\nVersion: {version}\n' in meta and import_module('ches_align').__version__ == version
    scripts = ConfigParser(delimiters=['='])
    scripts.read_string(zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith('/entry_points.txt'))).decode())
    assert list(scripts['console_scripts']) == ['ches']
    for target in scripts['console_scripts'].values():
        module, function = target.split(':')
        assert callable(getattr(import_module(module), function))

def test_sdist(built):
    (archive,) = built.glob('*.tar.gz')
    with tarfile.open(archive) as opened:
        names = {n.split('/', 1)[1] for n in opened.getnames() if '/' in n and opened.getmember(n).isfile()}
    beside = {'settings.ini', 'setup.py', 'pyproject.toml', 'constraints.txt', 'README.md', 'LICENSE', 'CHANGELOG.md',
              'CITATION.cff', 'SECURITY.md'}
    assert wanted() <= names and beside <= names
    assert not [n for n in names if n.startswith(('nbs/', 'tests/', '.ci/'))]

def test_what_is_offered_to_editors():
    "The imports for type checkers in `__init__.py` are the names that are resolved on first use, each from its home."
    package = import_module('ches_align')
    (block,) = [node for node in ast.parse((ROOT/'ches_align'/'__init__.py').read_text('utf-8')).body
                if isinstance(node, ast.If)]
    offered = {alias.asname: node.module for node in block.body for alias in node.names}
    assert offered == package._homes and set(offered) <= set(dir(package))
    for name, home in offered.items():
        assert getattr(package, name) is getattr(import_module(f'ches_align.{home}'), name)
