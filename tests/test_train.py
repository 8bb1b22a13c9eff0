"Training from a file: every loss through TRL, TRL's own numbers, a kill and its continuation, and what is refused."
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from ches_align.lm.pairs import load_pairs
from ches_align.core.errors import ChesError
from ches_align.lm.tiny import save_tiny_model
from ches_align.lm.models import load_model
from ches_align.core.writing import write_files
from ches_align.theory.losses import LOSSES
from ches_align.core.config import load_config
from ches_align.core.fields import ConfigError
from ches_align.training.train import make_trainer, read_data, train_preferences
from ches_align.training.train_plan import Displacement, Lora, TrainConfig, check

warnings.filterwarnings('ignore', category=FutureWarning)
ROOT = Path(__file__).resolve().parent.parent
KINDS = dict(preference=TrainConfig)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A model of two layers, and 16 short pairs of plain text"
    home = tmp_path_factory.mktemp('home')
    save_tiny_model(home/'tiny', hidden_size=32, intermediate_size=64)
    rows = [dict(prompt=f'Q{i}:', chosen=' yes' + ' indeed' * (i % 4), rejected=f' no {i}') for i in range(16)]
    write_files({home/'pairs.jsonl': ''.join(json.dumps(r) + '\n' for r in rows).encode()})
    return home

@pytest.fixture(scope='module')
def tiny(home): return load_model(str(home/'tiny'))

@pytest.fixture
def settings(home, tmp_path):
    "A configuration of two steps, changed by keywords"
    def make(**kw):
        usual = dict(model=str(home/'tiny'), data=str(home/'pairs.jsonl'), output_dir=str(tmp_path/'out'), max_steps=2,
                     per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3, max_length=64)
        return TrainConfig(**(usual | kw))
    return make

def weights(out): return load_file(Path(out)/'model/model.safetensors')
def log(out): return [json.loads(line) for line in (Path(out)/'log.jsonl').read_text().splitlines()]
def fresh(out): shutil.rmtree(out, ignore_errors=True)

# a reference model, none, lengths, and supervised: every way of wiring; the thirteen values stand in theory/030_losses
WIRED = ['dpo', 'slic', 'ipo_mean', 'sft_mean']

@pytest.mark.parametrize('loss', [
    pytest.param(loss, marks=[] if loss in WIRED else pytest.mark.full) for loss in LOSSES])
def test_each_loss_trains(settings, tiny, loss):
    lm = dataclasses.replace(tiny, model=deepcopy(tiny.model))
    config = settings(loss=loss, limit=6, gradient_accumulation_steps=1)
    trainer = make_trainer(config, lm, read_data(config, lm))
    trainer.train()
    losses = [row['loss'] for row in trainer.state.log_history if 'loss' in row]
    assert trainer.state.global_step == len(losses) == 2 and all(map(math.isfinite, losses))
    before = tiny.model.state_dict()
    after = lm.model.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)

@pytest.mark.parametrize('ours, theirs', [
    (dict(loss='dpo', optim='adamw_torch', lr_scheduler_type='linear', max_grad_norm=1.),
     dict(optim='adamw_torch', max_grad_norm=1.)),
    (dict(loss='ipo_mean', beta=0.5, sft=0.5, sft_convention='mean'),
     dict(loss_type=['ipo', 'sft'], loss_weights=[1., 0.5], beta=0.5)),
])
def test_a_run_is_plain_trls(settings, home, tmp_path, ours, theirs):
    "Three steps of TRL's trainer, left to itself on the same text: the same losses, rewards and weights"
    train_preferences(config := settings(**ours, max_steps=3))
    rows = [dict(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected) for p in load_pairs(config.data)]
    schedule = dict(lr_scheduler_type=config.lr_scheduler_type, optim='rmsprop', max_grad_norm=0.) | theirs
    arguments = DPOConfig(
        output_dir=str(tmp_path/'trl'), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        bf16=False, learning_rate=1e-3, logging_steps=1, report_to='none', save_strategy='no',
        gradient_checkpointing=False, precompute_ref_log_probs=True, seed=0, data_seed=0, disable_tqdm=True, **schedule)
    lm = load_model(config.model)
    trainer = DPOTrainer(lm.model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=lm.tokenizer)
    trainer.train()
    for our_row, their_row in zip(log(config.output_dir)[:3], trainer.state.log_history):
        for key in ('loss', 'logps/chosen', 'logps/rejected', 'rewards/margins', 'learning_rate'):
            assert our_row[key] == pytest.approx(their_row[key], rel=1e-5, abs=1e-6), key
    mine = weights(config.output_dir)
    own = lm.model.state_dict()
    for key in mine: torch.testing.assert_close(mine[key], own[key], rtol=0, atol=2e-5)  # 2% of one step of 1e-3

