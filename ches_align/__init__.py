"Likelihood displacement and vanishing reward gradients: score, filter and watch preference and RL finetuning."
__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

# Names are resolved on first use, so that `import ches_align` and `--help` do not wait for torch. Editors and type
# checkers read the imports below, which never run; `X as X` says to them that the name is offered.
if TYPE_CHECKING:
    from .theory.ches import ches_scores as ches_scores, head_ches as head_ches
    from .core.errors import ChesError as ChesError
    from .lm.pairs import Pair as Pair, load_pairs as load_pairs, pair_texts as pair_texts
    from .lm.models import (
        ScoringModel as ScoringModel, load_model as load_model, wrap_model as wrap_model)
    from .lm.encode import encode_pairs as encode_pairs
    from .lm.sampling import Sampling as Sampling, load_generator as load_generator
    from .lm.generation import generate_responses as generate_responses
    from .audit.scoring import load_scores as load_scores, score_dataset as score_dataset
    from .audit.selection import (
        length_matched_control as length_matched_control, random_control as random_control,
        select_pairs as select_pairs)
    from .audit.card import write_selection as write_selection
    from .audit.report import audit_report as audit_report
    from .audit.audit import audit_dataset as audit_dataset
    from .watch.tracker import DisplacementTracker as DisplacementTracker
    from .watch.callback import DisplacementCallback as DisplacementCallback
    from .spread.rewards import load_reward as load_reward
    from .spread.rollouts import rollout_rows as rollout_rows
    from .spread.table import (
        group_costs as group_costs, spread_summary as spread_summary, spread_table as spread_table)
    from .spread.audit import (
        audit_spread as audit_spread, count_looks as count_looks, load_tasks as load_tasks)
    from .spread.report import spread_report as spread_report, write_spread as write_spread
    from .spread.watch import SpreadWatch as SpreadWatch, watch_reward as watch_reward
    from .refusal.judges import judge_responses as judge_responses
    from .refusal.rates import refusal_rate as refusal_rate
    from .refusal.preferences import make_preferences as make_preferences
    from .training.train import train_preferences as train_preferences

_homes = {
    'ches_scores': 'theory.ches', 'head_ches': 'theory.ches',
    'ChesError': 'core.errors',
    'Pair': 'lm.pairs', 'load_pairs': 'lm.pairs', 'pair_texts': 'lm.pairs',
    'ScoringModel': 'lm.models', 'load_model': 'lm.models', 'wrap_model': 'lm.models',
    'encode_pairs': 'lm.encode',
    'Sampling': 'lm.sampling', 'load_generator': 'lm.sampling',
    'generate_responses': 'lm.generation',
    'load_scores': 'audit.scoring', 'score_dataset': 'audit.scoring',
    'length_matched_control': 'audit.selection', 'random_control': 'audit.selection',
    'select_pairs': 'audit.selection',
    'write_selection': 'audit.card',
    'audit_report': 'audit.report',
    'audit_dataset': 'audit.audit',
    'DisplacementTracker': 'watch.tracker',
    'DisplacementCallback': 'watch.callback',
    'load_reward': 'spread.rewards',
    'rollout_rows': 'spread.rollouts',
    'group_costs': 'spread.table', 'spread_summary': 'spread.table', 'spread_table': 'spread.table',
    'audit_spread': 'spread.audit', 'count_looks': 'spread.audit', 'load_tasks': 'spread.audit',
    'spread_report': 'spread.report', 'write_spread': 'spread.report',
    'SpreadWatch': 'spread.watch', 'watch_reward': 'spread.watch',
    'judge_responses': 'refusal.judges',
    'refusal_rate': 'refusal.rates',
    'make_preferences': 'refusal.preferences',
    'train_preferences': 'training.train',
}

def __getattr__(name):
    if name in _homes: return getattr(import_module(f'{__name__}.{_homes[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

def __dir__(): return sorted({*globals(), *_homes})
