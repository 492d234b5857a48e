"""push_to_hub: a checkpoint and a model card to the Hugging Face hub."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

import vitq
from vitq.checkpoint import save
from vitq.checkpoint_files import CONFIG, HEADER, PATTERNS, check_free, is_checkpoint, read_header
from vitq.conversion import model_info
from vitq.models import hub
from vitq.report import bits_per_weight

CARD = "README.md"
_logger = logging.getLogger(__name__)


def push_to_hub(model: nn.Module, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, commit_message: str | None = None,
                max_shard_size: int | str = "50GB", source: dict[str, Any] | None = None) -> str:
    """Upload a converted model to a repository of the Hugging Face hub, made if there is none: `vitq.load(repo_id)` loads it from there.

    repo_id: "user/name", or "name" of your own. private, token, commit_message: as huggingface_hub has them; the token is that of `hf auth login` by default.
    max_shard_size, source: as `vitq.save` has them.
    One commit replaces the files of a checkpoint and leaves others there, such as a tokenizer's; a model card (README.md) with the recipe, the bits a
    weight and how to load it is added where the repository has none. Returns the address of the commit.
    Raises as `vitq.save` does, before anything is uploaded, for a repository with a model that vitq did not write too; ValueError for what is no name of one;
    ConnectionError within 10 seconds where the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    model_info(model)
    validate_repo_id(repo_id)
    if (reason := hub.unreachable()) is not None:
        raise ConnectionError(f"{repo_id} cannot be uploaded: {reason}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(model, Path(temporary) / "checkpoint", source=source, max_shard_size=max_shard_size)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name, if it had none
        there = set(api.list_repo_files(repo_id))
        _check_repository(api, repo_id, there)
        if CARD in there:
            _logger.warning("%s of %s stays as it is: see that it says how this model is quantized", CARD, repo_id)
        else:
            (folder / CARD).write_text(model_card(model, repo_id, read_header(folder)), encoding="utf-8")
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=list(PATTERNS),
                                   commit_message=commit_message or f"Upload a model quantized with the recipe {model.vitq.recipe.name}")
    return str(commit.commit_url)


def _check_repository(api: Any, repo_id: str, files: set[str]) -> None:
    """Raises CheckpointError for one whose files are a model's that vitq did not write."""
    from huggingface_hub.utils import filter_repo_objects

    if HEADER in files or CONFIG in files and is_checkpoint(Path(api.hf_hub_download(repo_id, CONFIG)).parent):
        return
    check_free(repo_id, sorted(filter_repo_objects(files, allow_patterns=list(PATTERNS))), "repository")


def model_card(model: nn.Module, repo_id: str, header: dict[str, Any]) -> str:
    """Markdown with the metadata that the hub reads: what the model is, how it is quantized, how it is loaded. header: of its checkpoint."""
    from huggingface_hub import ModelCardData

    recipe, language = model.vitq.recipe, header["library"] == "transformers"
    bits, samples = bits_per_weight(model), header["calibration"].get("images")
    data = ModelCardData(library_name="vitq", pipeline_tag="text-generation" if language else "image-classification",
                         tags=["vitq", "quantized", recipe.name])
    lines = ["---", data.to_yaml(), "---", "", f"# {repo_id.rpartition('/')[2]}", "",
             f"{header['source']['name']} ({header['architecture']}), quantized with vitq {vitq.__version__} to execute in integers.", "",
             "| | |", "|---|---|",
             f"| recipe | `{recipe.name}` |",
             f"| bits a weight, linear layers | {bits.linears:.2f} |",
             f"| bits a weight, all of the model | {bits.model:.2f} |",
             f"| what stays in float | {header['dtype']} |",
             f"| calibrated on | {f'{samples} samples' if samples else 'no data'} |", "",
             "## Use", "", "```python", "import vitq", "", f'model = vitq.load("{repo_id}")', "```", ""]
    if language:
        lines += ["or with transformers:", "", "```python", "import transformers", "import vitq.hf", "",
                  f'model = transformers.AutoModelForCausalLM.from_pretrained("{repo_id}")', "```", ""]
    lines += ["## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]
    return "\n".join(lines)
