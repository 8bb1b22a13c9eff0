"""The callback inside real TRL runs of a small random model: what it must not change, and what must not break it."""
import json
import math
import os
import signal
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path

for name, value in dict(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', TQDM_DISABLE='1').items():
    os.environ.setdefault(name, value)  # conftest sets these too; a child process has none

import pandas as pd
import pytest
import torch
from forks import forked

from ches_align.lm.pairs import Pair, load_pairs
from ches_align.lm.tiny import tiny_model, tiny_tokenizer
from ches_align.core.errors import ChesError
from ches_align.watch.callback import DisplacementCallback
from ches_align.watch.tracker import DisplacementTracker

pytest.importorskip('trl')
pytest.importorskip('peft')
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from trl import DPOConfig, DPOTrainer

@lru_cache
def tokenizer(): return tiny_tokenizer()

@lru_cache
def pairs(): return [p for p in load_pairs('sample') if not p.problem and isinstance(p.prompt, list)]

def probes(): return pairs()[60:160:17]  # six

def small_model(): return tiny_model(tokenizer(), tie_word_embeddings=False)

def dpo(out, callbacks=(), lora=False, train=None, **changed):
    "A DPO trainer on the first pairs of the sample, cut short; 6 steps"
    settings = dict(max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, max_length=48, beta=0.1,
                    logging_steps=1, save_strategy='no', report_to=[], use_cpu=True, bf16=False,
                    gradient_checkpointing=False, disable_tqdm=True, seed=3) | changed
    rows = [dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected) for p in train or pairs()[:12]]
    peft = LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM') if lora else None
    return DPOTrainer(small_model(), None if lora else small_model(), DPOConfig(str(out), **settings),
                      processing_class=tokenizer(), train_dataset=Dataset.from_list(rows), callbacks=list(callbacks),
                      peft_config=peft)

def watcher(out, every=2, **options): return DisplacementCallback(probes(), out, every, max_length=64, **options)

def history(folder): return pd.read_parquet(folder/'history.parquet').drop(columns='seconds')

def losses(trainer): return [row['loss'] for row in trainer.state.log_history if 'loss' in row]

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "A small model is quickest so, and sums do not depend on the machine"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.mark.parametrize('kind', ['full', 'lora', 'bf16'])
def test_training_is_bit_equal_with_and_without(tmp_path, kind):
    settings = dict(lora=kind == 'lora', bf16=kind == 'bf16', gradient_accumulation_steps=2, max_steps=4)
    # where a processor has no bf16, its products take forty times as long
    if kind == 'bf16': settings['per_device_train_batch_size'] = 1
    watched = dpo(tmp_path/'a', [watcher(tmp_path/'seen')], **settings)
    alone = dpo(tmp_path/'b', **settings)
    for trainer in (watched, alone): trainer.train()
    assert losses(watched) == losses(alone) and len(losses(alone)) == 4
    for (name, weight), same in zip(watched.model.named_parameters(), alone.model.parameters()):
        assert torch.equal(weight, same), name
    table = history(tmp_path/'seen')
    assert table.groupby('step').size().to_dict() == dict.fromkeys((0, 2, 4), len(probes()))  # optimiser steps
    assert (table[table.step == 0].d_chosen == 0).all() and (table[table.step == 4].d_chosen != 0).all()
    logged = [row for row in watched.state.log_history if 'displacement/chosen_change' in row]
    assert [row['step'] for row in logged] == [2, 4] and all('displacement/overhead' in row for row in logged)
    manifest = json.loads((tmp_path/'seen'/'manifest.json').read_text())
    noise = 0.05 if kind == 'bf16' else 1e-4
    assert manifest['adapter'] == (kind == 'lora') and manifest['noise_per_token'] < noise
    for name in ('summary.json', 'displacement.png', 'worst_pairs.csv', 'baseline.safetensors'):
        assert (tmp_path/'seen'/name).stat().st_size > 0
    worst = pd.read_csv(tmp_path/'seen'/'worst_pairs.csv')
    assert worst.d_chosen.is_monotonic_increasing and worst.ches.notna().all() and len(worst) == len(probes())

