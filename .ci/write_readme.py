"""Writes README.md from the stored cells of nbs/index.ipynb; its pictures go to nbs/images/readme_CELL.png.

    python .ci/write_readme.py [--check]

`--check` writes nothing and fails where README.md or a picture would change.
"""
import base64, posixpath, re, sys
from pathlib import Path

from project import ROOT, cells, hidden

HEAD = '<!-- Made from nbs/index.ipynb by .ci/write_readme.py; edit the notebook -->'
IMAGES = ('image/png', 'image/jpeg', 'image/svg+xml')

def github(text: str) -> str:
    "Links and images relative to nbs/ become relative to the top of the repository; code stays as it is."
    def move(match):
        target, sep, anchor = match[2].partition('#')
        if not target or re.match(r'[a-z][a-z0-9+.-]*:|/', target): return match[0]
        return match[1] + posixpath.normpath(f'nbs/{target}') + sep + anchor
    link = r'(\]\(\s*<?|^\[[^\]^][^\]]*\]:\s+|(?:href|src)=")([^)\s">]+)'
    code = r'(^```.*?^```[^\n]*$|`[^`\n]*`)'
    parts = re.split(code, text, flags=re.M | re.S)
    return ''.join(part if i % 2 else re.sub(link, move, part, flags=re.M) for i, part in enumerate(parts))

def fence(text: str, language: str = '') -> str:
    ticks = max([2, *(len(run) for run in re.findall('`+', text))]) + 1
    return f"{'`' * ticks}{language}\n{text}\n{'`' * ticks}"

def source(cell) -> str:
    "The code a reader sees: no directives, no magics, no hidden lines"
    drop = re.compile(r'#\||%|.*#\| *hide_line *$')
    return '\n'.join(line for line in cell.source.splitlines() if not drop.match(line)).strip('\n')

def outputs(cell, images: dict[str, bytes]) -> list[str]:
    "Stored outputs as Markdown; pictures are added to `images`"
    parts = []
    plain = ''
    for out in cell.get('outputs', []):
        data = {kind: ''.join(value) for kind, value in out.get('data', {}).items()}
        if out.output_type == 'stream':
            if out.name == 'stdout': plain += ''.join(out.text)
            continue
        if kind := next((k for k in IMAGES if k in data), None):
            before = sum(cell.id in name for name in images)
            name = f"readme_{cell.id}{f'-{before + 1}' if before else ''}.{kind[6:].removesuffix('+xml')}"
            images[name] = data[kind].encode() if 'svg' in kind else base64.b64decode(data[kind])
            new = f"![{cell.marks.get('fig-alt', '')}](nbs/images/{name})"
        elif 'text/markdown' in data: new = github(data['text/markdown'].strip('\n'))
        else:
            plain += data.get('text/plain', '') + '\n'
            continue
        if plain.strip(): parts.append(fence(plain.strip('\n')))
        parts = [*parts, new]
        plain = ''
    return parts + ([fence(plain.strip('\n'))] if plain.strip() else [])

def readme(path: Path) -> tuple[str, dict[str, bytes]]:
    "The text of README.md and its pictures by name"
    parts = [HEAD]
    images = {}
    for cell in cells(path):
        if cell.cell_type == 'markdown':
            text = cell.source.strip('\n')
            # nbdev reads `- key: value` in the title cell as settings of the page
            if len(parts) == 1: text = re.sub(r'^- [\w-]+:.*\n?', '', text, flags=re.M).strip('\n')
            parts.append(github(text))
        elif cell.cell_type == 'code' and not hidden(cell):
            if cell.marks.get('echo') != 'false' and (code := source(cell)): parts.append(fence(code, 'python'))
            if not {cell.marks.get('eval'), cell.marks.get('output')} & {'false'}: parts += outputs(cell, images)
    return '\n\n'.join(part for part in parts if part) + '\n', images

def changes(root: Path) -> dict[Path, bytes | None]:
    "What must be written, or removed (None), to bring README.md and its pictures up to date"
    text, images = readme(root/'nbs'/'index.ipynb')
    folder = root/'nbs'/'images'
    want: dict[Path, bytes | None] = {p: None for p in folder.glob('readme_*')}
    want |= {root/'README.md': text.encode()} | {folder/name: data for name, data in images.items()}
    return {p: data for p, data in want.items() if (p.read_bytes() if p.exists() else None) != data}

def main(root: Path, check: bool) -> int:
    todo = changes(root)
    for path, data in todo.items():
        what = 'out of date; run .ci/write_readme.py' if check else 'removed' if data is None else 'written'
        print(f'{path.relative_to(root)}: {what}')
        if check: continue
        if data is None: path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return int(check and bool(todo))

if __name__ == '__main__': sys.exit(main(ROOT, '--check' in sys.argv[1:]))
