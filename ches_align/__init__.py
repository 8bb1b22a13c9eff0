"Likelihood displacement and vanishing reward gradients: score, filter and watch preference and RL finetuning."
__version__ = "0.1.0"

from importlib import import_module

# Names are resolved on first use, so that `import ches_align` and `--help` do not wait for torch.
_homes = {
    'ches_scores': 'theory.ches', 'head_ches': 'theory.ches',
    'load_pairs': 'audit.data', 'load_model': 'audit.models',
    'score_dataset': 'audit.scoring', 'load_scores': 'audit.scoring',
    'select_pairs': 'audit.selection', 'audit_report': 'audit.report',
    'audit_dataset': 'audit.audit', 'Audit': 'audit.audit',
    'DisplacementCallback': 'training.callback', 'DisplacementTracker': 'training.tracker',
    'train_preferences': 'training.train',
    'spread_table': 'rl.spread_table', 'audit_spread': 'rl.spread_audit', 'SpreadWatch': 'rl.spread_watch',
}
__all__ = list(_homes)

def __getattr__(name):
    if name in _homes: return getattr(import_module(f'{__name__}.{_homes[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

def __dir__(): return sorted([*globals(), *__all__])
