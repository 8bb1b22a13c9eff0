"The checks of the pages, of the structure and of the README, each shown a small project with one planted fault."
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import docs_check
import house
import pytest
import structure_check
import write_readme
from project import directives, notebooks

PNG = ('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==')
SETTINGS = """[DEFAULT]
repo = mini
lib_name = mini
version = 0.0.1
min_python = 3.10
license = apache2
nbs_path = nbs
lib_path = mini
doc_path = _docs
recursive = True
tst_flags = slow
put_version_in_init = True
update_pyproject = False
custom_sidebar = True
clean_ids = False
branch = main
user = mini
doc_host = https://mini.example
doc_baseurl = /mini
git_url = https://example.com/mini/mini
title = mini
author = nobody
author_email = nobody@example.com
description = A small project
"""
QUARTO = """project: {type: website}
format: {html: {css: styles.css, html-math-method: mathml}}
metadata-files: [nbdev.yml, sidebar.yml]
"""
SIDEBAR = """website:
  sidebar:
    contents:
      - index.ipynb
      - section: Part
        contents: [part/01_one.ipynb, part/02_two.ipynb]
"""

def md(*lines): return dict(cell_type='markdown', source='\n'.join(lines))
def py(*lines, outputs=()): return dict(cell_type='code', source='\n'.join(lines), outputs=list(outputs))
def shown(**data):
    data = {k.replace('_', '/'): v for k, v in data.items()}
    return dict(output_type='display_data', metadata={}, data=data)
PICTURE = shown(image_png=PNG, text_plain='<Figure>')

INDEX = [
    md('# mini', '', '> A small project', '', '- order: 0'),
    md('See [one](part/01_one.ipynb#a-step), [`two`](part/02_two.ipynb) and `[no link](part/x.ipynb)`.'),
    py('#| hide', 'secret = 1'),
    py('#| fig-alt: "A dot"', 'from mini.part.one import one', outputs=[PICTURE]),
    py('#| echo: false', 'one()', outputs=[shown(text_markdown='**1** and [two](part/02_two.ipynb)', text_plain='x')]),
    py('print(one())', 'one()', outputs=[dict(output_type='stream', name='stdout', text='1\n'), shown(text_plain='1')]),
    py('#| eval: false', 'one(2)'),
]
ONE = [
    py('#| default_exp part.one'),
    md('# One is one', '', '> The first step', '', '- order: 1'),
    md('## A step', '', 'With $a_1 > 0$, see @eq-one and @fig-dot:', '', '$$ a_1 = \\sum_i b_i $$ {#eq-one}'),
    py('#| export', 'def one(): return 1'),
    py('#| label: fig-dot', '#| fig-alt: "A dot"', 'plot()', outputs=[PICTURE]),
    md('![A dot](dot.png) and the function: [one](#one), [site](https://mini.example/mini/part/two.html#two)'),
]
TWO = [
    py('#| default_exp part.two'),
    md('# Two follows one', '', '> The second step', '', '- order: 2'),
    py('#| export', 'from mini.part.one import one'),
    py('#| export', 'def two(): return 2*one()'),
]

