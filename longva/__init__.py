"""Long context transfer from language to vision.

    from longva import LongVA, LongVAProcessor      # the model, as in transformers
    from longva import mini                         # miniatures: mini.load("mini-longva")
    from longva import extend_rope, rope_report     # RoPE
    from longva import read_frames, iter_frames     # videos

`dir(longva)` lists all names, `help(longva.LongVA)` describes one.
"""

# The one module written by hand: a version, and names that are imported only when first asked for, so that
# `import longva` needs neither torch nor transformers and takes well under a second. There is no __all__, for with it
# `help(longva)` would print the documentation that each class has from transformers.

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


def __getattr__(name):
    if name == "mini":  # a subpackage; importing it binds it here
        return import_module("longva.mini")
    if name not in _homes:
        raise AttributeError(f"module 'longva' has no attribute {name!r}")
    value = getattr(import_module(_homes[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__():
    hidden = {"import_module", "_homes"}
    return sorted({*globals(), *_homes, "mini"} - hidden)
