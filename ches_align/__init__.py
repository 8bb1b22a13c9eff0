"Likelihood displacement and vanishing reward gradients: score, filter and watch preference and RL finetuning."
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

# Names are resolved on first use, so that `import ches_align` and `--help` do not wait for torch. Editors and type
# checkers read the imports below, which never run; `X as X` says to them that the name is offered.
if TYPE_CHECKING:
    from .theory.ches import ches_scores as ches_scores, head_ches as head_ches
    from .audit.card import write_selection as write_selection
    from .audit.data import Pair as Pair, load_pairs as load_pairs, pair_texts as pair_texts
    from .audit.hidden_states import encode_pairs as encode_pairs
    from .audit.models import (
        ScoringModel as ScoringModel, load_model as load_model, wrap_model as wrap_model)
    from .audit.report import audit_report as audit_report
    from .audit.scoring import load_scores as load_scores, score_dataset as score_dataset
    from .audit.selection import (
        length_matched_control as length_matched_control, random_control as random_control,
        select_pairs as select_pairs)
    from .rl.generation import generate_responses as generate_responses
    from .rl.rewards import load_reward as load_reward
    from .rl.rollouts import rollout_rows as rollout_rows
    from .rl.sampling import Sampling as Sampling, load_generator as load_generator
    from .rl.spread_audit import (
        audit_spread as audit_spread, count_looks as count_looks, load_tasks as load_tasks,
        write_spread as write_spread)
    from .rl.spread_report import spread_report as spread_report
    from .rl.spread_table import (
        group_costs as group_costs, spread_summary as spread_summary, spread_table as spread_table)
    from .rl.spread_watch import SpreadWatch as SpreadWatch, watch_reward as watch_reward
    from .refusal.judges import judge_responses as judge_responses, refusal_rate as refusal_rate
    from .refusal.preferences import make_preferences as make_preferences
    from .training.callback import DisplacementCallback as DisplacementCallback
    from .training.tracker import DisplacementTracker as DisplacementTracker
    from .training.train import train_preferences as train_preferences

_homes = {
    'ches_scores': 'theory.ches', 'head_ches': 'theory.ches',
    'write_selection': 'audit.card',
    'Pair': 'audit.data', 'load_pairs': 'audit.data', 'pair_texts': 'audit.data',
    'encode_pairs': 'audit.hidden_states',
    'ScoringModel': 'audit.models', 'load_model': 'audit.models', 'wrap_model': 'audit.models',
    'audit_report': 'audit.report',
    'load_scores': 'audit.scoring', 'score_dataset': 'audit.scoring',
    'length_matched_control': 'audit.selection', 'random_control': 'audit.selection',
    'select_pairs': 'audit.selection',
    'generate_responses': 'rl.generation',
    'load_reward': 'rl.rewards',
    'rollout_rows': 'rl.rollouts',
    'Sampling': 'rl.sampling', 'load_generator': 'rl.sampling',
    'audit_spread': 'rl.spread_audit', 'count_looks': 'rl.spread_audit', 'load_tasks': 'rl.spread_audit',
    'write_spread': 'rl.spread_audit',
    'spread_report': 'rl.spread_report',
    'group_costs': 'rl.spread_table', 'spread_summary': 'rl.spread_table', 'spread_table': 'rl.spread_table',
    'SpreadWatch': 'rl.spread_watch', 'watch_reward': 'rl.spread_watch',
    'judge_responses': 'refusal.judges', 'refusal_rate': 'refusal.judges',
    'make_preferences': 'refusal.preferences',
    'DisplacementCallback': 'training.callback',
    'DisplacementTracker': 'training.tracker',
    'train_preferences': 'training.train',
}

def __getattr__(name):
    if name in _homes: return getattr(import_module(f'{__name__}.{_homes[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

def __dir__(): return sorted({*globals(), *_homes})
