"""Draw short pairs of a preference file into a pool to train on, a protected set and an unseen one.

    python benchmarks/short_pairs.py DATA OUT [--pool 96] [--protected 24] [--unseen 24] [--seed 0]

Prompt and response have at most 120 tokens of the embedded model, responses 6 to 40. No prompt is in two files. With
the files, from the package's own commands (the record of it, with seed 3: nbs/validation/records/hh_pool.json):

    ches train OUT/fit.yaml           # fits the model to the pool's preferred responses
    ches validate OUT/pool.jsonl --model OUT/fit/model --protect OUT/protected.jsonl --held_out OUT/unseen.jsonl \\
        --pairs 96 --regime run --arm_pairs 24 --random_arms 4 --max_length 160 --output_dir OUT/arms
"""
import argparse, json, random
from pathlib import Path

from ches_align.audit.shared_prompts import prompt_key
from ches_align.lm.encode import encode_pairs
from ches_align.lm.models import load_model
from ches_align.lm.pairs import load_pairs

FIT = """kind: preference
model: smollm2-135m
data: {folder}/pool.jsonl
output_dir: {folder}/fit
loss: sft_mean
optim: adamw_torch
learning_rate: 1.0e-5
num_train_epochs: 6
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
"""

def fits(pair) -> bool:
    sides = pair.chosen_ids, pair.rejected_ids
    return pair.status == 'ok' and pair.length <= 120 and all(6 <= len(ids) <= 40 for ids in sides)

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('data')
    ap.add_argument('out')
    ap.add_argument('--pool', type=int, default=96)
    ap.add_argument('--protected', type=int, default=24)
    ap.add_argument('--unseen', type=int, default=24)
    ap.add_argument('--seed', type=int, default=0)
    args = ap.parse_args()
    tokenizer = load_model('smollm2-135m', dtype='float32', device='cpu').tokenizer
    pairs = load_pairs(args.data)
    of_prompt = {}
    for pair in encode_pairs(pairs, tokenizer):
        if fits(pair): of_prompt.setdefault(prompt_key(pair.prompt_ids), pair.row_id)
    rows = sorted(of_prompt.values())
    random.Random(args.seed).shuffle(rows)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ('pool', 'protected', 'unseen'):
        count = getattr(args, name)
        if len(rows) < count: ap.error(f'{args.data}: too few short pairs')
        lines = [json.dumps(dict(prompt=pairs[i].prompt, chosen=pairs[i].chosen, rejected=pairs[i].rejected))
                 for i in rows[:count]]
        rows = rows[count:]
        (folder/f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
    (folder/'fit.yaml').write_text(FIT.format(folder=folder))
