"The watch of reward spread inside TRL: it reaches the log, every integration and callback, and ends no training."
import asyncio

import pandas as pd
import pytest
import torch

from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
import transformers.integrations.integration_utils as utils

from ches_align.core.errors import ChesError
from ches_align.lm.weights import model_source
from ches_align.spread.watch import SpreadCallback, SpreadWatch, read_rollouts, watch_reward

trl = pytest.importorskip('trl')
TOKENIZER = AutoTokenizer.from_pretrained(model_source('smollm2-135m'))


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=32,
                                        num_hidden_layers=1, num_attention_heads=2, pad_token_id=2))


def trained(folder, reward, data, callbacks=(), kind='GRPO', order=None, **settings):
    "A trainer after three steps of two groups of four"
    options = dict(max_steps=3, per_device_train_batch_size=8, num_generations=4, max_completion_length=6,
                   report_to='none', logging_steps=1, use_cpu=True, bf16=False, save_strategy='no', disable_tqdm=True)
    if kind == 'RLOO': options |= dict(beta=0.)  # a reference is loaded by its name otherwise
    args = getattr(trl, f'{kind}Config')(str(folder), **options | settings)
    trainer = getattr(trl, f'{kind}Trainer')(model(), reward, args, Dataset.from_list(data), callbacks=list(callbacks),
                                             processing_class=TOKENIZER)
    if order: order(trainer.callback_handler.callbacks)
    trainer.train()
    return trainer


def tasks(count=24): return [dict(prompt='play the game', level=i) for i in range(count)]


def level_pays(prompts, completions, level, **_): return [float(x % 2) for x in level]


@pytest.fixture
def board(monkeypatch):
    "An integration of `report_to`, and what it was given"
    class Board(TrainerCallback):
        given: list = []
        def on_log(self, args, state, control, logs=None, **kwargs): Board.given.append(dict(logs))
    Board.given = []
    monkeypatch.setitem(utils.INTEGRATION_TO_CALLBACK, 'tensorboard', Board)
    monkeypatch.setattr(utils, 'is_tensorboard_available', lambda: True)
    return Board


@pytest.mark.parametrize('kind', ['GRPO', 'RLOO'])
@pytest.mark.parametrize('order', [None, lambda callbacks: callbacks.reverse()])
def test_numbers_reach_log_and_boards(tmp_path, board, kind, order):
    watch = SpreadWatch((0, 1), tell=lambda text: None)
    trainer = trained(tmp_path, watch_reward(level_pays, watch), tasks(), [SpreadCallback(watch)], kind, order,
                      report_to='tensorboard')
    logged = [line for line in trainer.state.log_history if 'spread/zero' in line]
    boards = [logs for logs in board.given if 'spread/zero' in logs]
    assert [line['step'] for line in logged] == [1, 2, 3] and len(boards) == 3
    assert [line['spread/zero'] for line in logged] == [logs['spread/zero'] for logs in boards] == [1.]*3
    if kind == 'GRPO': assert [line['frac_reward_zero_std'] for line in logged] == [1.]*3
    assert watch.table().groups.tolist() == [2]*3
    assert watch.prompts().times.sum() == 6 and len(watch.prompts()) == 6  # six rows of the data with one prompt


def test_another_trainer_reaches_its_board(tmp_path, board):
    "A loop that calls `update` itself, with TRL nowhere"
    watch = SpreadWatch((0, 1), tell=lambda text: None)
    class Steps(TrainerCallback):
        def on_step_end(self, *args, **kwargs): watch.update(['a', 'a', 'b', 'b'], [0, 0, 0, 1])
    ids = torch.arange(8)
    args = TrainingArguments(str(tmp_path), max_steps=4, logging_steps=2, use_cpu=True, report_to='tensorboard',
                             save_strategy='no', disable_tqdm=True)
    trainer = Trainer(model(), args, train_dataset=[dict(input_ids=ids, labels=ids)]*8,
                      callbacks=[SpreadCallback(watch), Steps()])
    trainer.train()
    logged = [line for line in trainer.state.log_history if 'spread/zero' in line]
    assert [(line['step'], line['spread/zero']) for line in logged] == [(2, .5), (4, .5)]
    assert [logs['spread/zero'] for logs in board.given if 'spread/zero' in logs] == [.5, .5]


async def slow(prompts, completions, **_):
    await asyncio.sleep(0)
    return [float(len(c) % 2) for c in completions]


class Judge:
    async def __call__(self, prompts, completions, **_): return [None if i % 3 else 1. for i in range(len(completions))]


def half(prompts, completions, **_): return torch.ones(len(completions), dtype=torch.bfloat16)


