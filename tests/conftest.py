"What every test runs under; it must stand before the first import of a library that reads it."
import os
import sys
from pathlib import Path

import pytest

# HF_HUB_OFFLINE=0 pytest --flags hub ... overrides
for name, value in dict(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg', TQDM_DISABLE='1').items():
    os.environ.setdefault(name, value)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'.ci'))

def save_tiny(where: Path) -> Path:
    "A made-up model of two layers with the embedded model's tokenizer, as a folder that a command can load"
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from ches_align.audit.model_files import model_source
    tokenizer = AutoTokenizer.from_pretrained(model_source('smollm2-135m'))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "On several workers the tests of a file, which share what is slow to make, stay together; a notebook goes anywhere"
    for item in items:
        if item.path.stem != 'test_notebooks': item.add_marker(pytest.mark.xdist_group(item.path.stem))

def pytest_addoption(parser):
    parser.addoption('--flags', default='', help="run notebook cells with these flags too: --flags 'slow trl'")