def write(path, cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    out = [dict(id=f'cell{i:02}', metadata={}) | c | (dict(execution_count=None) if c['cell_type'] == 'code' else {})
           for i, c in enumerate(cells)]
    nb = dict(cells=[c | dict(source=c['source'].splitlines(True)) for c in out], nbformat=4, nbformat_minor=5,
              metadata=dict(kernelspec=dict(display_name='python3', language='python', name='python3')))
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')

def nbdev(root, code): subprocess.run([sys.executable, '-c', code], cwd=root, check=True)

@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    "A project without faults, made once"
    root = tmp_path_factory.mktemp('mini')
    for name, text in {'settings.ini': SETTINGS, '_quarto.yml': QUARTO, 'mini/__init__.py': '__version__ = "0.0.1"\n',
                       'nbs/sidebar.yml': SIDEBAR, 'nbs/styles.css': '', 'nbs/part/dot.png': ''}.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text(text)
    (root/'nbs/_quarto.yml').symlink_to('../_quarto.yml')
    for name, cells in {'index': INDEX, 'part/01_one': ONE, 'part/02_two': TWO}.items():
        write(root/f'nbs/{name}.ipynb', cells)
    nbdev(root, 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    return root

@pytest.fixture
def mini(sound, tmp_path):
    root = tmp_path/'mini'
    shutil.copytree(sound, root, symlinks=True)
    return SimpleNamespace(root=root, one=lambda *more: write(root/'nbs/part/01_one.ipynb', [*ONE, *more]),
                           two=lambda *more: write(root/'nbs/part/02_two.ipynb', [*TWO, *more]))

def expect(faults, where, what):
    assert len(faults) == 1, faults
    assert faults[0].startswith(where) and what in faults[0]

def test_sound_project_has_no_faults_and_stays_as_it_is(mini):
    before = {p: p.read_bytes() for p in mini.root.rglob('*') if p.is_file()}
    assert docs_check.check(mini.root) == []
    assert structure_check.check(mini.root) == []
    assert before == {p: p.read_bytes() for p in mini.root.rglob('*') if p.is_file()}

@pytest.mark.parametrize('cell, what', [
    (md(r'Take $\frac{a}{$.'), 'no MathML'),
    (md(r'Take $\nosuchcommand{a}$.'), 'no MathML'),
    (md(r'A formula $ a_2 $ that is none.'), 'no MathML'),
    (md(r'\begin{align} a &= b \end{align}'), 'no MathML'),
    (md('[gone](gone.ipynb)'), 'gone.ipynb: no such file'),
    (md('[out](../../settings.ini)'), 'not on the site'),
    (md('[lost](02_two.ipynb#nowhere)'), 'no anchor #nowhere'),
    (md('[page](https://mini.example/mini/part/three.html)'), 'no such page'),
    (md('[file](https://example.com/mini/mini/blob/main/gone.py)'), 'no such file in the repository'),
    (md('![A dot](gone.png)'), 'image gone.png: no such file'),
    (md('![](dot.png)'), 'no alternative text'),
    (md('See @eq-two.'), '@eq-two has no target'),
    (md('See @fig-two.'), '@fig-two has no target'),
    (md('# Another title'), 'a second title'),
    (py('plot()', outputs=[PICTURE]), 'without #| fig-alt:'),
    (py('#| label: fig-none', '#| fig-alt: "Nothing"', 'plot()'), 'fig-none has no stored image'),
    (py('#| slow', 'import os', 'os.listdir()'), 'runs when the pages are made'),
    (py('1/0', outputs=[dict(output_type='error', ename='ZeroDivisionError', evalue='', traceback=[])]),
     'stored error'),
])
def test_docs_check_finds(mini, cell, what):
    mini.one(cell)
    expect(docs_check.check_cells(mini.root), f'nbs/part/01_one.ipynb: cell {len(ONE)}: ', what)

@pytest.mark.parametrize('cell, name', [
    (md('$$ c = d $$ {#eq-one}'), 'eq-one'),
    (py('#| label: fig-dot', '#| fig-alt: "A dot"', 'plot()', outputs=[PICTURE]), 'fig-dot'),
])
def test_docs_check_finds_both_places_of_a_label(mini, cell, name):
    mini.one(cell)
    faults = docs_check.check_cells(mini.root)
    assert len(faults) == 2 and all(f'label {name} stands 2 times' in f for f in faults), faults

@pytest.mark.parametrize('lines, what', [
    (['One is one'], 'no title'), (['# One is one'], 'no one-sentence quote'),
    (['# One is one', '> The first step', 'A sentence that nbdev drops'], 'lost on the page: A sentence'),
])
def test_docs_check_reads_title_cells(mini, lines, what):
    write(mini.root/'nbs/part/01_one.ipynb', [ONE[0], md(*lines), *ONE[2:]])
    expect(docs_check.check_cells(mini.root), 'nbs/part/01_one.ipynb: cell 1: ', what)

def test_docs_check_compares_sidebar_and_notebooks(mini):
    bar = mini.root/'nbs/sidebar.yml'
    bar.write_text(SIDEBAR.replace('part/02_two.ipynb', 'part/03_three.ipynb, part/01_one.ipynb'))
    faults = docs_check.sidebar(docs_check.Site(mini.root))
    assert [f.removeprefix('nbs/sidebar.yml: ') for f in faults] == [
        'part/03_three.ipynb does not exist', 'part/02_two.ipynb is not listed', 'part/01_one.ipynb is listed 2 times']

def test_docs_check_makes_the_pages(mini):
    mini.one(py('import os', 'os.no_such_thing'))
    expect(docs_check.build(mini.root), 'nbdev cannot make the pages', 'os.no_such_thing')
    mini.one()
    (mini.root/'nbs/styles.css').unlink()
    expect(docs_check.build(mini.root), '_quarto.yml', 'styles.css does not exist')

@pytest.mark.parametrize('source, what', [
    ('from mini.part.two import two', 'imports part.two (2), which is not before it'),
    ('def later():\n    import mini.part.two\n    return two', 'imports part.two (2)'),
    ('from mini.part import two', 'imports part.two (2)'),
    ('from mini.part.one import one', 'imports part.one (1), which is not before it'),
    ('from os.path import *', 'star import'),
    ('from mini import two', 'which no notebook exports'),
    ('def broken(:', 'invalid syntax'),
])
def test_structure_check_reads_imports(mini, source, what):
    mini.one(py('#| export', source))
    expect(structure_check.numbering(mini.root), f'nbs/part/01_one.ipynb: cell {len(ONE)}: ', what)

def test_structure_check_reads_names_and_numbers(mini):
    write(mini.root/'nbs/part/02_three.ipynb', [py('#| default_exp part.one'), *TWO[1:2], py('#| export', 'x = 1')])
    faults = '\n'.join(structure_check.numbering(mini.root))
    for what in ('exports to part.one, its name says part.three', 'exports to part.one as nbs/part/01_one.ipynb does',
                 'number 2 is taken by'): assert what in faults

def test_structure_check_finds_places_on_a_machine(mini):
    record = mini.root/'nbs/part/records/run.json'
    record.parent.mkdir()
    record.write_text('{"model": "smollm2-135m",\n "data": "data/pairs.jsonl"}')
    assert structure_check.places(mini.root) == []
    record.write_text('{"model": "smollm2-135m",\n "data": "/home/me/pairs.jsonl"}')
    expect(structure_check.places(mini.root), 'nbs/part/records/run.json:2', '/home/me/pairs.jsonl')

def test_structure_check_compares_with_a_fresh_export(mini):
    module = mini.root/'mini/part/two.py'
    text = module.read_text()
    module.write_text(text.replace('2*one()', '3*one()'))
    expect(structure_check.unchanged(mini.root), 'mini/part/two.py', 'nbdev_export was not run')
    module.write_text(text)
    (mini.root/'mini/part/old.py').write_text(text.replace('02_two', '03_old'))
    assert any('old.py: no notebook exports it' in f for f in structure_check.unchanged(mini.root))

def test_structure_check_wants_clean_notebooks(mini):
    path = mini.root/'nbs/part/01_one.ipynb'
    path.write_text(path.read_text().replace('"execution_count": null', '"execution_count": 3', 1))
    expect(structure_check.unchanged(mini.root), 'nbs/part/01_one.ipynb', 'nbdev_clean changes it')

def test_structure_check_tells_a_notebook_variable_from_a_shape(mini):
    (mini.root/'mini/part/two.py').write_text(
        'from jaxtyping import Float\nfrom torch import Tensor\n'
        'def f(x: Float[Tensor, "batch"], y: Float[Tensor, "batch len"]): return x + y + gen\n')
    expect(structure_check.lint(mini.root), 'mini/part/two.py:3', 'F821 Undefined name `gen`')

PACKED = {  # a file, its text, what it is refused for
    'assignment': ('tests/test_x.py', 'one, two = [1], {}\n', '1: packed assignment: one, two = ([1], {})'),
    'line': ('.ci/x.py', 'start(); stop()\n', '1: several statements on a line'),
    'try': ('benchmarks/x.py', 'try: start()\nfinally:\n    stop()\n', '1: `try:` with its statement on the line'),
    'lambda': ('tests/test_x.py', 'key = lambda row: 1 if row else 2\n', '1: conditional lambda'),
    'letter': ('mini/part/x.py', 'def rows():\n    for r in open("x"): yield r\n', '2: one letter: r'),
    'vague': ('mini/part/x.py', 'found = 1\n', '1: says nothing: found'),
    'cell': ('mini/part/x.py', '# %% ../nbs/x.ipynb #one\n' + 'one = 1\n'*41, '1: a cell of 41 lines'),
}

@pytest.mark.parametrize('name', PACKED)
def test_packed_code_is_named(mini, name):
    path, text, fault = PACKED[name]
    (mini.root/path).parent.mkdir(exist_ok=True)
    (mini.root/path).write_text(text)
    assert house.density(mini.root) == [f'{path}:{fault}']

def test_structure_check_refuses_packed_code(mini):
    for name in ('assignment', 'line'):
        path, text, _ = PACKED[name]
        (mini.root/path).parent.mkdir(exist_ok=True)
        (mini.root/path).write_text(text)
    faults = structure_check.check(mini.root)
    assert faults == ['tests/test_x.py:1: packed assignment: one, two = ([1], {})',
                      '.ci/x.py:1: several statements on a line']

def test_structure_check_refuses_packed_cells_of_pages(mini):
    mini.two(py('one = 1; two = 2'))
    faults = [fault for fault in structure_check.check(mini.root) if 'several statements' in fault]
    expect(faults, 'nbs/part/02_two.ipynb: cell ', 'line 1: several statements on a line')

PLAIN = {
    'index': ('tests/test_x.py', 'for i, row in enumerate("ab"): print(i, row)\n'),
    'swap': ('tests/test_x.py', 'one = two = 1\none, two = two, one + two\n'),
    'symbol of an equation': ('mini/theory/x.py', 'h = 1\n'),
    'cell': ('mini/part/x.py', '# %% ../nbs/x.ipynb #one\n' + 'one = 1\n'*40),
}

@pytest.mark.parametrize('name', PLAIN)
def test_plain_code_is_left_alone(mini, name):
    path, text = PLAIN[name]
    (mini.root/path).parent.mkdir(exist_ok=True)
    (mini.root/path).write_text(text)
    assert house.density(mini.root) == []

def test_readme(mini):
    root = mini.root
    assert write_readme.main(root, check=True) == 1 and not (root/'README.md').exists()
    assert write_readme.main(root, check=False) == 0
    text = (root/'README.md').read_text()
    assert text == f"""{write_readme.HEAD}

# mini

> A small project

See [one](nbs/part/01_one.ipynb#a-step), [`two`](nbs/part/02_two.ipynb) and `[no link](part/x.ipynb)`.

```python
from mini.part.one import one
```

![A dot](nbs/images/readme_cell03.png)

**1** and [two](nbs/part/02_two.ipynb)

```python
print(one())
one()
```

```
1
1
```

```python
one(2)
```
"""
    assert (root/'nbs/images/readme_cell03.png').read_bytes().startswith(b'\x89PNG')
    assert write_readme.changes(root) == {} and write_readme.main(root, check=True) == 0
    (root/'nbs/images/readme_gone.png').write_bytes(b'')
    assert write_readme.main(root, check=True) == 1
    write_readme.main(root, check=False)
    assert not (root/'nbs/images/readme_gone.png').exists()

def test_directives_and_names(mini):
    text = '#| label: fig-a\n#| fig-alt: >\n#|   A long\n#|   text\n#|slow\nx = 1\n#| hide'
    assert directives(text) == {'label': 'fig-a', 'fig-alt': 'A long text', 'slow': ''}
    (mini.root/'nbs/_draft.ipynb').write_text('{}')
    assert [p.name for p in notebooks(mini.root)] == ['index.ipynb', '01_one.ipynb', '02_two.ipynb']