class Kill(TrainerCallback):
    "As a job that is killed: no handler runs"
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)

def child(*args, before=()):
    env = dict(os.environ) | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    return subprocess.run([*before, __file__, *map(str, args)], env=env, capture_output=True, text=True, timeout=240)

SAVED = dict(save_strategy='steps', save_steps=2)

@pytest.mark.full
def test_killed_and_resumed_is_one_history(tmp_path):
    done = child('kill', tmp_path, before=[sys.executable])
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert history(tmp_path/'seen').step.max() == 5  # one step past the checkpoint
    again = dpo(tmp_path/'run', [watcher(tmp_path/'seen', 1)], **SAVED)
    again.train(resume_from_checkpoint=str(tmp_path/'run'/'checkpoint-4'))
    dpo(tmp_path/'other', [watcher(tmp_path/'whole', 1)]).train()
    mended = history(tmp_path/'seen')
    whole = history(tmp_path/'whole')
    assert list(mended.step) == list(whole.step) and mended.step.nunique() == 7
    assert list(mended.verdict) == list(whole.verdict)
    for name in ('d_chosen', 'd_rejected', 'entropy', 'chosen_logps'):
        assert (mended[name] - whole[name]).abs().max() < 1e-4, name  # fp32 sums

def test_two_processes_share_the_probes_and_stop_together(tmp_path):
    done = forked(begin, ['two', tmp_path], tmp_path, 2, CUDA_VISIBLE_DEVICES='')
    assert done.returncode == 0, done.stderr[-3000:]
    table = history(tmp_path/'seen')
    tracker = DisplacementTracker(tokenizer(), probes(), tmp_path/'x', max_length=64)
    assert table.groupby('step').size().to_dict() == dict.fromkeys((0, 1), len(probes()))
    state = tracker.measure(small_model())
    assert list(table.row_id[table.step == 0]) == state.row_ids
    assert (torch.tensor(table.chosen_logps[table.step == 0].values) - state.sums[:, 0]).abs().max() < 1e-3
    ranks = [json.loads((tmp_path/f'rank{k}.json').read_text()) for k in (0, 1)]
    assert [r['step'] for r in ranks] == [1, 1] and ranks[0]['weight'] == ranks[1]['weight']
    assert done.stdout.count('STOPPED: model destroyed at step 1') == 1  # said by one

def test_a_learning_rate_that_destroys_the_model(tmp_path, capsys):
    with pytest.warns(UserWarning, match=r'model destroyed at step 2, learning rate .*Lower the learning rate'):
        trainer = dpo(tmp_path/'run', [watcher(tmp_path/'seen')], learning_rate=1e3, max_steps=20)
        trainer.train()
    assert trainer.state.global_step == 2
    summary = (tmp_path/'seen'/'summary.json').read_text()
    assert 'NaN' not in summary and 'model destroyed' in json.loads(summary)['stopped']
    assert 'STOPPED: model destroyed at step 2' in capsys.readouterr().out
    logged = [v for row in trainer.state.log_history for k, v in row.items() if k.startswith('displacement/')]
    assert logged and all(map(math.isfinite, logged))

def test_nan_weights_are_told_and_never_averaged(tmp_path):
    tracker = DisplacementTracker(tokenizer(), probes(), tmp_path, every=1, max_length=64, stop_destroyed=False)
    model = small_model()
    tracker.start(model)
    with torch.no_grad(): model.lm_head.weight[5] = float('nan')
    with pytest.warns(UserWarning, match='of 6 of 6 probes are not finite'): metrics = tracker.update(model, 1)
    assert metrics['share_destroyed'] == 1 and 'chosen_change' not in metrics and not tracker.stopped
    assert 'step 0' in tracker.close() and len(pd.read_csv(tmp_path/'worst_pairs.csv')) == 6
    with pytest.raises(ChesError, match='not finite before training'):
        DisplacementTracker(tokenizer(), probes(), tmp_path/'new', max_length=64).start(model)

