"""Checks the pages without Quarto, which only warns where this fails.

    python .ci/docs_check.py

nbdev's own processing runs over all notebooks; then sidebar, formulas (pandoc must turn each into MathML), labels and
references, links, anchors, images with their alternative texts, stored outputs and title cells are looked at.
"""
import ast, re, subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Callable
from urllib.parse import unquote

import pypandoc, yaml

from project import EXPORT, ROOT, cells, has_image, hidden, notebooks, python, scratch, settings, tell

LABEL = r'(?:eq|fig|tbl|sec|lst|thm|lem|cor|prp|cnj|def|exm|exr)-[\w-]+'
At = tuple[int, str]  # cell, what stands there

class Page(HTMLParser):
    "What the prose of a notebook defines and uses, read from the HTML that pandoc makes of it."
    def __init__(self):
        super().__init__()
        self.ids: list[At] = []
        self.links: list[At] = []
        self.images = []  # with their text
        self.refs: list[At] = []
        self.raw: list[At] = []
        self.cell = self.quiet = 0  # where we are; inside how many elements whose text is no prose
        self.warnings = ''

    def handle_comment(self, data: str):
        if match := re.fullmatch(r' cell (\d+) ', data): self.cell = int(match[1])

    def handle_starttag(self, tag: str, attrs: list):
        values = {k: v or '' for k, v in attrs}
        if 'id' in values: self.ids.append((self.cell, values['id']))
        if tag == 'a' and 'href' in values: self.links.append((self.cell, values['href']))
        if tag == 'img':
            text = values.get('alt') or values.get('data-fig-alt', '')
            self.images.append((self.cell, values.get('src', ''), text))
        if 'data-cites' in values: self.refs += [(self.cell, ref) for ref in values['data-cites'].split()]
        if tag in ('math', 'code'): self.quiet += 1

    def handle_endtag(self, tag: str):
        if tag in ('math', 'code'): self.quiet -= 1

    def handle_data(self, data: str):
        if self.quiet: return
        self.ids += [(self.cell, m) for m in re.findall(r'\{#(' + LABEL + r')\}', data)]
        # pandoc leaves a formula that it cannot read as it stands, whatever the reason
        if re.search(r'\$\$|\\[A-Za-z]{2,}|\$[^$]*[\\_^{][^$]*\$', data):
            self.raw.append((self.cell, ' '.join(data.split())))

def read_page(path: Path) -> Page:
    "One run of pandoc over all prose; a comment before each cell says where we are."
    page = Page()
    parts = []
    for i, cell in enumerate(cells(path)):
        if cell.cell_type == 'markdown': parts.append(f'<!-- cell {i} -->\n\n{cell.source}')
        elif (label := cell.marks.get('label')) and not hidden(cell): page.ids.append((i, label))
    command = [pypandoc.get_pandoc_path(), *'-f markdown-raw_tex-smart -t html --mathml --wrap=none'.split()]
    run = subprocess.run(command, input='\n\n'.join(parts), capture_output=True, text=True, encoding='utf-8')
    page.feed(run.stdout)
    page.warnings = run.stderr.strip()
    return page

class Site:
    "All pages of a project, and what a link may lead to."
    def __init__(self, root: Path):
        self.root = root
        self.nbs = (root/'nbs').resolve()
        cfg = settings(root)
        self.pages = {p: read_page(p) for p in notebooks(root)}
        self.docs = (cfg['doc_host'] + cfg.get('doc_baseurl', '')).rstrip('/') + '/'
        self.repo = cfg['git_url'].rstrip('/') + '/'
        index = root/cfg['lib_path']/'_modidx.py'
        # nbdev gives everything exported an anchor: page.html#name
        syms = {}
        if index.exists(): syms = ast.literal_eval(index.read_text(encoding='utf-8').partition('d = ')[2])['syms']
        self.symbols = {place for names in syms.values() for place, _ in names.values()}
        self.html = {self.page_name(p): p for p in self.pages}

    def page_name(self, path: Path) -> str:
        rel = path.relative_to(self.root/'nbs')
        return rel.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', rel.stem.lower()) + '.html').as_posix()

    def dead(self, page: Path, href: str) -> str:
        "Why a link leads nowhere; '' if it does lead somewhere"
        target, _, anchor = unquote(href).partition('#')
        if target.startswith(self.docs):
            reached = self.html.get(target.removeprefix(self.docs) or 'index.html')
            if not reached: return 'no such page'
        elif match := re.match(re.escape(self.repo) + r'(?:blob|tree)/[^/]+/(.+)', target):
            return '' if (self.root/match[1]).exists() else 'no such file in the repository'
        elif re.match(r'[a-z][a-z0-9+.-]*:|//', target): return ''
        elif not target: reached = page
        else:
            reached = (page.parent/target).resolve()
            if not reached.is_relative_to(self.nbs): return 'outside nbs/, so not on the site'
            rel = reached.relative_to(self.nbs)
            reached = self.html.get(rel.as_posix(), self.root/'nbs'/rel)
            if not reached.exists(): return 'no such file'
        if not anchor or reached not in self.pages: return ''
        known = anchor in {i for _, i in self.pages[reached].ids}
        return '' if known or f'{self.page_name(reached)}#{anchor.lower()}' in self.symbols else f'no anchor #{anchor}'

