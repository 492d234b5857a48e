"""Files that other tools wrote by torch.save: data alone is taken from them, no code in them runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


def read_pickled(path: str | os.PathLike, what: str) -> Any:
    """What torch.save wrote to the file, its tensors on the CPU. what: how a message calls it.

    Raises FileNotFoundError; ValueError for a file that is cut short or damaged, or holds more than tensors, numbers, texts and containers of these.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} {path}: {'a folder; give the file' if Path(path).is_dir() else 'no such file'}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to run the code that is in it
        raise ValueError(f"{what} {path}: not a file that torch.save wrote of tensors, numbers, texts and containers of these alone") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, OSError) as error:
        raise ValueError(f"{what} {path}: not a file of tensors that torch.save wrote whole ({str(error).splitlines()[0] if str(error) else error!r})") \
            from error