def test_probes_that_training_sees_are_named(tmp_path):
    seen = [*pairs()[:6], probes()[0], probes()[3]]
    with pytest.warns(UserWarning, match=rf'2 as whole pairs \(rows {probes()[0].row_id}, {probes()[3].row_id}\)'):
        dpo(tmp_path/'run', [watcher(tmp_path/'seen')], train=seen, max_steps=1).train()
    watch = watcher(tmp_path/'seen2')
    dpo(tmp_path/'run2', [watch], max_steps=1).train()
    assert watch.tracker.metrics and not any('training data' in note for note in watch.tracker.notes)

class Fake(TrainerCallback):
    "An integration as Transformers makes them: an instance of its own, and one shared run"
    run = []
    opened = 0
    def on_train_begin(self, *args, **kwargs): Fake.opened += 1
    def on_log(self, args, state, control, logs=None, **kwargs): Fake.run.append((state.global_step, dict(logs)))

class Broken(Fake):
    def on_log(self, *args, logs=None, **kwargs):
        if any(k.startswith('displacement') for k in logs): raise RuntimeError('no connection')

def test_every_integration_gets_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(integration_utils, 'INTEGRATION_TO_CALLBACK', dict(fake=Fake, broken=Broken))
    with pytest.warns(UserWarning, match='Broken: not reached .no connection'):
        dpo(tmp_path/'run', [watcher(tmp_path/'seen')], report_to=['fake', 'broken'], max_steps=4).train()
    ours = [step for step, logs in Fake.run if 'displacement/chosen_change' in logs]
    assert ours == [2, 4] and any('loss' in logs for _, logs in Fake.run)

def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch):
    from ches_align.watch import history
    real = history.write_files
    watch = watcher(tmp_path/'seen')
    def full(files):
        if watch.tracker.metrics and watch.tracker.metrics[-1]['step'] > 0:
            raise ChesError('cannot be written: No space left')
        real(files)
    monkeypatch.setattr(history, 'write_files', full)
    with pytest.warns(UserWarning, match='No space left.*training goes on'):
        trainer = dpo(tmp_path/'run', [watch], max_steps=4)
        trainer.train()
    assert trainer.state.global_step == 4 and sorted(set(watch.tracker.history.step)) == [0, 2, 4]

def test_the_default_alarm_needs_no_judge(tmp_path):
    "The one-line callback, and a training that is given the probes with the responses in each other's place"
    swapped = [Pair(p.row_id, p.row_hash, p.prompt, p.rejected, p.chosen) for p in probes()]
    with pytest.warns(UserWarning, match=r'displacement alert at step \d, learning rate .*_fall'):
        watch = DisplacementCallback(probes(), every=2)
        trainer = dpo(tmp_path/'run', [watch], train=swapped, max_steps=8, learning_rate=3e-2)
        trainer.train()
    assert trainer.state.global_step == 8 and watch.tracker.max_length == 48  # the trainer's
    assert sum(row.get('displacement/alert', 0) for row in trainer.state.log_history) >= 1
    assert (tmp_path/'run'/'displacement'/'summary.json').exists()
    assert len([note for note in watch.tracker.notes if 'alert' in note]) == 1  # a lasting alarm is told once

@pytest.mark.parametrize('fault', [torch.OutOfMemoryError('none left'), ValueError('a mask'), ChesError('a reason')])
def test_an_error_while_measuring_ends_nothing(tmp_path, monkeypatch, fault):
    from ches_align.watch import tracker
    real = tracker.measure_probes
    calls = []
    def flaky(*args, **options):
        calls.append(args)
        if len(calls) == 4: raise fault
        return real(*args, **options)
    monkeypatch.setattr(tracker, 'measure_probes', flaky)
    watch = watcher(tmp_path/'seen')
    with pytest.warns(UserWarning, match=rf'not measured at step 4: .*{fault}; training goes on'):
        trainer = dpo(tmp_path/'run', [watch])
        trainer.train()
    assert trainer.state.global_step == 6 and watch.tracker.missed == [4] and watch.tracker.budget == 768 // 2
    assert sorted(set(watch.tracker.history.step)) == [0, 2, 6]
    assert [r['step'] for r in trainer.state.log_history if r.get('displacement/error')] == [4]
    assert json.loads((tmp_path/'seen'/'summary.json').read_text())['missed'] == [4]