def prose(site: Site, path: Path) -> list[At]:
    "Formulas, labels, references, links and images in markdown"
    page = site.pages[path]
    faults = [(i, f'no MathML: {text[:80]}') for i, text in page.raw]
    if page.warnings and not page.raw: faults.append((0, f'pandoc: {page.warnings[:300]}'))
    labels = Counter(name for _, name in page.ids)
    faults += [(i, f'label {name} stands {labels[name]} times on this page') for i, name in page.ids
              if labels[name] > 1 and re.fullmatch(LABEL, name)]
    faults += [(i, f'@{ref} has no target on this page') for i, ref in page.refs if ref not in labels]
    faults += [(i, f'link {href}: {why}') for i, href in page.links if (why := site.dead(path, href))]
    faults += [(i, f'image {src} has no alternative text') for i, src, alt in page.images if not alt]
    faults += [(i, f'image {src}: {why}') for i, src, _ in page.images if (why := site.dead(path, src))]
    return faults

def title(source: str) -> str:
    "What is wrong with a title cell. nbdev keeps its heading, quote and `- key: value` lines; the rest is lost."
    first, *rest = source.splitlines()
    if not first.startswith('# '): return 'the first prose is no title (# ...)'
    lost = [line for line in rest if line.strip() and not re.match(r'> \S|- \S.*:.*\S', line)]
    if lost: return f'lost on the page: {lost[0][:60]}'
    return '' if any(line.startswith('> ') for line in rest) else 'the title has no one-sentence quote'

def runs_in_build(source: str) -> bool:
    "nbdev runs every cell with an import when it makes the pages, and knows no flags then."
    try:
        kinds = {type(node) for node in ast.parse(source).body}
    except SyntaxError:
        return False
    return bool(kinds & {ast.Import, ast.ImportFrom}) and bool(kinds - {ast.Import, ast.ImportFrom})

def code(path: Path, flags: set[str]) -> list[At]:
    "Title cell, code cells and their stored outputs"
    faults = []
    titled = False
    for i, cell in enumerate(cells(path)):
        marks = cell.marks
        if cell.cell_type == 'markdown':
            plain = re.sub(r'^(```|~~~).*?^\1', '', cell.source, flags=re.M | re.S)
            if not titled: faults.append((i, title(cell.source)))
            elif re.search(r'^# ', plain, re.M): faults.append((i, 'a second title'))
            titled = True
        if cell.cell_type != 'code': continue
        if any(o.output_type == 'error' for o in cell.get('outputs', [])): faults.append((i, 'stored error output'))
        if marks.get('label', '').startswith('fig-') and not has_image(cell):
            faults.append((i, f"{marks['label']} has no stored image"))
        if has_image(cell) and not (hidden(cell) or marks.get('output') == 'false' or marks.get('fig-alt')):
            faults.append((i, 'image without #| fig-alt:'))
        flagged = flags & set(marks) and not EXPORT & set(marks) and marks.get('eval') != 'false'
        if flagged and runs_in_build(cell.source):
            faults.append((i, 'a flagged cell with imports runs when the pages are made: import in another cell'))
    return [f for f in faults if f[1]] if titled else [*faults, (0, 'no title cell')]

def sidebar(site: Site) -> list[str]:
    "Every notebook once, and nothing else"
    def walk(item) -> list[str]:
        if isinstance(item, str): return [item]
        if isinstance(item, dict): item = [item.get(k) for k in ('href', 'file', 'contents')]
        return [target for part in item or [] for target in walk(part)]
    bar = yaml.safe_load((site.nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']
    listed = Counter(walk(bar['contents']))
    have = {p.relative_to(site.root/'nbs').as_posix() for p in site.pages}
    faults = [f'{t} does not exist' for t in listed if '://' not in t and not (site.nbs/t).is_file()]
    faults += [f'{t} is not listed' for t in sorted(have - set(listed))]
    return [f'nbs/sidebar.yml: {f}' for f in faults + [f'{t} is listed {n} times' for t, n in listed.items() if n > 1]]

def build(root: Path, start: Callable = python) -> list[str]:
    "nbdev's processing, in a copy, by a process that `start` makes; what Quarto would look for beside the pages"
    with scratch(root) as tmp:
        run = start('from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()\n'
                     'from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=0)', tmp)
        if run.returncode:
            return [f'nbdev cannot make the pages: {run.stderr[run.stderr.rfind("Exception: "):].strip()[:1000]}']
        quarto = yaml.safe_load((tmp/'_quarto.yml').read_text(encoding='utf-8'))
        output = tmp/'_proc'
        html = quarto['format']['html']
        layers = [name for theme in html.get('theme', {}).values() for name in theme if name.endswith('.scss')]
        beside = [*quarto.get('metadata-files', []), html.get('css'), *layers]
        faults = [f'_quarto.yml: {name} does not exist' for name in beside if name and not (output/name).exists()]
        if not (output/'_quarto.yml').exists(): faults.append('nbs/_quarto.yml: no link to ../_quarto.yml')
        pages = [p.relative_to(tmp/'nbs') for p in notebooks(tmp)]
        return faults + [f'nbs/{p}: nbdev makes no page of it' for p in pages if not (output/p).exists()]

def check_cells(root: Path) -> list[str]:
    "What can be seen without making the pages, as `file: cell N: what is wrong`; cells are counted from 0."
    site = Site(root)
    flags = set(settings(root).get('tst_flags', '').split())
    faults = sidebar(site)
    for path in site.pages:
        problems = sorted({*prose(site, path), *code(path, flags)})
        faults += [f'{path.relative_to(root).as_posix()}: cell {i}: {what}' for i, what in problems]
    return faults

def check(root: Path) -> list[str]: return check_cells(root) + build(root)

if __name__ == '__main__': tell(check(ROOT), 'pages')
