"""The text of a model card: what an adapter is, how to load it, and its results."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import peft
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from ..core.config import VisualPeftConfig
from ..core.labels import Labels
from ..core.registry import Method, list_methods
from ..core.targets import default_of, own_fields
from ..version import __version__


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PROCESSOR_NAME = "preprocessor_config.json"
TIMM_PROCESSOR = "TimmWrapperImageProcessor"
IMPORT_LINE = "import hf_visual_peft"
TEMPLATE = Path(__file__).with_name("card_template.md")
# The ends of transformers' class names.
PIPELINE_TAGS = {
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "ForDepthEstimation": "depth-estimation",
    "Model": "image-feature-extraction",
    "Backbone": "image-feature-extraction",
}
MAX_LISTED_LABELS = 200


@dataclasses.dataclass(frozen=True)
class Run:
    """Facts that only the training run knows; all are optional. The fields are those of `hub.push`.

    Raises:
        ValueError: a metric is not a finite number, or metrics are given without `dataset`.
    """

    base_model: str | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dataset: str | None = None
    dataset_split: str | None = None
    command: str | None = None
    license: str | None = None
    pipeline_tag: str | None = None
    tags: Sequence[str] = ()
    labels: Sequence[str] = ()
    interpolate_pos_encoding: bool = False

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            number = isinstance(value, SupportsFloat) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ValueError(f"metrics[{name!r}]={value!r}: a card takes a finite number.")
        if self.metrics and not self.dataset:
            raise ValueError(f"metrics={dict(self.metrics)} without dataset: name what they were measured on.")


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """Facts from the files of an adapter, without loading its weights.

    Attributes:
        base_class: class of the base model, `None` where the file does not say.
        base_module: module that defines it.
        parameters: number of trained values in the adapter, the head excluded; `None` without a safetensors file.
        head_parameters: number of values in the modules that `modules_to_save` names.
        num_bytes: size of the safetensors file.
        num_labels: outputs of the saved classification head, if it is a single linear.
        labels: the class names saved with the adapter.
        unnamed: whether these are the numbered names that transformers makes up.
        several: whether an image may have several classes.
        processor: class of the image processor saved beside the adapter, if there is one.
    """

    base_class: str | None = None
    base_module: str = ""
    parameters: int | None = None
    head_parameters: int = 0
    num_bytes: int = 0
    num_labels: int | None = None
    labels: Sequence[str] = ()
    unnamed: bool = False
    several: bool = False
    processor: str | None = None

    @classmethod
    def read(cls, folder: str | Path, config: PeftConfig) -> SavedAdapter:
        """Read the configuration and the header of the weights, whichever of them exist.

        Raises:
            ValueError: a file is damaged.
        """
        facts: dict[str, Any] = {}
        if Path(folder, PROCESSOR_NAME).is_file():
            content = json.loads(Path(folder, PROCESSOR_NAME).read_text(encoding="utf-8"))
            facts["processor"] = content.get("image_processor_type") or "AutoImageProcessor"
        saved = Path(folder, CONFIG_NAME)
        if saved.is_file():
            mapping = json.loads(saved.read_text(encoding="utf-8")).get("auto_mapping") or {}
            facts |= {"base_class": mapping.get("base_model_class"), "base_module": mapping.get("parent_library", "")}
            if labels := Labels.of_mapping(mapping):
                facts |= {"labels": labels.names, "unnamed": labels.made_up}
                facts |= {"several": labels.problem_type == "multi_label_classification"}
        weights = Path(folder, WEIGHTS_NAME)
        if weights.is_file():
            try:
                with safe_open(weights, framework="np") as file:
                    shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
            except SafetensorError as error:
                raise ValueError(f"{weights} is truncated or not a safetensors file: {error}") from error
            heads = tuple(getattr(config, "modules_to_save", None) or ())
            if isinstance(config, VisualPeftConfig):
                sizes = {key: config.trained_parameters(key, tuple(shape)) for key, shape in shapes.items()}
                heads += tuple(filter(None, (config.copied_head, config.widened_head)))
            else:
                sizes = {key: math.prod(shape) for key, shape in shapes.items()}
            in_head = [key for key in shapes if any(f".{name}." in key for name in heads)]
            linears = [key for key in in_head if any(key.endswith(f".{name}.weight") for name in heads)]
            outputs = {shapes[key][0] for key in linears if len(shapes[key]) == 2}
            facts["head_parameters"] = sum(sizes[key] for key in in_head)
            facts["parameters"] = sum(sizes.values()) - facts["head_parameters"]
            facts["num_bytes"] = weights.stat().st_size
            facts["num_labels"] = outputs.pop() if len(outputs) == 1 else None
        return cls(**facts)

    @property
    def pipeline_tag(self) -> str | None:
        """The task of the class of the base model."""
        name = self.base_class or ""
        return next((tag for suffix, tag in PIPELINE_TAGS.items() if name.endswith(suffix)), None)


def build_card(
    config: PeftConfig,
    saved: SavedAdapter | None = None,
    run: Run | None = None,
    *,
    adapter: str | None = None,
) -> ModelCard:
    """The card of one adapter: metadata that the Hub reads and a text that a user reads.

    Args:
        config: configuration of the adapter, of our methods or of peft's own.
        saved: facts from its files.
        run: facts from the run.
        adapter: repository id that the usage snippet loads. For an adapter or a base model that is only in a local
            folder, the snippet has a placeholder, because others do not have that folder.
    """
    saved, run = saved or SavedAdapter(), run or Run()
    method, labels = _method(config), run.labels or (() if saved.unnamed else saved.labels)
    base = run.base_model or config.base_model_name_or_path or None
    base_id = run.base_model or (base if is_hub_id(base) else None)
    tag = run.pipeline_tag or saved.pipeline_tag
    name = _display_name(config)
    title = f"{name} adapter" + (f" for {Path(base).name if base_id is None else base}" if base else "")
    results = [
        EvalResult(
            task_type=tag or "image-classification",
            dataset_type=run.dataset or "",
            dataset_name=run.dataset or "",
            dataset_split=run.dataset_split,
            metric_type=metric,
            metric_name=metric,
            metric_value=float(value),
        )
        for metric, value in run.metrics.items()
    ]
    tags = {*run.tags, name.lower(), *(["hf_visual_peft"] if method else [])}
    if base_id is not None:
        tags.add(f"base_model:adapter:{base_id}")
    data = ModelCardData(
        base_model=base_id,
        base_model_relation="adapter" if base_id else None,
        library_name="peft",
        pipeline_tag=tag,
        license=run.license,
        # A name without an owner may as well be a folder or a builder, such as imagefolder.
        datasets=[run.dataset] if run.dataset and "/" in run.dataset and is_hub_id(run.dataset) else None,
        metrics=list(run.metrics) or None,
        tags=sorted(tags),
        model_name=(adapter or title).rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=title,
        summary=_summary(name, base, base_id, ours=method is not None),
        usage=_usage(config, saved, run, tag, base_id or (base and f"path/to/{Path(base).name}"), adapter),
        facts=[(key, value.replace("|", "\\|")) for key, value in _facts(config, saved, method)],
        results=results,
        command=_fenced(run.command, "bash") if run.command else None,
        labels=labels if len(labels) <= MAX_LISTED_LABELS else (),
        versions=_versions(),
    )
    card.text = f"{card.text.rstrip()}\n\n{_seal(card.text)}\n"
    return card


def is_generated(text: str) -> bool:
    """Whether nobody edited this card: it is empty, peft's blank form, or an unchanged card of ours."""
    seal = re.search(r"<!-- hf_visual_peft .*-->", text)
    return not text.strip() or (seal is not None and seal[0] == _seal(text)) or _lines(text) == _blank_form()


