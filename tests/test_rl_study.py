"A study of finetuning by reward and by labels as a user runs it: killed and continued, and with what cannot work."
import json

import pytest
import yaml
from commands import killed, lines, refused, run

from ches_align.lm.tiny import save_tiny_model

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp('rl')
    save_tiny_model(where/'model')
    rows = [dict(prompt=f'Say {w}', answer=w) for w in ('one', 'two', 'six', 'ten', 'low', 'red')]
    (where/'tasks.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    study = dict(kind='rl', model='model', tasks='tasks.jsonl', reward='contains', test=.34, responses=4,
                 sampling=dict(max_new_tokens=3), apply_chat_template='no', save_steps=10,
                 sft=dict(learning_rate=3e-2, epochs=50, batch=4),
                 rft=dict(learning_rate=1e-3, steps=3, prompts=4, group=2),
                 arms=dict(rft=dict(rft={}), sft_rft=dict(sft={}, rft={}), partial=dict(sft=dict(labels=.5, steps=.4))))
    (where/'study.yaml').write_text(yaml.safe_dump(study))
    return where

@pytest.mark.full
def test_killed_and_run_again(place):
    "Finished arms stay, the cut one goes on; lines, table and picture are those of a run in one go"
    done = run(place, 'train', 'study.yaml', '--set', 'output_dir=whole')
    assert done.returncode == 0, done.stderr
    assert '1 seed of 3 arms' in done.stdout and 'table: whole/table.csv' in done.stdout, done.stdout
    begun = place/'killed'/'.arm_work'/'sft_rft_0'/'sft.safetensors'
    killed(place, begun, 'train', 'study.yaml', '--set', 'output_dir=killed')
    assert 1 <= len(lines(place/'killed'/'runs.jsonl')) < 4 and not (place/'killed'/'table.csv').exists()
    assert run(place, 'train', 'study.yaml', '--set', 'output_dir=killed').returncode == 0
    assert lines(place/'killed'/'runs.jsonl') == lines(place/'whole'/'runs.jsonl')
    assert (place/'killed'/'table.csv').read_text() == (place/'whole'/'table.csv').read_text()
    assert (place/'killed'/'stages.png').exists()
    after, = (r['after_sft']['rewards'] for r in lines(place/'whole'/'runs.jsonl') if r['arm'] == 'sft_rft')
    assert (learnt := sum(map(sum, after[:4]))/16) > .9, (learnt, 'finetuning on the answers gives the answers')
    for change, says in (('arms.rft.rft.steps=9', 'arm rft was run with other settings'),
                         ('responses=5', 'holds another study (study.responses was 4, is 5')):
        assert says in run(place, 'train', 'study.yaml', '--set', 'output_dir=whole', change).stderr

def first_change(value): return value[0] if isinstance(value, list) else ''

@pytest.mark.parametrize('changes, words', [
    (['tasks=nowhere.jsonl'], 'no such file'), (['tasks=grue/squad'], 'one of narrative_qa'),
    (['reward=bleurt'], 'one of exact_match'), (['model=nowhere'], 'nowhere'),
    (['arms={a: {ppo: {}}}'], 'one of sft, rft'), (['rft.lr=1'], "unknown key 'rft.lr'"),
    (['rft.clip=null', 'rft.epochs=2'], 'on-policy'), (['test=1.5'], 'key test: must be at least 0 and below 1'),
    (['reward=format'], 'format needs an expression'), (['reward_range=[-2, -1]'], 'leave the range -2 to -1')],
    ids=first_change)
def test_what_cannot_work(place, tmp_path, changes, words, monkeypatch):
    "One line and exit code 1"
    monkeypatch.chdir(place)
    assert words in refused('train', 'study.yaml', set=[f"output_dir={tmp_path/'out'}", *changes])

def test_a_data_set_of_grue_with_an_encoder_decoder(place):
    "Rows of the public schema, prompts cut, KL penalty and several epochs, on a made-up T5"
    import torch
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration
    from ches_align.studies.rl_plan import RLStudy
    from ches_align.studies.rl_study import run_rl
    tokenizer = AutoTokenizer.from_pretrained(place/'model')
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                      decoder_start_token_id=0, dropout_rate=0., pad_token_id=tokenizer.pad_token_id,
                      eos_token_id=tokenizer.eos_token_id)
    T5ForConditionalGeneration(config).save_pretrained(place/'t5')
    tokenizer.save_pretrained(place/'t5')
    rows = [dict(translation=dict(en=f'A sentence with the number {i}, and more words after it', de=f'Satz {i}'))
            for i in range(6)]
    (place/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    study = RLStudy(model=str(place/'t5'), tasks=f"grue/iwslt={place/'rows.jsonl'}", reward='exact_match',
                    output_dir=str(place/'grue'), limit=4, prompt_tokens=8, responses=2, apply_chat_template='no',
                    sampling=dict(max_new_tokens=4, top_k=10), sft=dict(learning_rate=1e-2, batch=2, epochs=2),
                    rft=dict(steps=2, prompts=4, minibatch=2, epochs=2, kl=.01, kl_target=1., entropy=.01),
                    arms=dict(both=dict(sft={}, rft={})))
    start, both = run_rl(study, progress=False)
    assert len(start['prompts']) == 4 and len(both['sft']) == 4 and len(both['rft']) == 2
    assert both['rft'][0]['kl'] == .01
    assert [len(r) for r in both['after']['rewards']] == [2]*4 and both['after']['failed'] == 0
