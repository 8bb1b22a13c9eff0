"Which architectures can be scored: tiny ones with random weights, each against its own logits, in fp32 and bf16."
import copy
import math
import warnings

import pytest
import torch
import transformers as tr

from ches_align.lm.pairs import load_pairs
from ches_align.core.errors import ChesError
from ches_align.lm.encode import encode_pairs
from ches_align.lm.structure import length_key, length_rules
from ches_align.lm.model_checks import check_model
from ches_align.lm.models import read_head, wrap_model
from ches_align.audit.scoring import score_dataset

SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8)
LONG = dict(rope_type='longrope', short_factor=[1.] * 4, long_factor=[3.] * 4, rope_theta=1e4)
RIGHT = {
    'llama': ('LlamaConfig', SIZES), 'gpt2': ('GPT2Config', dict(n_embd=32, n_layer=2, n_head=4, vocab_size=300)),
    'gpt_neo': ('GPTNeoConfig', dict(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
                                     attention_types=[[['global', 'local'], 1]], window_size=16)),
    'gemma2': ('Gemma2Config', SIZES | dict(head_dim=8, final_logit_softcapping=30., sliding_window=8)),
    'gemma3': ('Gemma3TextConfig', SIZES | dict(head_dim=8, sliding_window=8)),
    'phi3 longrope': ('Phi3Config', SIZES | dict(rope_parameters=LONG, original_max_position_embeddings=32)),
    'llama dynamic': ('LlamaConfig', SIZES | dict(rope_parameters=dict(rope_type='dynamic', factor=2., rope_theta=1e4),
                                                  max_position_embeddings=32)),
    'mistral': ('MistralConfig', SIZES | dict(sliding_window=8)), 'qwen3 moe': ('Qwen3MoeConfig', SIZES | MOE),
    'mamba': ('MambaConfig', dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8)),
    'gpt oss': ('GptOssConfig', SIZES | MOE | dict(sliding_window=8)), 'cohere': ('CohereConfig', SIZES),
    'bloom': ('BloomConfig', dict(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)),
    'opt': ('OPTConfig', dict(vocab_size=300, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
                              num_attention_heads=4, max_position_embeddings=256)),
}

def build(name: str, sizes: dict, dtype=torch.float32) -> torch.nn.Module:
    "Random weights, large enough for attention, cap and experts to matter"
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(getattr(tr, name)(**sizes)).eval().float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1: weight.normal_(0, .2)
    return model.to(dtype)

def check(model: torch.nn.Module) -> str:
    return check_model(model, model, model.base_model, read_head(model), 'tiny')

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('kind', RIGHT)
def test_right_ones_pass(kind, dtype): assert check(build(*RIGHT[kind], dtype)) == ''

class Words:
    "As much of a tokenizer as scoring asks for: a word is its number"
    eos_token = ' 2'
    eos_token_id = 2
    all_special_ids = [2]
    added_tokens_decoder = {}
    chat_template = None
    special_tokens_map = {}
    def __call__(self, texts, add_special_tokens=True):
        class Found: input_ids = [[int(w) for w in text.split()] for text in texts]
        return Found
    def decode(self, ids): return ' '.join(map(str, ids))
    def get_vocab(self): return {str(i): i for i in range(300)}
    def convert_ids_to_tokens(self, i): return str(i)

def rows(lengths):
    gen = torch.Generator().manual_seed(1)
    def words(count): return ' '.join(map(str, torch.randint(3, 300, (count,), generator=gen).tolist()))
    return [dict(prompt=words(p), chosen=' ' + words(c), rejected=' ' + words(r)) for p, c, r in lengths]

def own_logps(model, encoded) -> list[list[float]]:
    "From the model's own logits, one sequence at a time, by a fresh copy: nothing is kept from row to row"
    logps = []
    for row in encoded:
        pair = []
        for ids in (row.chosen_ids, row.rejected_ids):
            full = torch.tensor([[*row.prompt_ids, *ids]])
            with torch.no_grad(): logits = copy.deepcopy(model)(input_ids=full).logits[0].double()
            at = torch.arange(len(row.prompt_ids) - 1, full.shape[1] - 1)
            pair.append(logits.log_softmax(-1)[at, torch.tensor(list(ids))].sum().item())
        logps.append(pair)
    return logps

LENGTHS = [(12, 3, 4), (20, 30, 9), (25, 6, 7), (25, 8, 7), (10, 60, 2), (40, 5, 5), (28, 3, 30), (28, 4, 31)]

@pytest.mark.parametrize('share', ['no', 'yes'])
@pytest.mark.parametrize('kind', RIGHT)
def test_a_row_scores_as_it_would_alone(kind, share):
    "Whatever stands beside it and in whatever order, in rows on both sides of windows and of the original context"
    model = build(*RIGHT[kind])
    tokenizer = Words()
    with warnings.catch_warnings(): lm = wrap_model(model, tokenizer, kind)
    data = load_pairs(rows(LENGTHS) + rows(LENGTHS[3:5])[:1])
    expected = own_logps(model, encode_pairs(data, tokenizer))
    for order in (slice(None), slice(None, None, -1)):
        table = score_dataset(data[order], lm, max_length=200, share_prompt=share, batch_tokens=512, progress=False)
        table = table.sort_values('row_id')
        worst = max(abs(table[c].iloc[k] - want[side]) for side, c in enumerate(('chosen_logps', 'rejected_logps'))
                    for k, want in enumerate(expected))
        assert list(table.status) == ['ok'] * len(data) and worst < 2e-3 * max(abs(w) for p in expected for w in p) / 10