@pytest.mark.parametrize('reward', [slow, Judge(), half])
def test_a_run_that_works_works_watched(tmp_path, reward):
    data = [dict(prompt=f'task {i}') for i in range(8)]
    def weights(some): return [p.detach().clone() for p in some.model.parameters()]
    plain = weights(trained(tmp_path/'a', reward, data))
    heard = []
    watch = SpreadWatch((0, 1), {}, tell=heard.append)
    watched = weights(trained(tmp_path/'b', watch_reward(reward, watch), data, [SpreadCallback(watch)]))
    assert all(torch.equal(p, q) for p, q in zip(plain, watched, strict=True))
    assert len(watch.steps) == 3 and heard == []


def test_evaluation_is_left_out(tmp_path):
    watch = SpreadWatch((0, 1), {}, tell=lambda text: None)
    args = trl.GRPOConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=8, per_device_eval_batch_size=8,
                          num_generations=4, max_completion_length=4, report_to='none', use_cpu=True, bf16=False,
                          save_strategy='no', disable_tqdm=True, eval_strategy='steps', eval_steps=1)
    data = Dataset.from_list(tasks(8))
    trl.GRPOTrainer(model(), watch_reward(level_pays, watch), args, data, data, processing_class=TOKENIZER).train()
    assert len(watch.steps) == 2


def test_trl_log_is_read(tmp_path):
    "Completions as TRL writes them: one prompt in all rows, so only the advantages tell the groups"
    def form(completions, **_): return [.25 if len(c) % 2 else None for c in completions]
    trainer = trained(tmp_path, [level_pays, form], tasks(), log_completions=True)
    heard = []
    watch = read_rollouts(tmp_path, watch=SpreadWatch((0, 2), {}, tell=heard.append))
    assert heard[0] == 'columns: prompt=prompt, response=completion, step=step, reward=level_pays+form'
    written = pd.concat(map(pd.read_parquet, sorted((tmp_path/'completions').glob('*.parquet'))))
    assert len(written) == 24 and watch.table().step.tolist() == [1, 2, 3]
    if 'groups of 4' in heard[1]:
        zero = [line['frac_reward_zero_std'] for line in trainer.state.log_history if 'reward' in line]
        assert watch.table().zero.tolist() == zero and watch.table().groups.tolist() == [2]*3
    else: assert 'groups of 2' in heard[1], heard  # by chance smaller blocks fit too
    alone = read_rollouts(tmp_path, dict(reward='level_pays'), SpreadWatch((0, 1), {}, tell=heard.append))
    assert len(alone.steps) == 3


def always_one(completions, log_extra, **_):
    log_extra('length', [float(i) for i, _ in enumerate(completions)])
    return [1.]*len(completions)


def odd(completions, log_extra, **_):
    log_extra('length', [float(i) for i, _ in enumerate(completions)])
    return [float(len(c) % 2) for c in completions]


def even(completions, **_): return [1. - len(c) % 2 for c in completions]


@pytest.mark.parametrize('scale', ['group', 'batch', 'none'])
@pytest.mark.parametrize('rewards', [[always_one], [odd]])
def test_numbers_beside_the_rewards_are_none(tmp_path, rewards, scale):
    data = [dict(prompt=f'task {i}') for i in range(8)]
    trainer = trained(tmp_path, rewards, data, log_completions=True, scale_rewards=scale)
    heard = []
    watch = read_rollouts(tmp_path, watch=SpreadWatch((0, 1), {}, tell=heard.append))
    lines = [line for line in trainer.state.log_history if 'reward' in line]
    assert heard[0].endswith(f'reward={rewards[0].__name__}') and len(lines) == 3, heard
    assert watch.table()['mean'].tolist() == pytest.approx([line['reward'] for line in lines])
    if scale != 'batch':  # there TRL counts batches
        assert watch.table().zero.tolist() == [line['frac_reward_zero_std'] for line in lines]


@pytest.mark.parametrize('weights', [[1, 3], [-1, -1], [0, 1]])
def test_weights_are_named_or_the_log_is_refused(tmp_path, weights):
    data = [dict(prompt=f'task {i}') for i in range(8)]
    trainer = trained(tmp_path, [odd, even], data, log_completions=True, reward_weights=list(map(float, weights)))
    lines = [line for line in trainer.state.log_history if 'reward' in line]
    if weights != [-1, -1]:  # a constant sum
        with pytest.raises(ChesError, match='follow from no sum of odd, even, length: name the rewards'):
            read_rollouts(tmp_path)
    named = dict(reward=f'odd*{weights[0]}+even*{weights[1]}')
    watch = read_rollouts(tmp_path, named, SpreadWatch(limits={}, tell=lambda text: None))
    assert watch.table().zero.tolist() == [line['frac_reward_zero_std'] for line in lines] and len(lines) == 3
    assert watch.table()['mean'].tolist() == pytest.approx([line['reward'] for line in lines])
