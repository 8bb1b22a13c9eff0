"""What was tried to break the package, and what came of it: the tests of broken files and broken runs, counted.

    python benchmarks/faults.py [--out benchmarks/records/faults.json]

Survived: pairs, with bad rows flagged, or a run that ends or goes on with all it had. Refused: a line that says what is
wrong. Lost: anything else, which the tests do not let pass.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
from xml.etree import ElementTree

import pyarrow

ROOT = Path(__file__).resolve().parent.parent
FILES = ('test_loader_faults', 'test_run_faults')
NAMES = dict(test_damaged_files='files cut, flipped, spliced or random', test_odd_jsonl='odd JSON Lines: encodings, NUL, 20 MB lines, nesting',
             test_odd_tables='Parquet and Arrow columns that no text has', test_a_file_that_unpacks_to_much_more_is_refused='a file that unpacks to 300 times its size and more',
             test_a_pickle_is_not_read='pickles as data, model, adapter, scores', test_texts_cannot_act_in_a_report='markup and scripts in texts, names, titles of a report',
             test_no_exported_line_runs_what_it_reads='source lines that could run what they read', test_offline_nothing_asks_the_network='no network',
             test_a_full_disk_at_every_write='a full disk, file by file', test_a_second_run_on_a_folder_is_refused='a second run on a folder',
             test_a_signal_ends_a_run_that_goes_on='SIGTERM and Ctrl-C in a run')

def count(xml):
    rows = {}
    for case in ElementTree.parse(xml).iter('testcase'):
        row = rows.setdefault(NAMES[case.get('name').split('[')[0]], dict(tried=0, survived=0, refused=0, lost=0))
        told = {p.get('name'): int(p.get('value')) for p in case.iter('property')}
        bad = case.find('failure') is not None or case.find('error') is not None or not told
        for name in ('survived', 'refused'): row[name] += told.get(name, 0)
        row['lost'] += bad
        row['tried'] += told.get('survived', 0) + told.get('refused', 0) + bad
    return [dict(what=k, **v) for k, v in rows.items()]

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', default='benchmarks/records/faults.json')
    args, start = ap.parse_args(), time.time()
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, '-m', 'pytest', '-q', f'--junitxml={tmp}/x.xml', *(f'tests/{f}.py' for f in FILES)], cwd=ROOT)
        rows = count(f'{tmp}/x.xml')
    record = dict(config=dict(files=FILES, seeds="each test's own name"), versions=dict(python=platform.python_version(), pyarrow=pyarrow.__version__),
                  hardware=f'{platform.machine()}, {os.cpu_count()} CPUs', wall_seconds=time.time() - start, rows=rows)
    Path(args.out).write_text(json.dumps(record, indent=1) + '\n')
    print(*(f"{r['tried']:6} tried {r['survived']:6} survived {r['refused']:6} refused {r['lost']:3} lost  {r['what']}" for r in rows), sep='\n')
    sys.exit(any(r['lost'] for r in rows))