def test_keys_of_lengths():
    phi, dynamic = (length_rules(build(*RIGHT[k])) for k in ('phi3 longrope', 'llama dynamic'))
    assert [length_key(phi, n) for n in (32, 33, 90)] == [(0,), (1,), (1,)]
    assert [length_key(dynamic, n) for n in (32, 33, 90)] == [(0,), (33,), (90,)]
    assert length_rules(build(*RIGHT['gpt2'])) == []

class Changed(torch.nn.Module):
    "Another module in the place of a layer"
    def __init__(self, inner, change):
        super().__init__()
        self.inner = inner
        self.change = change

    def forward(self, states, *args, **kw): return self.change(self.inner(states, *args, **kw))

def drop_when_full(states):
    "A router with room for twelve tokens of a batch"
    flat = states.reshape(-1, states.shape[-1])
    room = torch.arange(len(flat), device=states.device) < 12
    return (flat * room[:, None]).view_as(states)

CHANGES = {'later tokens': lambda x: x + .05 * x.flip(1).cumsum(1).flip(1), 'capacity': drop_when_full,
           'batch mates': lambda x: x - .05 * x.mean(0), 'norm over the batch': lambda x: x / x.std((0, 1))}

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('change', CHANGES)
def test_states_that_look_elsewhere_are_refused(change, dtype):
    model = build(*RIGHT['llama'], dtype)
    model.model.layers[0].mlp = Changed(model.model.layers[0].mlp, CHANGES[change])
    with pytest.raises(ChesError, match='its hidden states depend on'): check(model)

def test_xlnet_is_refused():
    model = build('XLNetConfig', dict(vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=48))
    with pytest.raises(ChesError, match='depend on later tokens'): wrap_model(model, Words(), 'xlnet')

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('cap', [5., 30., 100.])
def test_a_cap_that_is_not_read_is_noticed(cap, dtype):
    "Under whatever name it stands, and where the model's own logits are too small to be bent"
    sizes = SIZES | dict(head_dim=8, final_logit_softcapping=cap, sliding_window=8)
    model = build('Gemma2Config', sizes, dtype)
    with torch.no_grad(): model.lm_head.weight.mul_(.1)
    assert check(model) == ''
    bare = read_head(model)._replace(softcap=None)
    with pytest.raises(ChesError, match='not its output layer'):
        check_model(model, model, model.base_model, bare, 'tiny')

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a_changed_head_is_noticed(dtype):
    model = build(*RIGHT['llama'], dtype)
    wrong = read_head(model)
    for other in (wrong._replace(scale=1.02), wrong._replace(bias=.1 * torch.randn(300).to(dtype))):
        with pytest.raises(ChesError, match='not its output layer'):
            check_model(model, model, model.base_model, other, 'tiny')

def test_ids_beyond_the_embedding_flag_their_rows():
    lm = wrap_model(build(*RIGHT['llama']), Words(), 'tiny')
    data = rows(LENGTHS[:3])
    data[1]['rejected'] += ' 555'
    with pytest.warns(UserWarning, match=r'no embedding for \(300 rows\): 555'):
        table = score_dataset(data, lm, progress=False)
    assert table.status.tolist() == ['ok', 'bad_token', 'ok'] and math.isnan(table.ches[1])
    assert table.attrs['manifest']['counts'] == {'ok': 2, 'bad_token': 1}

def test_rows_longer_than_the_table_of_positions_are_told_before_scoring():
    model = build('GPT2Config', RIGHT['gpt2'][1] | dict(n_positions=64))
    lm = wrap_model(model, Words(), 'gpt2')
    with pytest.raises(ChesError, match='give --max_length 64 or less'):
        score_dataset(rows([(40, 30, 9)]), lm, max_length=100, progress=False)

def test_adapters_as_given():
    peft = pytest.importorskip('peft')
    base = build(*RIGHT['llama'])
    config = dict(task_type='CAUSAL_LM', num_virtual_tokens=4)
    for kind in (peft.PromptTuningConfig(**config), peft.PrefixTuningConfig(**config),
                 peft.PromptEncoderConfig(**config, encoder_hidden_size=16)):
        with pytest.raises(ChesError, match='learned vectors before each prompt'):
            wrap_model(peft.get_peft_model(copy.deepcopy(base), kind), Words(), 'tiny')
    lora = dict(task_type='CAUSAL_LM', r=2, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=['q_proj'], **lora))
    model.add_adapter('second', peft.LoraConfig(target_modules=['v_proj'], lora_alpha=3, **lora))
    model.base_model.set_adapter(['default', 'second'])
    lm = wrap_model(model, Words(), 'tiny')
    assert lm.provenance['adapters']['active'] == ['default', 'second']
    data = load_pairs(rows(LENGTHS[:2]))
    encoded = encode_pairs(data, Words())
    def near(lm): return score_dataset(data, lm, progress=False).chosen_logps.tolist()
    assert near(lm) == pytest.approx([w for w, _ in own_logps(model, encoded)], rel=1e-4)
    with model.disable_adapter():
        with pytest.warns(UserWarning, match='switched off'): off = wrap_model(model, Words(), 'tiny')
        assert off.provenance['adapters']['off'] == ['default', 'second']
        assert near(off) == pytest.approx([w for w, _ in own_logps(base, encoded)], rel=1e-4)
    on_head = peft.LoraConfig(target_modules=['lm_head'], **lora)
    with pytest.raises(ChesError, match='output layer.*merge it'):
        wrap_model(peft.get_peft_model(copy.deepcopy(base), on_head), Words())
    on_queries = peft.LoraConfig(target_modules=['q_proj'], **lora)
    mixed = peft.get_peft_model(copy.deepcopy(base), on_queries, mixed=True)
    lm = wrap_model(mixed, Words(), 'mixed')
    assert near(lm) == pytest.approx([w for w, _ in own_logps(mixed, encoded)], rel=1e-4)
