"""Language models by name: a folder of transformers, a name on the hub, or a GGUF file, each with its tokenizer."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vitq.models import UnsupportedModelError, adapters_of, hub

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?\Z")


@dataclass(frozen=True)
class LoadedLanguageModel:
    """A float model in eval mode, its tokenizer if that was wanted, and the name it was asked for by."""

    model: nn.Module
    tokenizer: Any | None
    name: str


def load_language_model(name: str | os.PathLike[str], *, dtype: Any = "auto", tokenizer: bool = True) -> LoadedLanguageModel:
    """A causal language model of transformers, and its tokenizer.

    name: a folder that `save_pretrained` wrote, a name on the Hugging Face hub, or a .gguf file, whose weights are dequantized.
    dtype: of the weights; "auto" is the one they are stored in (float32 for GGUF).
    tokenizer: whether one is loaded; a folder need not hold one otherwise.

    Raises FileNotFoundError (no such folder or file, or no tokenizer in it), UnsupportedModelError (a class that vitq has no adapter for; said before weights are
    read), ValueError (a quantized model), ConnectionError (neither the hub answers within 10 seconds nor its cache has the model), OSError
    (transformers cannot read it), ImportError (without transformers; for GGUF, without gguf and accelerate).
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("language models need the package transformers: pip install 'vitq[llm]'") from error
    name = str(name)
    where, options = _find(name)
    config = transformers.AutoConfig.from_pretrained(where, **options)
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
        read = "; vitq.load reads it (--load of the tools)" if method == "vitq" else ""
        raise ValueError(f"{name} is quantized already ({method or type(quantized).__name__}): give the float model it was made of{read}")
    known = {cls.__name__: cls for cls in adapters_of("transformers")}
    try:
        cls = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        cls = type(config)
    if cls not in known.values():
        raise UnsupportedModelError(f"{name} is a {cls.__name__}, which vitq has no adapter for; known: {', '.join(sorted(known))}")
    words = _tokenizer(name, where, options) if tokenizer else None
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options).eval()
    return LoadedLanguageModel(model, words, name)


def _tokenizer(name: str, where: str, options: dict[str, Any]) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        if options or not Path(where).is_dir() or any(any(Path(where).glob(f"{stem}*")) for stem in ("tokenizer", "vocab", "spiece", "merges")):
            raise
        raise FileNotFoundError(f"{name} has no tokenizer: save it there, tokenizer.save_pretrained({str(where)!r}), or leave it out with tokenizer=False") from error


def _find(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for `name`: where, and options."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{name} is no .gguf file: give that, a folder of transformers, or a name on the hub")
        if missing := [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]:
            raise ImportError(f"reading {path.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if (path / "vitq.json").is_file():
            raise ValueError(f"{name} is a checkpoint of vitq, whose model is quantized already: vitq.load reads it (--load of the tools)")
        return str(path), {}
    if not _HUB_NAME.match(name):
        raise FileNotFoundError(f"no such folder or file: {name}. Give a folder of transformers, a .gguf file, or a name on the hub")
    return name, _hub_options(name)


def _hub_options(name: str) -> dict[str, Any]:
    """Options of `from_pretrained` for a name on the hub: none, or the cache alone where the hub does not answer.

    Raises ConnectionError where neither has it.
    """
    import huggingface_hub

    reason = hub.unreachable()
    if reason is None:
        return {}
    if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        raise ConnectionError(f"{name} is neither a folder nor in the hub's cache, and the hub cannot give it: {reason}")
    return {"local_files_only": True}