def is_repo_id(name: str | None) -> bool:
    """Whether a name has the form of a repository's id."""
    try:
        validate_repo_id(name or "/")
    except HFValidationError:
        return False
    return True


def is_hub_id(name: str | None) -> bool:
    """Whether a name that transformers or datasets loaded from is on the Hub and not a local folder."""
    return is_repo_id(name) and not Path(str(name)).exists()


def _method(config: PeftConfig) -> Method | None:
    """The method of a configuration; `None` for one of peft's own."""
    return next((method for method in list_methods().values() if type(config) is method.config_cls), None)


def _lines(text: str) -> list[str]:
    """The text without the lines that peft adds at each save, our seal and white space."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(("- PEFT ", "<!-- hf_visual_peft "))]


@functools.cache
def _blank_form() -> list[str]:
    """The blank form of peft, which fills in only its version."""
    return _lines(f"{ModelCard.from_template(ModelCardData()).text}\n### Framework versions")


def _seal(text: str) -> str:
    """A comment that identifies our own text until somebody edits it."""
    digest = hashlib.sha256("\n".join(_lines(text)).encode()).hexdigest()[:16]
    return f"<!-- hf_visual_peft {digest}: rewritten at the next save, unless you edit it -->"


def _fenced(text: str, language: str) -> str:
    """A code block, whatever is in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _display_name(config: PeftConfig) -> str:
    """The name of the method as in its paper, or as in peft."""
    return type(config).__name__.removesuffix("Config") if _method(config) else config.peft_type.value


def _summary(name: str, base: str | None, base_id: str | None, *, ours: bool) -> str:
    """What this is, in a paragraph."""
    link = f" for [{base_id}](https://huggingface.co/{base_id})" if base_id else ""
    local = f" for `{Path(base).name}`, a checkpoint that is not on the Hub" if base and not base_id else ""
    made = "`hf_visual_peft` and `peft`" if ours else "`peft`"
    return (
        f"This adapter{link}{local} was made with the method {name} of {made}. It is a small file that goes on top of "
        "the frozen base model."
    )


