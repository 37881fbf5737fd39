"""Long context transfer from language to vision.

The one module written by hand: a version, and names that are imported only when first asked for,
so that `import longva` needs neither torch nor transformers and takes well under a second.
"""

from importlib import import_module

__version__ = "0.1.0"

_homes = {
    "LongVA": "longva.model",
    "LongVAConfig": "longva.model",
    "LongVAImageProcessor": "longva.model",
    "LongVAProcessor": "longva.model",
    "load_original": "longva.model.checkpoint",
    "save_original": "longva.model.checkpoint",
    "CheckpointError": "longva.model.original",
    "extend_rope": "longva.context.rope",
    "exact_rope": "longva.context.rope",
    "rope_report": "longva.context.rope_report",
    "choose_grid": "longva.vision.unires",
    "iter_frames": "longva.vision.video",
    "read_frames": "longva.vision.video",
    "VideoError": "longva.vision.video",
}
__all__ = ["__version__", *_homes]


def __getattr__(name):
    if name not in _homes:
        raise AttributeError(f"module 'longva' has no attribute {name!r}")
    value = getattr(import_module(_homes[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__():
    return sorted({*globals(), *__all__})
