"""The Hub: upload of an adapter and its card in one commit, and cards that say how to load an adapter."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants, hf_hub_download
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel
from transformers import AutoImageProcessor, TimmWrapperImageProcessor

from ..core.config import on_saving
from ..core.labels import record
from .card import (
    CONFIG_NAME,
    IMPORT_LINE,
    PROCESSOR_NAME,
    TIMM_PROCESSOR,
    WEIGHTS_NAME,
    Run,
    SavedAdapter,
    build_card,
    is_generated,
    is_hub_id,
    is_repo_id,
)
from .files import write_aside


CARD_NAME = "README.md"


def push(
    model: PeftModel,
    repo_id: str,
    *,
    adapter_name: str = "default",
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    dataset_split: str | None = None,
    command: str | None = None,
    license: str | None = None,
    pipeline_tag: str | None = None,
    tags: Sequence[str] = (),
    processor: Any = None,
    interpolate_pos_encoding: bool = False,
) -> CommitInfo:
    """Upload one adapter with its card: `adapter_model.safetensors`, `adapter_config.json`, `README.md`, one commit.

    Anyone can then load it with `import hf_visual_peft` and `PeftModel.from_pretrained(base, repo_id)`. An interrupted
    upload leaves the repository unchanged, and nothing is committed if nothing changed.

    The repository and the branch are created if they do not exist. An existing card is rewritten only if it is an
    unedited card of ours; in an edited card the text stays and the metadata are updated. In a distributed run call
    this on the main process.

    Args:
        model: what `get_peft_model` or `PeftModel.from_pretrained` returned; any method, also peft's own.
        repo_id: `"user/name"`, or `"name"` for the user that the token belongs to.
        adapter_name: which of the model's adapters.
        revision: branch to upload to; the main one by default.
        private: visibility of a new repository. An existing one must have it already.
        token: an access token; by default the one of `hf auth login` or `HF_TOKEN`.
        commit_message: title of the commit.
        base_model: model id of the backbone on the Hub. Needed if it was loaded from a folder, which others do not
            have: without it there is a warning, and the card's metadata name no base model.
        metrics: results by metric name, e.g. `{"accuracy": 0.944}`, for the card's model-index.
        dataset: that the metrics were measured on: a dataset id of the Hub with its owner, or any other name. Required
            with `metrics`.
        dataset_split: split that the metrics were measured on, e.g. `"test"`.
        command: the command line that trained the adapter, as typed.
        license: license id of the Hub, e.g. `"apache-2.0"`.
        pipeline_tag: task; by default that of the base model's class.
        tags: extra tags.
        processor: image processor that the results were measured with; it is uploaded with the adapter, and the card
            loads it. By default the card loads that of the base model.
        interpolate_pos_encoding: whether the results were measured with that argument of the model.

    Returns:
        The result of `HfApi.create_commit`, with `oid` and `commit_url`.

    Raises:
        TypeError: `model` is not a `PeftModel`.
        ValueError: `repo_id`, `adapter_name`, `revision`, `base_model` or a metric is invalid, or the repository does
            not have the visibility asked for. All but the last are found before any request.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused, for example because of missing rights, or because
            somebody else committed in between.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"push needs a peft.PeftModel, as get_peft_model returns it, not {type(model).__name__}.")
    if adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has {', '.join(map(repr, model.peft_config))}.")
    validate_repo_id(repo_id)
    if revision is not None and constants.REGEX_COMMIT_OID.fullmatch(revision):
        raise ValueError(f"revision={revision!r} is a commit: an upload goes to a branch.")
    if base_model is not None and not is_repo_id(base_model):
        raise ValueError(f"base_model={base_model!r} is not a model id of the Hub, such as 'facebook/dinov2-small'.")
    run = Run(
        base_model=base_model,
        metrics=metrics or {},
        dataset=dataset,
        dataset_split=dataset_split,
        command=command,
        license=license,
        pipeline_tag=pipeline_tag,
        tags=tags,
        interpolate_pos_encoding=interpolate_pos_encoding,
    )
    config = model.peft_config[adapter_name]
    record(model, adapter_name)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, selected_adapters=[adapter_name])
        folder = Path(scratch) if adapter_name == "default" else Path(scratch, adapter_name)
        if processor is not None:
            save_processor(processor, folder)
        if base_model is not None:
            _set_base_model(folder / CONFIG_NAME, base_model)
        elif not is_hub_id(config.base_model_name_or_path):
            _set_base_model(folder / CONFIG_NAME, Path(config.base_model_name_or_path or "").name or None)
            warnings.warn(
                f"The base model {config.base_model_name_or_path!r} is not on the Hub: others cannot load what "
                "you upload. Pass base_model='user/name' if it is there under another name.",
                stacklevel=2,
            )
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private is not None and bool(api.model_info(repo_id).private) != private:
            raise ValueError(
                f"private={private}: {repo_id} exists and is {'public' if private else 'private'}. Nothing was "
                f"uploaded; HfApi().update_repo_settings({repo_id!r}, private={private}) changes it."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        card = build_card(config, SavedAdapter.read(folder, config), run, adapter=repo_id)
        if any(file.rfilename == CARD_NAME for file in info.siblings or ()):
            there = hf_hub_download(repo_id, CARD_NAME, revision=info.sha, token=token)
            card = merge_cards(ModelCard.load(there), card)
        write_aside(folder / CARD_NAME, str(card))
        names = (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, *([PROCESSOR_NAME] if processor is not None else []))
        return api.create_commit(
            repo_id,
            operations=[CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names],
            commit_message=commit_message or f"Upload {config.peft_type.value} adapter",
            revision=revision,
            # The card was merged with the existing one: if that changes meanwhile, the commit fails and no text is
            # lost.
            parent_commit=info.sha,
        )


def write_card(folder: str | Path, config: PeftConfig, *, adapter: str | None = None, **run: Any) -> Path:
    """Write the card of a saved adapter, from its files and from the run.

    Args:
        folder: where the adapter was saved.
        config: its configuration.
        adapter: repository id for the usage snippet, if known.
        **run: fields of `Run`, e.g. `metrics={"accuracy": 0.94}, dataset="MNIST", command="..."`.

    Returns:
        Path of the card. An edited card keeps its text; its metadata are updated.
    """
    path = Path(folder, CARD_NAME)
    card = build_card(config, SavedAdapter.read(folder, config), Run(**run), adapter=adapter)
    if path.exists():
        card = merge_cards(ModelCard.load(path), card)
    write_aside(path, str(card))
    return path


def add_usage_to_card(folder: str | Path, config: PeftConfig) -> None:
    """Make the card of an adapter that was just saved say how to load it.

    Our card replaces peft's blank form and keeps its metadata. It also replaces an unedited card of ours, without the
    results in it, which belong to earlier weights. The text of any other card stays; a section on loading is added at
    its end if it lacks our import line. A README that is not the card of an adapter is not changed. A second call
    changes nothing.

    An adapter with a name other than `"default"` is saved in a folder of its own and gets its card there.

    Args:
        folder: with configuration and weights; a README is written if there is none.
        config: the configuration that was saved.
    """
    path = Path(folder, CARD_NAME)
    try:
        saved = SavedAdapter.read(folder, config)
    except ValueError:  # transformers writes the weights last: these are left from an interrupted save
        saved = SavedAdapter()
    card = build_card(config, saved)
    if path.exists():
        there = _load_adapter_card(path)
        if there is None:
            return
        if is_generated(there.text):
            card = merge_cards(there, card)
        elif (text := _with_usage(there.text, card.text)) != there.text:
            there.text, card = text, there
        else:
            return
    write_aside(path, str(card))


def merge_cards(there: ModelCard, new: ModelCard) -> ModelCard:
    """A new card that replaces an existing one.

    Old metadata stay where the new card has none, except the results of an unedited card. The old text stays if
    somebody edited it.
    """
    generated = is_generated(there.text)
    stale = {"eval_results", "model_name", "metrics"} if generated else set()
    for key, value in there.data.__dict__.items():
        if value is None or key in stale or new.data.get(key) is not None:
            continue
        if key not in ("base_model", "base_model_relation") or is_hub_id(there.data.get("base_model")):
            new.data[key] = value
    if new.data.get("base_model") is not None:
        new.data["base_model_relation"] = "adapter"
    old_tags = [tag for tag in there.data.get("tags") or [] if not tag.startswith("base_model:adapter:")]
    new.data["tags"] = sorted({*old_tags, *(new.data.get("tags") or [])})
    if not generated:
        new.text = _with_usage(there.text, new.text)
    return new


def save_processor(processor: Any, folder: str | Path) -> None:
    """Write an image processor beside an adapter, as `preprocessor_config.json`.

    Processors of timm are normally read from a model's `config.json`, which beside an adapter would look like that of
    a whole model. `TimmWrapperImageProcessor.from_pretrained` loads this file with
    `image_processor_filename="preprocessor_config.json"`.

    Args:
        processor: of transformers.
        folder: of the adapter.
    """
    if type(processor).__name__ != TIMM_PROCESSOR:
        processor.save_pretrained(folder)
        return
    content = {"image_processor_type": TIMM_PROCESSOR, "pretrained_cfg": processor.data_config}
    write_aside(Path(folder, PROCESSOR_NAME), json.dumps(content, indent=2, sort_keys=True))


def load_processor(folder: str | Path) -> Any:
    """The image processor beside an adapter, as `save_processor` wrote it.

    Args:
        folder: of the adapter, on this machine.

    Raises:
        ValueError: the file is missing or damaged.
    """
    file = Path(folder, PROCESSOR_NAME)
    try:
        if json.loads(file.read_text(encoding="utf-8")).get("image_processor_type") == TIMM_PROCESSOR:
            return TimmWrapperImageProcessor.from_pretrained(str(folder), image_processor_filename=PROCESSOR_NAME)
        return AutoImageProcessor.from_pretrained(str(folder))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not an image processor: {error}") from error


def _set_base_model(path: Path, base_model: str | None) -> None:
    """Make a saved configuration name the base model by its Hub id, or without its local folder."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    write_aside(path, json.dumps({**saved, "base_model_name_or_path": base_model}, indent=2, sort_keys=True))


def _load_adapter_card(path: Path) -> ModelCard | None:
    """The card at a path; `None` for a README that is not the card of an adapter."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        card = ModelCard(text, ignore_metadata_errors=True) if text.startswith("---") else None
    except (ValueError, yaml.YAMLError):
        return None
    return card if card is not None and card.data.get("library_name") == "peft" else None


def _with_usage(text: str, generated: str) -> str:
    """The text of an edited card, with the section on loading at its end if it lacks our import line."""
    usage = re.search(r"^## Use$.*?(?=^## )", generated, flags=re.MULTILINE | re.DOTALL)
    if usage is None or IMPORT_LINE in text or IMPORT_LINE not in usage[0]:
        return text
    return f"{text.rstrip()}\n\n{usage[0].rstrip()}\n"


on_saving(add_usage_to_card)
