"""One preference between two words on sixteen prompts at once (persona/plan.yaml): where does the mass go?

    python benchmarks/displacement/persona.py OUT --data persona=FILE       # of Perez et al. (2022); resumable
    python benchmarks/displacement/persona.py OUT [OUT ...] --record        # writes persona/runs.json
    python benchmarks/displacement/persona.py OUT --tiny --data persona=FILE
"""
import argparse, random, sys, time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pools import chosen, hash_of, read_sources, tiny_start, write_record
import yaml

from ches_align.core.errors import ChesError
from ches_align.core.run import open_run
from ches_align.lm.encode import EncodedPair
from ches_align.lm.models import ScoringModel, load_model
from ches_align.studies.single_prompt import next_logps, persona_prompts, prompt_ids, single_token
from ches_align.studies.study import Group, run_groups
from ches_align.training.train_plan import Training
from ches_align.validation.steps import Known, step_bench, take_steps
from ches_align.watch.verdicts import YES_NO, token_classes

HERE = Path(__file__).parent/'persona'

class Words(NamedTuple):
    "The two words of a preference, and their kin, in token ids."
    chosen: int
    rejected: int
    same: list[int]     # of the meaning of y+, without the two
    opposite: list[int] # without the two

def words_of(lm: ScoringModel, pair: dict[str, str]) -> Words:
    "Look the words of a pair up"
    chosen, rejected = (single_token(lm.tokenizer, pair[side]) for side in ('chosen', 'rejected'))
    other = dict(yes='no', no='yes')[pair['chosen'].lower()]
    kin = token_classes(lm.tokenizer, YES_NO[pair['chosen'].lower()], YES_NO[other], strict=False)
    both = {chosen, rejected}
    return Words(chosen, rejected, sorted(kin.same - both), sorted(kin.opposite - both))