def run(*args, wait=True, **env):
    command = [sys.executable, '-m', 'ches_align', 'train', *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env)
    return (*process.communicate(timeout=120), process.returncode) if wait else process

@pytest.mark.full
def test_killed_and_continued(settings, home, tmp_path):
    "SIGKILL between two checkpoints; the continued run ends with the weights of an unbroken one, bit by bit on a CPU"
    file = tmp_path/'run.yaml'
    many = ['max_steps=20', 'save_steps=2', 'limit=8',
            'per_device_train_batch_size=1', 'gradient_accumulation_steps=1']
    file.write_text(f"kind: preference\nmodel: {home/'tiny'}\ndata: {home/'pairs.jsonl'}\nlearning_rate: 1e-4\n"
                    f'output_dir: {tmp_path/"killed"}\n')
    process = run(file, '--set', *many, wait=False)
    deadline = time.time() + 100
    while not (tmp_path/'killed/checkpoints/checkpoint-4/trainer_state.json').exists() and time.time() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not json.loads((tmp_path/'killed/manifest.json').read_text())['complete']
    assert not (tmp_path/'killed/model').exists()
    (tmp_path/'killed/checkpoints/checkpoint-18').mkdir(exist_ok=True)  # as a kill while writing would leave it
    config = load_config(file, KINDS, many)
    with pytest.raises(ChesError, match='continue it with --resume'): train_preferences(config)
    manifest = train_preferences(config, resume=True)
    assert 2 <= manifest['sessions'][0]['from_step'] < 20 and manifest['steps'] == 20
    train_preferences(load_config(file, KINDS, [*many, f'output_dir={tmp_path}/whole']))
    killed = weights(tmp_path/'killed')
    whole = weights(tmp_path/'whole')
    assert all(torch.equal(killed[k], whole[k]) for k in killed)
    unbroken = [row['loss'] for row in log(tmp_path/'whole') if 'loss' in row]
    assert [row['loss'] for row in log(tmp_path/'killed') if 'loss' in row] == unbroken