def test_no_memory_at_the_start_is_tried_again_in_smaller_batches(tmp_path, monkeypatch):
    from ches_align.watch import tracker
    real = tracker.measure_probes
    def small_only(model, pairs, budget, **options):
        if budget > 200: raise torch.OutOfMemoryError('none left')
        return real(model, pairs, budget, **options)
    monkeypatch.setattr(tracker, 'measure_probes', small_only)
    watch = watcher(tmp_path/'seen')
    dpo(tmp_path/'run', [watch], max_steps=2).train()
    assert watch.tracker.budget == 768 // 4 and not watch.mute and sorted(set(watch.tracker.history.step)) == [0, 2]

def test_a_judge_that_breaks_and_a_board_that_hears_of_it(tmp_path, monkeypatch):
    from ches_align.watch import verdicts
    def broken(*args): raise KeyError('no verdict')
    monkeypatch.setattr(verdicts, '_text_verdict', broken)
    monkeypatch.setattr(integration_utils, 'INTEGRATION_TO_CALLBACK', dict(fake=Fake))
    Fake.run.clear()
    with pytest.warns(UserWarning, match='displacement is not measured: KeyError.*training goes on'):
        trainer = dpo(tmp_path/'run', [watcher(tmp_path/'seen', answers=2)], report_to=['fake'], max_steps=2)
        trainer.train()
    assert trainer.state.global_step == 2
    assert [logs['displacement/error'] for _, logs in Fake.run if 'displacement/error' in logs] == [1.]

def test_a_displaced_response_of_one_token_is_no_ruin(tmp_path):
    "Far below guessing, while the model is sound: it has learned to say something else"
    rows = [Pair(k, str(k), f'Q{k}:', ' No', ' Never') for k in range(8)]
    yes = [Pair(k, str(k), f'Q{k}:', ' Yes', ' No') for k in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        watch = DisplacementCallback(rows, tmp_path/'seen', every=10)
        trainer = dpo(tmp_path/'run', [watch], train=yes, max_steps=60, beta=2., learning_rate=3e-2)
        trainer.train()
    table = history(tmp_path/'seen')
    assert trainer.state.global_step == 60 and not watch.tracker.stopped
    assert (table.chosen_logps[table.step == 60] < -10.8).all() and watch.tracker.metrics[-1]['alert']

def test_a_model_without_next_tokens(tmp_path):
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer
    config = small_model().config
    config.num_labels = 1
    rows = Dataset.from_list([dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected) for p in pairs()[:4]])
    args = RewardConfig(str(tmp_path/'run'), max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy='no',
                        disable_tqdm=True, gradient_checkpointing=False, per_device_train_batch_size=2)
    watch = DisplacementCallback(probes(), every=1)
    trainer = RewardTrainer(LlamaForSequenceClassification(config), args, train_dataset=rows,
                            processing_class=tokenizer(), callbacks=[watch])
    with pytest.warns(UserWarning, match='LlamaForSequenceClassification gives no distribution over the next token'):
        trainer.train()
    assert trainer.state.global_step == 1 and 'causal language models' in watch.mute

@pytest.mark.full
def test_one_process_fails_and_none_waits(tmp_path):
    done = forked(begin, ['fail', tmp_path], tmp_path, 2, CUDA_VISIBLE_DEVICES='')
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(set(history(tmp_path/'seen').step)) == [0, 1, 3]
    ranks = [json.loads((tmp_path/f'rank{k}.json').read_text()) for k in (0, 1)]
    assert [r['step'] for r in ranks] == [3, 3] and ranks[0]['budget'] == ranks[1]['budget'] == 768 // 2
    assert done.stdout.count('1 measurements FAILED') == 1

@pytest.mark.full
def test_a_probe_that_always_fails_is_left_out_by_all_processes(tmp_path):
    done = forked(begin, ['one', tmp_path], tmp_path, 2, CUDA_VISIBLE_DEVICES='')
    assert done.returncode == 0, done.stderr[-3000:]
    assert history(tmp_path/'seen').groupby('step').size().tolist() == [5, 5, 4]
    ranks = [json.loads((tmp_path/f'rank{k}.json').read_text()) for k in (0, 1)]
    assert [r['kept'] for r in ranks] == [[0, 2, 3, 5]] * 2 and 'FAILED' not in done.stdout

