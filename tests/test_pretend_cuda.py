"Loading and scoring keep their tensors on one device, or where a model is spread; asked on GPUs that are pretended."
import os
from dataclasses import replace

import pytest
import torch
import torch._dynamo  # what is imported while torch pretends would see patched names
from accelerate import dispatch_model
from pretend_cuda import DeviceMix, pretend, said

from ches_align.lm.tiny import save_tiny_model
from ches_align.lm import models
from ches_align.audit import shared_prompts
from ches_align.lm.pairs import load_pairs
from ches_align.core.errors import ChesError
from ches_align.lm.encode import encode_pairs
from ches_align.lm.batches import response_states
from ches_align.lm.models import load_model, wrap_model
from ches_align.audit.pair_scores import score_block

PLACES = {'model.embed_tokens': 0, 'model.rotary_emb': 0, 'model.layers.0': 0, 'model.layers.1': 1, 'model.norm': 1}

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Two small models, with tied embeddings and without"
    home = tmp_path_factory.mktemp('models')
    lm = load_model(str(save_tiny_model(home/'tied')), device='cpu')
    untied = type(lm.model)(type(lm.model.config)(**lm.model.config.to_dict() | dict(tie_word_embeddings=False)))
    untied.save_pretrained(home/'untied')
    lm.tokenizer.save_pretrained(home/'untied')
    return home

@pytest.fixture(scope='module')
def pairs(folders):
    tokenizer = load_model(str(folders/'tied'), device='cpu').tokenizer
    return [e for e in encode_pairs(load_pairs('sample', limit=6), tokenizer, 256) if e.status == 'ok']

def scores(lm, pairs, share=False): return str(score_block(lm, pairs, batch_tokens=2048, share_prompt=share))

@pytest.mark.parametrize('share', [False, True])
@pytest.mark.parametrize('name', ['tied', 'untied'])
def test_one_gpu_gives_the_numbers_of_the_cpu(folders, pairs, name, share):
    want = scores(load_model(str(folders/name), device='cpu'), pairs, share)
    with pretend():
        lm = load_model(str(folders/name), device='cuda')
        assert lm.device == torch.device('cuda', 0) and all(said(p) == lm.device for p in lm.model.parameters())
        assert scores(lm, pairs, share) == want
        assert all(said(s) == lm.device for s in response_states(lm, [[5, 6]], [[7, 8, 9]]))

@pytest.mark.parametrize('name', ['tied', 'untied'])
def test_two_gpus_give_the_numbers_of_the_cpu(folders, pairs, name):
    "As Accelerate spreads a model: a tied head stays with the embeddings, the last norm is on the other GPU"
    lm = load_model(str(folders/name), device='cpu')
    want = scores(lm, pairs)
    with pretend(2):
        spread = dispatch_model(lm.model, PLACES | dict(lm_head=0 if name == 'tied' else 1), force_hooks=True)
        got = wrap_model(spread, lm.tokenizer)
        assert {str(said(p)) for p in spread.parameters()} == {'cuda:0', 'cuda:1'}
        assert got.device.index == (0 if name == 'tied' else 1)
        assert scores(got, pairs) == want

def test_the_command_spreads_by_itself(folders, pairs, monkeypatch):
    monkeypatch.setitem(os.environ, 'HF_DEACTIVATE_ASYNC_LOAD', '1')  # the pretence is one thread's
    want = scores(load_model(str(folders/'tied'), device='cpu'), pairs)
    with pretend(2): assert scores(load_model(str(folders/'tied'), device='auto'), pairs) == want

def test_weights_left_on_the_disk(folders, tmp_path):
    lm = load_model(str(folders/'tied'), device='cpu')
    places = {place: 'cpu' for place in PLACES} | {'model.layers.1': 'disk', 'lm_head': 'cpu'}
    spread = dispatch_model(lm.model, places, main_device='cpu', offload_dir=str(tmp_path), force_hooks=True)
    with pytest.raises(ChesError, match='do not fit on the GPUs here.*--quantize 4bit'):
        wrap_model(spread, lm.tokenizer)

def test_a_gpu_that_is_not_there(folders):
    with pretend(2), pytest.raises(ChesError, match='device cuda:7: this machine has 2, cuda:0 to cuda:1'):
        load_model(str(folders/'tied'), device='cuda:7')

def left_on_the_cpu(inputs, *args, **kwargs): return inputs

@pytest.mark.parametrize('fault', ['inputs', 'head', 'states'])
def test_planted_faults_are_seen(folders, pairs, monkeypatch, fault):
    "The pretended GPU raises what a real one would"
    with pretend(2 if fault == 'states' else 1):
        lm = load_model(str(folders/'tied'), device='cuda')
        if fault == 'inputs': monkeypatch.setattr(shared_prompts, 'send_to_device', left_on_the_cpu)
        if fault == 'head': lm = replace(lm, head=lm.head._replace(weight=lm.head.weight.cpu()))
        if fault == 'states':  # without the move to the device of the output layer
            monkeypatch.setattr(models, '_head_logits', lambda head, hidden: hidden @ head.weight.T)
            with pytest.raises(DeviceMix):
                wrap_model(dispatch_model(lm.model.cpu(), PLACES | dict(lm_head=0), force_hooks=True), lm.tokenizer)
            return
        with pytest.raises(DeviceMix, match='same device'): scores(lm, pairs)