def test_lora(settings, home):
    config = settings(lora=Lora(r=2, target_modules=['q_proj', 'v_proj']), save_steps=1)
    train_preferences(config)
    rows = log(config.output_dir)
    assert rows[0]['loss'] == pytest.approx(torch.log(torch.tensor(2.)).item(), abs=1e-5)  # adapters off: the reference
    tuned = load_model(f'{config.output_dir}/model')
    base = load_model(config.model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad(): change = (tuned.model(ids).logits - base.model(ids).logits).abs().max()
    assert 0 < change < 1 and not (Path(config.output_dir)/'model/model.safetensors').exists()
    again = settings(model=f'{config.output_dir}/model', output_dir=f'{config.output_dir}_2', max_steps=1,
                     learning_rate=1e-9)
    train_preferences(again)  # an adapter is folded into its base, and all weights are trained on
    once_more = load_model(f'{again.output_dir}/model')
    with torch.no_grad(): change = (once_more.model(ids).logits - tuned.model(ids).logits).abs().max()
    assert change < 1e-4

def test_eval_and_probes_are_held_out(settings):
    manifest = train_preferences(config := settings(eval_share=0.25, displacement=Displacement(probes=4, every=1)))
    assert manifest['counts'] == dict(rows=16, status=dict(ok=16), train=8, eval=4, probes=4)
    rows = log(config.output_dir)
    assert any('eval_loss' in row for row in rows) and any('displacement/chosen_change' in row for row in rows)

def test_flagged_rows_are_told_and_left_out(settings, tmp_path):
    path = tmp_path/'odd.jsonl'
    good = [dict(prompt=f'Q{i}:', chosen=' a', rejected=' b') for i in range(8)]
    path.write_text(''.join(json.dumps(r) + '\n' for r in [*good, dict(prompt='p', chosen=' a', rejected=' a')]))
    with pytest.warns(UserWarning, match='1 of 9 pairs are left out: 1 identical'):
        assert train_preferences(settings(data=str(path)))['counts']['status'] == dict(ok=8, identical=1)
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "a"}\n' * 3)
    with pytest.raises(ChesError, match='no pair can be trained on'):
        train_preferences(settings(data=str(path), output_dir=str(tmp_path/'x')))

def test_coarse_weights_are_told(settings):
    with pytest.warns(UserWarning, match='too coarse for steps of 1e-07 and will not move: train fp32 weights'):
        train_preferences(settings(dtype='bfloat16', learning_rate=1e-7, max_steps=1))

def test_destroyed_weights_end_the_run(settings):
    with pytest.raises(ChesError, match='the weights are destroyed.*lower the learning rate'):
        train_preferences(settings(optim='sgd', learning_rate=1e12, max_steps=4))
    assert not (Path(settings().output_dir)/'model').exists()

@pytest.mark.parametrize('change, says', [
    (dict(loss='dpoo'), "unknown loss 'dpoo': did you mean dpo?"),
    (dict(loss='simpo', loss_args=dict(gama=1.)), "loss simpo: unknown argument 'gama': did you mean gamma?"),
    (dict(beta=0.), 'loss dpo: beta = 0.0: must be positive'),
    (dict(lerning_rate=1.), "line 4: unknown key 'lerning_rate': did you mean learning_rate?"),
    (dict(optim='adam'), "unknown value 'adam': did you mean adamw_torch?"),
    (dict(lora=dict(rank=3)), "unknown key 'lora.rank'"),
    (dict(displacement=dict(stop=dict(share_faling=.5))), "unknown key 'displacement.stop.share_faling': did you mean"),
    (dict(max_steps=0), 'key max_steps: must be at least 1, is 0'),
])
def test_a_slip_in_the_file(tmp_path, change, says):
    content = dict(kind='preference', model='m', data='d') | change
    (tmp_path/'run.yaml').write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigError) as error: load_config(tmp_path/'run.yaml', KINDS)
    assert says in str(error.value) and 'run.yaml' in str(error.value)

def test_wrong_input(settings, home, tmp_path):
    with pytest.raises(ChesError, match='no such file'): train_preferences(settings(data='no.jsonl'))
    with pytest.raises(ChesError, match='no such file or folder'): train_preferences(settings(model='./no/model'))
    for targets, says in ((['query', 'q_proj'], 'has no query; its linear layers are down_proj, gate_proj'),
                          ('.*query', r'has no \.\*query')):
        with pytest.raises(ChesError, match=f'lora.target_modules: the model {says}'):
            train_preferences(settings(lora=Lora(target_modules=targets)))
        fresh(tmp_path/'out')
    half = load_model(str(home/'tiny')).model.to(torch.float16)
    half.save_pretrained(tmp_path/'half')
    AutoTokenizer.from_pretrained(home/'tiny').save_pretrained(tmp_path/'half')
    with pytest.raises(ChesError, match='weights in float16 cannot be trained'):
        train_preferences(settings(model=str(tmp_path/'half'), dtype='auto'))
    fresh(tmp_path/'out')
    with pytest.raises(ChesError, match='cannot be set up: tensorbord'):
        train_preferences(settings(report_to='tensorbord'))
    fresh(tmp_path/'out')
    train_preferences(settings(max_steps=1))
    with pytest.raises(ChesError, match='holds another run .*learning_rate was 0.001, is 0.01'):
        train_preferences(settings(max_steps=1, learning_rate=1e-2), resume=True)
    (tmp_path/'other').mkdir()
    (tmp_path/'other/manifest.json').write_text('{}')
    with pytest.raises(ChesError, match='its manifest is of format 1, this version reads format 2'):
        train_preferences(settings(output_dir=str(tmp_path/'other')))
    _, error, code = run(tmp_path/'absent.yaml')
    assert code == 1 and error.strip().splitlines()[-1].startswith('ches train: ') and 'Traceback' not in error