def _usage(
    config: PeftConfig, saved: SavedAdapter, run: Run, tag: str | None, base: str | None, adapter: str | None
) -> str:
    """The section on loading the adapter, with a snippet that repeats what was evaluated."""
    method = _method(config)
    snippet = ["from peft import PeftModel"]
    text = []
    if method is not None:
        snippet += ["", IMPORT_LINE]
        text = [
            f"`{IMPORT_LINE}` (distribution `hf-visual-peft`) comes before `PeftModel.from_pretrained`: it tells peft "
            f"what {method.peft_type} is. Without it loading ends in `KeyError: '{method.peft_type}'`.",
            "",
        ]
    where = json.dumps(adapter or "path/to/this/adapter")
    load = f"model = PeftModel.from_pretrained(base, {where}).eval()"
    if not base or not saved.base_module.startswith("transformers."):
        whole = f"{saved.base_module}.{saved.base_class}" if saved.base_class else "model"
        snippet += ["", f"base = ...  # the {whole} that the adapter was trained on", load]
        return "\n".join(["## Use", "", *text, _fenced("\n".join(snippet), "python")])

    names, options = [], f", revision={json.dumps(config.revision)}" if config.revision else ""
    reader, origin = "AutoImageProcessor", where if saved.processor else f"{json.dumps(base)}{options}"
    if saved.processor == TIMM_PROCESSOR:
        reader, origin = TIMM_PROCESSOR, f"{where}, image_processor_filename={json.dumps(PROCESSOR_NAME)}"
    classify = tag == "image-classification"
    if classify and saved.labels and method is None:  # peft alone does not read the class names
        snippet = ["from peft import PeftConfig, PeftModel"]
        names = [
            f'names = PeftConfig.from_pretrained({where}).auto_mapping["id2label"]',
            'labels = {"id2label": {int(i): n for i, n in names.items()}, '
            '"label2id": {n: int(i) for i, n in names.items()}}',
        ]
        options += ", **labels, ignore_mismatched_sizes=True"
    elif classify and saved.num_labels and not saved.labels:
        options += f", num_labels={saved.num_labels}, ignore_mismatched_sizes=True"
    snippet = [
        "import torch",
        *snippet[:1],
        f"from transformers import {', '.join(sorted((reader, saved.base_class or '')))}",
        "from transformers.image_utils import load_image",
        *snippet[1:],
        "",
        *names,
        f"base = {saved.base_class}.from_pretrained({json.dumps(base)}{options})",
        load,
        f"processor = {reader}.from_pretrained({origin})",
        *_inputs(config),
        "with torch.no_grad():",
        f"    outputs = model(**inputs{', interpolate_pos_encoding=True' if run.interpolate_pos_encoding else ''})",
    ]
    if classify:
        scores = "sigmoid()" if saved.several else "softmax(-1)"
        snippet += [
            f"scores = outputs.logits[0].{scores}.tolist()",
            "print({model.config.id2label[i]: score for i, score in enumerate(scores)})",
        ]
    return "\n".join(["## Use", "", *text, _fenced("\n".join(snippet), "python")])


def _inputs(config: PeftConfig) -> list[str]:
    """How the snippet reads an image, upright and in RGB, or the frames of a video."""
    if getattr(config, "video", False):
        return [
            'frames = [load_image(f"{number}.jpg") for number in range(8)]  # of one video, in order',
            'inputs = {"pixel_values": processor(frames, return_tensors="pt")["pixel_values"][None]}',
        ]
    return ['inputs = processor(load_image("image.jpg"), return_tensors="pt")']


def _facts(config: PeftConfig, saved: SavedAdapter, method: Method | None) -> list[tuple[str, str]]:
    """The rows of the table about the adapter."""
    facts = [("Method", f"{config.peft_type.value} of peft")]
    if method is not None:
        paper = method.paper
        facts = [
            ("Method", f"{_display_name(config)}: `{method.equation}`"),
            ("Paper", f"[{paper.title}]({paper.url}), {paper.venue}" + f", arXiv {paper.arxiv}" * bool(paper.arxiv)),
        ]
    facts.append(("Configuration", f"`{_call(config, method)}`"))
    if saved.parameters is not None:
        head = f", {saved.head_parameters:,} in the task head" if saved.head_parameters else ""
        facts.append(("Trained parameters", f"{saved.parameters:,} in the adapter{head}"))
        facts.append(("Adapter file", f"{saved.num_bytes:,} bytes"))
    return facts


def _call(config: PeftConfig, method: Method | None) -> str:
    """The configuration as code: the method's own fields, and other fields that differ from the default."""
    common = {field.name for field in dataclasses.fields(PeftConfig)}
    own = {field.name for field in own_fields(type(config))} if method else set()
    shown = []
    for field in dataclasses.fields(config):
        if not field.init or field.name in common:
            continue
        value = getattr(config, field.name)
        if field.name in own or value != default_of(field):
            value = sorted(value) if isinstance(value, set | frozenset) else value
            parts = isinstance(value, list) and any(isinstance(each, PeftConfig) for each in value)
            text = f"[{', '.join(_call(each, _method(each)) for each in value)}]" if parts else repr(value)
            shown.append(f"{field.name}={text}")
    return f"{type(config).__name__}({', '.join(shown)})"


def _versions() -> list[tuple[str, str]]:
    """The packages that computed the weights."""
    packages = [("PEFT", peft), ("Transformers", transformers), ("PyTorch", torch)]
    return [*((name, module.__version__) for name, module in packages), ("hf_visual_peft", __version__)]