def read_words(lm: ScoringModel, words: Words, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    "ln p of y+ and of y-, of other words of like meaning and of opposite meaning together, a row a prompt"
    rows = []
    for ids in prompts:
        with torch.no_grad(): logps = next_logps(lm.model, ids).double()
        groups = [words.chosen], [words.rejected], words.same, words.opposite
        rows.append([round(logps[group].logsumexp(0).item(), 5) for group in groups])
    return rows

def mean_chosen(rows: list[list[float]]) -> float: return float(np.mean(np.exp([row[0] for row in rows]))) # p of y+

def one_token(prompts: Sequence[Sequence[int]], words: Words) -> list[EncodedPair]:
    "The pair of words behind every prompt"
    return [EncodedPair(k, str(k), 'ok', ids, [words.chosen], [words.rejected]) for k, ids in enumerate(prompts)]

def fit(lm: ScoringModel, start: dict[str, Any], words: Words, prompts: list, watched: list) -> int:
    "Raise y+ on other prompts until its mean probability is as wanted; the steps it took. Raises `ChesError`"
    settings = {key: value for key, value in start.items() if key != 'until'}
    training = Training(loss='sft_sum', optim='rmsprop', gradient_accumulation_steps=1, **settings)
    size = training.pairs_a_step
    with step_bench(lm, training) as bench:
        pairs = one_token(prompts, words)
        known = Known(pairs, torch.zeros(len(pairs), 2, dtype=torch.float64))  # SFT has no reference
        for step in range(10*len(pairs)//size):
            if mean_chosen(read_words(lm, words, watched)) >= start['until']:
                bench.stay()
                return step
            first = step*size % (len(pairs) - size + 1)
            if not take_steps(bench, [known.take(range(first, first + size))]):
                raise ChesError('the fit destroyed the weights')
    raise ChesError(f"{len(pairs)} prompts did not bring y+ to a probability of {start['until']}")

def run_seed(lm: ScoringModel, plan: dict[str, Any], words: Words, trained: list, unseen: list) -> list[dict[str, Any]]:
    "Train on all prompts at once; readings on the way, the weights come back"
    def reading(steps: int) -> dict[str, Any]:
        return dict(steps=steps, trained=read_words(lm, words, trained), unseen=read_words(lm, words, unseen))
    readings = [reading(0)]
    with step_bench(lm, Training(**plan['training'])) as bench:
        batch = bench.known(one_token(trained, words))
        for until in plan['read']:
            if not take_steps(bench, [batch]*(until - readings[-1]['steps'])):
                return [*readings, dict(steps=until, destroyed=True)]
            readings.append(reading(until))
    return readings

def key_of(model: str, pair: dict[str, str], start: str, seed: int) -> str: # of a run
    return f"{model}|{pair['chosen']}>{pair['rejected']}|{start}|{seed}"

def run_cell(plan: dict[str, Any], model: str, pair: dict[str, str], start: str, source: str, tiny: bool,
             missing: Sequence[str]) -> Iterator[dict]:
    "All seeds of a model, a pair and a start"
    lm = tiny_start() if tiny else load_model(model, dtype='float32', device='cpu')
    words = words_of(lm, pair)
    prompts = [prompt_ids(lm.tokenizer, prompt.question, plan['template'])
               for prompt in persona_prompts(source, pair['behaviour'])]
    random.Random(0).shuffle(prompts)
    size = plan['trained'] + plan['unseen']
    asked = {seed: prompts[k*size:(k + 1)*size] for k, seed in enumerate(plan['seeds'])}
    rest = prompts[len(asked)*size:][:plan['fit_prompts']]
    began = time.perf_counter()
    watched = [ids for part in asked.values() for ids in part[:plan['trained']]]
    fitted = plan['starts'][start]
    steps = fit(lm, fitted, words, rest, watched) if fitted else 0
    for seed in plan['seeds']:
        key = key_of(model, pair, start, seed)
        if key not in missing: continue
        part = asked[seed]
        readings = run_seed(lm, plan, words, part[:plan['trained']], part[plan['trained']:])
        yield dict(key=key, model=model, start=start, seed=seed, fit_steps=steps, readings=readings,
                   chosen=pair['chosen'], rejected=pair['rejected'], seconds=round(time.perf_counter() - began, 1))
        began = time.perf_counter()

def groups_of(plan: dict[str, Any], models: Sequence[str], source: str, tiny: bool) -> list[Group]:
    "A group a model, pair and start"
    return [Group([key_of(model, pair, start, seed) for seed in plan['seeds']],
                  partial(run_cell, plan, model, pair, start, source, tiny))
            for model in models for pair in plan['pairs'] for start in plan['starts']]

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('out', nargs='+')
    ap.add_argument('--data', nargs='*', default=[], help='persona=FILE')
    ap.add_argument('--model', nargs='*', help='these models alone')
    ap.add_argument('--record', action='store_true', help='write persona/runs.json, and end')
    ap.add_argument('--tiny', action='store_true', help='a tiny model, to try the script')
    args = ap.parse_args()
    try:
        plan = yaml.safe_load((HERE/'plan.yaml').read_text())
        if args.record:
            write_record(args.out, HERE/'runs.json', plan)
            sys.exit()
        source = read_sources(args.data, {'persona'}, False)['persona']
        if args.tiny:
            plan |= dict(models=['tiny'], seeds=[0], steps=2, read=[1, 2], trained=4, unseen=4, fit_prompts=16)
            plan['starts']['fitted'] = dict(until=.001, learning_rate=1e-3, per_device_train_batch_size=8)
        identity = dict(plan=plan, data=dict(persona=hash_of(source)), tiny=args.tiny)
        with open_run(args.out[0], identity, what='persona study') as run:
            run_groups(run, groups_of(plan, chosen('model', args.model, plan['models']), source, args.tiny), unit='run')
    except ChesError as error:
        sys.exit(f'persona: {error}')
