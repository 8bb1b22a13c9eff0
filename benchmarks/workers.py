"""One process with all threads against several with their share of them: the same pairs, alternating.

    python benchmarks/workers.py DATA [--pairs 48] [--processes 2] [--repeats 2] [--out benchmarks/records/workers.json]

Seconds are those of the scoring, which the manifest holds; starting processes and loading the model (once each) are
not in them. One process with one thread makes the table that the several must give to the bit.
"""
import argparse, json, os, platform, statistics, subprocess, sys, tempfile
from pathlib import Path

import pandas as pd
import torch
import transformers

from ches_align.audit.scoring import load_scores

def score(args, out, processes, threads):
    begin = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes)] if processes > 1 else []
    command = [sys.executable, *begin, '-m', 'ches_align', 'score', args.data, '--model', 'smollm2-135m',
               '--output_dir', str(out), '--limit', str(args.pairs), '--limit_seed', '0', '--dtype', args.dtype]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS=str(threads)))
    return load_scores(out)

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('data')
    ap.add_argument('--pairs', type=int, default=256, help='several shards of 64, or there is nothing to share')
    ap.add_argument('--processes', type=int, default=2)
    ap.add_argument('--repeats', type=int, default=2)
    ap.add_argument('--dtype', default='float32')
    ap.add_argument('--name', default=None, help='what the record calls the data')
    ap.add_argument('--out', default='benchmarks/records/workers.json')
    args = ap.parse_args()
    arms = {'one': (1, args.processes), 'several': (args.processes, 1)}
    seconds = {k: [] for k in arms}
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.repeats):
            for k, (processes, threads) in arms.items():
                tables[k] = score(args, Path(folder)/f'{k}{i}', processes, threads)
                seconds[k].append(tables[k].attrs['manifest']['seconds'])
        alone = score(args, Path(folder)/'alone', 1, 1)
    pd.testing.assert_frame_equal(alone, tables['several'], check_exact=True)
    medians = {k: statistics.median(v) for k, v in seconds.items()}
    manifest = tables['several'].attrs['manifest']
    record = dict(
        config=dict(data=args.name or Path(args.data).name, pairs=args.pairs, processes=args.processes,
                    repeats=args.repeats, dtype=args.dtype, seed=0),
        seconds=seconds, ratio=medians['one']/medians['several'], same_to_the_bit=True,
        data_hash=manifest['data_hash'], counts=manifest['counts'], share_prompt=manifest['share_prompt'],
        hardware=f'{platform.machine()}, {os.cpu_count()} CPUs',
        versions=dict(torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version()))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(record, indent=1) + '\n')
    print({k: round(v, 1) for k, v in medians.items()}, f"ratio {record['ratio']:.2f}")
