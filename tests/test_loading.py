"Adapters where a model's name is asked for: by the commands, and from the hub's cache; and what loading leaves behind."
import json
import os
import shutil
import subprocess
import sys

import pytest
from commands import done

from ches_align.lm.tiny import save_tiny_model
from ches_align.lm.adapters import model_parts
from ches_align.lm.models import load_model

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A base without a chat template, and an adapter with its own"
    from peft import LoraConfig, get_peft_model
    place = tmp_path_factory.mktemp('loading')
    lm = load_model(str(save_tiny_model(place/'base')), device='cpu')
    config = LoraConfig(task_type='CAUSAL_LM', target_modules=['q_proj', 'down_proj'], init_lora_weights=False)
    lm.model.name_or_path = str(place/'base')
    get_peft_model(lm.model, config).save_pretrained(place/'lora')
    lm.tokenizer.save_pretrained(place/'lora')
    lm.tokenizer.chat_template = None
    shutil.rmtree(place/'base'/'chat_template.jinja', ignore_errors=True)
    for file in place.glob('base/chat_template*'): file.unlink()
    lm.tokenizer.save_pretrained(place/'base')
    rows = [dict(prompt=f'Say {i}', answer='a') for i in range(3)]
    (place/'prompts.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return place

def manifest(folder): return json.loads((folder/'manifest.json').read_text())

def test_generation_takes_an_adapter_with_its_tokenizer(home, tmp_path):
    common = dict(max_new_tokens=4, device='cpu')
    done('generate', home/'prompts.jsonl', model=home/'lora', output_dir=tmp_path/'lora', **common)
    done('generate', home/'prompts.jsonl', model=home/'base', output_dir=tmp_path/'base', **common)
    both = [manifest(tmp_path/name) for name in ('lora', 'base')]
    assert [m['tokenizer_from'] for m in both] == ['adapter', 'model']
    assert [bool(m['template_hash']) for m in both] == [True, False]
    assert both[0]['weights_hash'] != both[1]['weights_hash']

def test_refusals_and_rewards_take_an_adapter(home, tmp_path):
    done('refusal-rate', home/'prompts.jsonl', model=home/'base', adapter=home/'lora', output_dir=tmp_path/'rate',
         max_new_tokens=4, device='cpu')
    assert json.loads((tmp_path/'rate'/'refusals.json').read_text())
    done('spread', home/'prompts.jsonl', reward='contains', model=home/'lora', output_dir=tmp_path/'spread',
         max_new_tokens=2, max_responses=4, min_responses=2, device='cpu')
    assert manifest(tmp_path/'spread'/'round0')['tokenizer_from'] == 'adapter'

FROM_THE_HUB = """
import ctypes, json, sys
from ches_align.lm.models import load_model
from ches_align.lm.adapters import model_parts
from ches_align.cli.main import keep_freed_memory

def kept(size=200 << 20):
    "Does the C library keep a large block that was freed?"
    def resident(): return int(open('/proc/self/statm').read().split()[1])*4096
    libc = ctypes.CDLL('libc.so.6')
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before, block = resident(), libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resident() - before > size/2

lm = load_model('someone/lora', device='cpu')
library = kept()
said = [lm.provenance[key] for key in ('tokenizer_from', 'weights_hash')]
print(json.dumps([*said, library, keep_freed_memory(), kept()]))
"""

def test_an_adapter_in_the_cache_of_the_hub_and_no_memory_is_kept(home, tmp_path):
    "Offline, by its name; and loading as a library leaves the C library's memory as it is, which a command does not"
    repository = tmp_path/'models--someone--lora'
    shutil.copytree(home/'lora', repository/'snapshots'/'abc')
    (repository/'refs').mkdir()
    (repository/'refs'/'main').write_text('abc')
    env = os.environ | dict(HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE='1')
    done = subprocess.run([sys.executable, '-c', FROM_THE_HUB], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whose, digest, library, able, command = json.loads(done.stdout.splitlines()[-1])
    assert (whose, digest) == ('adapter', load_model(str(home/'lora'), device='cpu').provenance['weights_hash'])
    assert not library and command == able

def test_the_base_is_read_at_the_revision_that_the_adapter_names(home, tmp_path):
    shutil.copytree(home/'lora', tmp_path/'lora')
    settings = json.loads((tmp_path/'lora'/'adapter_config.json').read_text())
    settings |= dict(revision='v2', base_model_name_or_path='someone/base')
    (tmp_path/'lora'/'adapter_config.json').write_text(json.dumps(settings))
    assert [model_parts(str(tmp_path/'lora'), revision=r)[1:3] for r in (None, 'v3')] == [
        ('someone/base', 'v2'), ('someone/base', 'v3')]
