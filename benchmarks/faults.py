"""What was tried to break the package, and what came of it: the laws of the scores and the tests of broken files and
broken runs, counted.

    python benchmarks/faults.py [--out benchmarks/records/faults.json]

Survived: pairs, with bad rows flagged, a law that held, or a run that ends or goes on with all it had. Refused: a line
that says what is wrong. Lost: anything else, which the tests do not let pass; a test that fails or says nothing counts
as one.
"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FILES = ('test_laws', 'test_loader_faults', 'test_run_faults')
LAWS = 'laws of the scores on made-up inputs'
NAMES = dict(
    test_damaged_files='files cut, flipped, spliced or random',
    test_odd_jsonl='odd JSON Lines: encodings, NUL, 20 MB lines, nesting',
    test_every_byte_of_a_footer='Parquet footers, each byte changed',
    test_a_bad_line_is_named='a bad line, named by its number',
    test_odd_csv_and_json='odd CSV and JSON: encodings, quotes, nesting, 20 MB cells',
    test_odd_names_of_data='names of data that lead nowhere',
    test_a_saved_data_set_stays_in_its_folder='saved data sets with paths that lead out, or no data',
    test_a_damaged_saved_data_set='saved data sets, damaged',
    test_odd_tables='Parquet and Arrow columns that no text has',
    test_a_file_that_unpacks_to_much_more_is_refused='files that unpack to a thousand times their size',
    test_a_pickle_is_not_read='pickles as data, model, adapter, scores', test_damaged_shards='scores, damaged',
    test_paths_in_a_table_open_nothing='paths in manifests and cells',
    test_texts_cannot_act_in_a_report='markup and scripts in texts, names, titles of a report',
    test_no_exported_line_runs_what_it_reads='source files that could run what they read',
    test_offline_nothing_asks_the_network='no network', test_a_full_disk_at_every_write='a full disk, file by file',
    test_a_disk_that_fills_up_within_a_file='a disk that fills up within a file',
    test_scores_on_a_disk_that_fills_up_within_a_file='a disk that fills up within a file',
    test_a_line_of_a_run_that_does_not_fit='a disk that fills up within a file',
    test_a_name_that_cannot_change='a write whose last step fails',
    test_a_second_run_on_a_folder_is_refused='a second run on a folder',
    test_a_signal_ends_a_run_that_goes_on='SIGTERM, Ctrl-C and a second run during a run',
    test_a_signal_is_heard_only_while_a_command_runs='signals around a command',
    test_every_command_ends_in_one_line='commands that end in one line')

def count(xml):
    "A row a category; a test that is not named above stops the count"
    rows = {}
    for case in ElementTree.parse(xml).iter('testcase'):
        name = LAWS if case.get('classname').endswith('test_laws') else NAMES[case.get('name').split('[')[0]]
        row = rows.setdefault(name, dict(tried=0, survived=0, refused=0, lost=0))
        properties = {p.get('name'): int(p.get('value')) for p in case.iter('property')}
        bad = any(case.find(x) is not None for x in ('failure', 'error', 'skipped')) or not properties.get('tried')
        for name in ('survived', 'refused'): row[name] += properties.get(name, 0)
        row['lost'] += bad
        row['tried'] += properties.get('tried', 0) + bad
    return [dict(what=k, **v) for k, v in rows.items()]

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', default='benchmarks/records/faults.json')
    args = ap.parse_args()
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:  # one process; the older format has room for what tests tell
        options = ['-q', '-p', 'no:cacheprovider', '-o', 'junit_family=xunit1', f'--junitxml={tmp}/x.xml']
        command = [sys.executable, '-m', 'pytest', *options, *(f'tests/{f}.py' for f in FILES)]
        ended = subprocess.run(command, cwd=ROOT).returncode
        rows = count(f'{tmp}/x.xml')
    versions = dict(python=platform.python_version()) | {
        n: version(n) for n in ('pyarrow', 'datasets', 'hypothesis', 'torch', 'transformers')}
    record = dict(config=dict(files=FILES, seeds="each test's own name; hypothesis derandomised"), versions=versions,
                  hardware=f'{platform.machine()}, {os.cpu_count()} CPUs', wall_seconds=time.time() - start, rows=rows)
    Path(args.out).write_text(json.dumps(record, indent=1) + '\n')
    line = '{tried:6} tried {survived:6} survived {refused:6} refused {lost:3} lost  {what}'
    print(*(line.format(**r) for r in rows), sep='\n')
    sys.exit(bool(ended) or any(r['lost'] for r in rows))