def test_wrong_inputs(tmp_path):
    def tracker(source=None, folder='t', **options):
        return DisplacementTracker(tokenizer(), source or probes(), tmp_path/folder, max_length=64, **options)
    tracker(folder='one').start(small_model())
    tracker(folder='one').start(small_model())  # begun again from step 0: begins anew
    with pytest.raises(ChesError, match='another run .probes was 6, is 2'):
        tracker(probes()[:2], 'one').start(small_model())
    with pytest.raises(ChesError, match='no probe pair can be measured: rows 0 .identical'):
        tracker([dict(prompt='a', chosen='b', rejected='b')])
    with pytest.warns(UserWarning, match='1 of 2 probe pairs are there already'):
        assert len(tracker(probes()[:1] * 2).encoded) == 1
    with pytest.raises(ChesError, match='no such file'): tracker(str(tmp_path/'none.jsonl'))
    foreign = pd.DataFrame(dict(row_hash=['x'], ches=[0.], ln_ches=[0.]))
    with pytest.raises(ChesError, match='none of the probes'):
        tracker(scores=foreign, folder='two').start(small_model())
    with pytest.raises(ChesError, match='every = 0'): tracker(every=0)
    with pytest.raises(ChesError, match='share_falling = -1'): tracker(alert=dict(share_falling=-1))
    (tmp_path/'one'/'history.parquet').write_text('no')
    with pytest.raises(ChesError, match='history.parquet: unreadable'): tracker(folder='one').start(small_model(), 4)
    (tmp_path/'one'/'manifest.json').write_text('{')
    with pytest.raises(ChesError, match='manifest.json: not a JSON object'):
        tracker(folder='one').start(small_model(), 4)
    with pytest.raises(ChesError, match='different pairs|same probes'):
        other = tracker(probes()[:3]).measure(small_model())
        tracker(reference=other, folder='three').start(small_model())

def begin(words):
    "What a started process does"
    what = words[0]
    out = Path(words[1])
    if what == 'kill': dpo(out/'run', [watcher(out/'seen', 1), Kill()], **SAVED).train()
    if what == 'two':
        trainer = dpo(out/'run', [watcher(out/'seen', 1)], learning_rate=1e3, ddp_backend='gloo')
        trainer.train()
        state = dict(step=trainer.state.global_step, weight=next(trainer.model.parameters()).double().sum().item())
        (out/f'rank{os.environ["RANK"]}.json').write_text(json.dumps(state))
    if what == 'one':  # probe 1 from the start, probe 4 from the third measurement on
        from ches_align.watch import tracker
        real = tracker.measure_probes
        bad = {watcher(out).probes[1].row_hash}
        def picky(model, pairs, *args, **options):
            if bad & {p.row_hash for p in pairs}: raise torch.OutOfMemoryError('none left')
            return real(model, pairs, *args, **options)
        class Later(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 1: bad.add(watch.probes[4].row_hash)
        tracker.measure_probes = picky
        watch = watcher(out/'seen', 1)
        dpo(out/'run', [watch, Later()], max_steps=2, learning_rate=1e-4, ddp_backend='gloo').train()
        (out/f'rank{os.environ["RANK"]}.json').write_text(json.dumps(dict(kept=watch.tracker.kept)))
    if what == 'fail':
        from ches_align.watch import tracker
        real = tracker.measure_probes
        calls = []
        def flaky(*args, **options):
            calls.append(args)
            if len(calls) == 4 and os.environ['RANK'] == '1': raise torch.OutOfMemoryError('none left')
            return real(*args, **options)
        tracker.measure_probes = flaky
        watch = watcher(out/'seen', 1)
        trainer = dpo(out/'run', [watch], max_steps=3, learning_rate=1e-4, ddp_backend='gloo')
        trainer.train()
        state = dict(step=trainer.state.global_step, budget=watch.tracker.budget)
        (out/f'rank{os.environ["RANK"]}.json').write_text(json.dumps(state))

if __name__ == '__main__': begin(sys.argv[1:])
