"""vitq: post-training quantization of vision transformers that executes in int8 and int4.

Importing it touches no GPU and imports no timm and no transformers.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# name -> module that defines it; loaded on first use, so that `import vitq` stays light
_PUBLIC = {
    "convert": "vitq.conversion", "simulate": "vitq.conversion", "calibrate": "vitq.conversion", "explain": "vitq.conversion",
    "tune": "vitq.conversion", "check": "vitq.conversion", "head_scores": "vitq.calib.heads",
    "Recipe": "vitq.recipe", "recipes": "vitq.recipe",
    "Statistics": "vitq.calib.statistics", "act_scales": "vitq.calib.act_scales",
    "import_act_scales": "vitq.calib.act_scales",
    "import_flatquant": "vitq.calib.flatquant",
    "save": "vitq.checkpoint", "load": "vitq.checkpoint", "CheckpointError": "vitq.checkpoint",
    "import_flatquant_checkpoint": "vitq.flatquant_checkpoint",
    "push_to_hub": "vitq.publish",
    "UnsupportedModelError": "vitq.models",
    "load_model": "vitq.models.zoo", "resolve_name": "vitq.models.zoo", "ALIASES": "vitq.models.zoo",
    "open_images": "vitq.calib.data", "batches": "vitq.calib.data", "data_config": "vitq.calib.data",
    "labels_match": "vitq.calib.data", "synthesize": "vitq.calib.synthetic", "demo_split": "vitq.calib.data", "DEMO_CLASSES": "vitq.calib.data",
    "load_language_model": "vitq.models.language_zoo", "open_text": "vitq.calib.text", "perplexity": "vitq.likelihood",
    "quantized_cache": "vitq.nn.key_values",
    "compile": "vitq.graphs",
    "linear_module": "vitq.conversion", "QuantLinear": "vitq.conversion", "Histogram": "vitq.calib.statistics", "pick_device": "vitq.ops.dispatch",
}
_MODULES = ("ops", "evaluate", "report", "formats", "timing", "profiling")

__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"vitq.{name}")
    else:
        raise AttributeError(f"module 'vitq' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