@pytest.mark.parametrize('path', sorted((ROOT/'configs/preference').glob('*.yaml')), ids=lambda p: p.stem)
def test_committed_configurations_parse(path):
    config = load_config(path, KINDS)
    assert config.data == 'sample' and config.displacement.probes == 16
    if path.stem == 'smollm2_lora': assert '134.5M parameters, 2.4M trained' in check(config)

def test_committed_launch_files_parse():
    from accelerate.commands.config.config_args import load_config_from_file
    launches = {p.stem: load_config_from_file(str(p)) for p in (ROOT/'configs/accelerate').glob('*.yaml')}
    assert {k: v.num_processes for k, v in launches.items()} == dict(one_gpu=1, ddp_2gpu=2, fsdp_2gpu=2, fsdp_4gpu=4)
    assert all(v.fsdp_config['fsdp_version'] == 2 for k, v in launches.items() if k.startswith('fsdp'))

@pytest.mark.full
def test_one_process_where_two_were_asked_for_is_told(home, tmp_path):
    (tmp_path/'run.yaml').write_text(f"kind: preference\nmodel: {home/'tiny'}\ndata: {home/'pairs.jsonl'}\n"
                                     'per_device_train_batch_size: 2\n'
                                     f'gradient_accumulation_steps: 1\nmax_steps: 1\noutput_dir: {tmp_path}/out\n')
    launch = ['accelerate.commands.launch', '--config_file', ROOT/'configs/accelerate/ddp_2gpu.yaml', '--cpu',
              '--num_processes', '2', '-m', 'ches_align', 'train', tmp_path/'run.yaml']
    done = subprocess.run([sys.executable, '-m', *map(str, launch)], capture_output=True, text=True, timeout=120,
                          env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count('asked for several processes and has started one') == 1, done.stderr[-2000:]

def test_two_processes(settings, home, tmp_path):
    "Both see half of each step's pairs; the weights are those of one process with the same pairs a step"
    (tmp_path/'run.yaml').write_text(f"kind: preference\nmodel: {home/'tiny'}\ndata: {home/'pairs.jsonl'}\n"
                                     'per_device_train_batch_size: 2\n'
                                     'gradient_accumulation_steps: 1\nmax_steps: 2\nlearning_rate: 1e-3\n')
    launch = ['accelerate.commands.launch', '--config_file', ROOT/'configs/accelerate/ddp_2gpu.yaml', '-m']
    command = [sys.executable, '-m', *map(str, launch), 'ches_align', 'train', str(tmp_path/'run.yaml')]
    done = subprocess.run([*command, '--set', f'output_dir={tmp_path}/two'], capture_output=True, text=True,
                          timeout=120, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path/'two/manifest.json').read_text())
    assert manifest['processes'] == 2 and manifest['steps'] == 2 and done.stdout.count('step 1/2') == 1
    train_preferences(settings(per_device_train_batch_size=4, gradient_accumulation_steps=1,
                               output_dir=str(tmp_path/'one')))
    two = weights(tmp_path/'two')
    one = weights(tmp_path/'one')
    for key in two: torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-5)  # 2% of one step of 1e-3
