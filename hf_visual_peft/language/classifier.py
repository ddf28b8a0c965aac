"""A dual encoder of images and texts as an image classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import initialization as init

from ..backbones.architectures import register_heads
from .classifier_config import ZeroShotConfig, ZeroShotOutput
from .kept import state_of, trains
from .open_clip_models import OpenClipDualEncoder, is_open_clip
from .scale import SCALE, LogitScale
from .slot import AdapterSlot, StoredClasses
from .templates import DEFAULT, check_templates
from .tokens import Position, TextWriter, Tokens, as_text, check_names
from .towers import (
    Towers,
    checkpointed,
    evaluating,
    replaced_rows,
    replaced_slots,
    replaced_weights,
    towers_of,
    without_checkpoints,
)
from .view import FEATURES, View, normalised


class ZeroShotClassifier(PreTrainedModel):
    """An image classifier whose classes are texts: the logits compare features of an image with those of the names.

        logits = exp(logit_scale) cos(image, text of the class) (+ logit_bias)

    The text tower runs once for a set of names as long as nothing in it trains.

    Args:
        config: with the config of the dual encoder.
        encoder: the dual encoder; made from the config by default.
        tokenizer: of the dual encoder.
    """

    config: ZeroShotConfig
    config_class = ZeroShotConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    classes_are_texts = True  # so that adapters save their names, without a head
    _supports_sdpa = True
    _supports_flash_attn = True
    _keys_to_ignore_on_load_missing = [rf"^{SCALE}\."]  # classifiers of earlier versions have none

    def __init__(self, config: ZeroShotConfig, encoder: PreTrainedModel | None = None, tokenizer: Any = None) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config) if encoder is None else encoder
        stored = config.stored_classes
        self.adapters = AdapterSlot() if stored is None else StoredClasses(**stored)
        self.logit_scale = LogitScale()
        self.loss_type = "ForImageClassification"
        self._tokenizer = tokenizer
        self._features: dict[str, tuple[Any, Tensor]] = {}  # of the classes, each with what it depends on
        self._slots: dict[Any, Tokens] = {}
        towers_of(self.encoder)  # refuses what is not a dual encoder
        for module in () if encoder is None else encoder.modules():
            module._is_hf_initialized = True  # its weights are there
        self.post_init()
        if tokenizer is not None:
            self._read_names()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str,
        *args: Any,
        class_names: Sequence[str] | None = None,
        templates: Sequence[str] | str | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> ZeroShotClassifier:
        """Load a dual encoder, or a saved classifier.

        Args:
            checkpoint: folder or repository of a dual encoder of transformers or OpenCLIP, or of a saved classifier.
            args: as of every model.
            class_names: of the classes; a saved classifier has its own.
            templates: a text with `{}` for the name, several, `"simple"` or `"openai"`; default: `"a photo of a {}."`,
                or those of a saved classifier.
            tokenizer: by default that in the folder or repository.
            kwargs: as of every model; `normalize_before_mean` and `class_chunk` go into the config.

        Raises:
            ValueError: there are no class names, or one does not fit.
        """
        own = {key: kwargs.pop(key) for key in ("normalize_before_mean", "class_chunk") if key in kwargs}
        where = {key: kwargs[key] for key in ("revision", "subfolder", "token", "cache_dir") if key in kwargs}
        of_open_clip = "config" not in kwargs and is_open_clip(checkpoint, **where)
        config = kwargs.pop("config", None)
        if config is None and not of_open_clip:
            config = AutoConfig.from_pretrained(checkpoint, **where)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(checkpoint, **where)
        if isinstance(config, ZeroShotConfig):
            for name, value in own.items():
                setattr(config, name, value)
            model: ZeroShotClassifier = super().from_pretrained(checkpoint, *args, config=config, **kwargs)
            if isinstance(model.encoder, OpenClipDualEncoder):
                model.encoder.restore_masks()
            model._tokenizer = tokenizer
        else:
            if of_open_clip:
                encoder = OpenClipDualEncoder.from_open_clip(checkpoint, **where)
            else:
                encoder = AutoModel.from_pretrained(checkpoint, *args, config=config, **kwargs)
            names = [] if class_names is None else class_names
            config = cls.config_class(encoder.config, names, templates or DEFAULT, **own)
            config._name_or_path = checkpoint
            model = cls(config, encoder, tokenizer)
            model.eval()
        if class_names is not None or templates is not None:
            model.set_class_names(class_names or model.class_names, templates)
        model._read_names()
        return model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the whole model, as every model of transformers, and the tokenizer with it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.tokenizer.save_pretrained(save_directory)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the text tower.

        Raises:
            ValueError: there is none.
        """
        if self._tokenizer is None:
            raise ValueError(
                "The classifier has no tokenizer. Load it with ZeroShotClassifier.from_pretrained, or give it one: "
                "ZeroShotClassifier(config, encoder, tokenizer)."
            )
        return self._tokenizer

    @property
    def towers(self) -> Towers:
        """The dual encoder's two towers."""
        return towers_of(self.encoder)

    @property
    def text_modules(self) -> list[nn.Module]:
        """The modules that only texts pass through."""
        return self.towers.text_modules

    @property
    def writer(self) -> TextWriter:
        """What makes tokens of texts."""
        return TextWriter(self.tokenizer, self.towers)

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of the logits."""
        return [self.config.id2label[index] for index in sorted(self.config.id2label)]

    def scale(self) -> tuple[Tensor, Tensor | None]:
        """The factor of the cosine in the logits, with what an adapter learned of it, and what is added to them."""
        scale, bias = self.towers.scale()
        return self.logit_scale(scale), bias

    @property
    def scale_is_learned(self) -> bool:
        """Whether adapters have copies of `logit_scale`."""
        return not isinstance(self.logit_scale, LogitScale)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LogitScale):
            init.zeros_(module.offset)

    def get_input_embeddings(self) -> nn.Module:
        """The module that takes pixels."""
        return self.towers.image_embedding

    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | str | None = None) -> None:
        """Take other classes, at any time. No weight changes.

        Args:
            class_names: the new names.
            templates: the new templates; unchanged by default.

        Raises:
            ValueError: a name or template does not fit; the classifier keeps its own.
        """
        names = check_names(class_names)
        texts = self.config.templates if templates is None else check_templates(templates)
        tokens = self._tokens_of(names, texts)
        slots = {key: self.writer.with_slots(names, *key) for key in self._slots}
        self.config.id2label = dict(enumerate(names))
        self.config.label2id = {name: index for index, name in enumerate(names)}
        self.config.templates = texts
        self._tokens = tokens
        self._slots = slots
        self._features.clear()

    def _read_names(self) -> None:
        self.set_class_names(self.class_names)

    def _tokens_of(self, names: Sequence[str], templates: Sequence[str]) -> Tokens:
        texts = [template.replace("{}", as_text(name)) for template in templates for name in names]
        return self.writer.plain(texts, list(names) * len(templates))

    def texts_with_slots(self, count: int, position: Position, before: str = "") -> Tokens:
        """A text for each class with places for learned vectors, made once for a set of names.

        Args:
            count: of places.
            position: of the class name among them.
            before: words in front of each name, after the places there.

        Raises:
            ValueError: a text is too long; the message names its class.
        """
        key = count, position, before
        if key not in self._slots:
            self._slots[key] = self.writer.with_slots(self.class_names, count, position, before)
        return self._slots[key]

    def encode_tokens(
        self,
        tokens: Tokens,
        rows: Tensor | None = None,
        deep: Mapping[int, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Features of texts, not normalised, `class_chunk` at a time.

        Where gradients pass, each part is computed again in the backward pass instead of being kept.

        Args:
            tokens: the texts.
            rows: vectors for their slots, (texts or 1, slots, width).
            deep: by block: vectors for the slots at its input, (texts or 1, slots, width).
            weights: in the place of those of the dual encoder, by name.
        """
        device = self.towers.embedding.weight.device
        chunk = self.config.class_chunk
        several = torch.is_grad_enabled() and len(tokens) > chunk
        parts = []
        for start in range(0, len(tokens), chunk):
            part = tokens.part(start, start + chunk, device)
            own = rows if rows is None or len(rows) == 1 else rows[start : start + chunk]
            new = {
                block: each if len(each) == 1 else each[start : start + chunk] for block, each in (deep or {}).items()
            }
            run = partial(self._encode_part, part, weights=weights)
            parts.append(checkpoint(run, own, new, use_reentrant=False) if several else run(own, new))
        return torch.cat(parts)

    def _encode_part(
        self,
        tokens: Tokens,
        rows: Tensor | None,
        deep: Mapping[int, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        run = partial(self._run_text, tokens, weights)
        inside = (deep or weights) and checkpointed(self.towers.model.text_model)
        if inside and torch.is_grad_enabled():  # the whole run again, instead of its blocks without what acts in them
            return checkpoint(run, rows, deep, use_reentrant=False)
        return run(rows, deep)

    def _run_text(
        self,
        tokens: Tokens,
        weights: Mapping[str, Tensor] | None,
        rows: Tensor | None,
        deep: Mapping[int, Tensor] | None,
    ) -> Tensor:
        towers = self.towers
        with ExitStack() as stack:
            if weights:
                stack.enter_context(replaced_weights(self.encoder, weights))
            if rows is not None:
                stack.enter_context(replaced_rows(towers.embedding, tokens.slots, rows))
            if deep or weights:
                stack.enter_context(without_checkpoints(towers.model.text_model))
            for block, vectors in (deep or {}).items():
                stack.enter_context(replaced_slots(towers.text_blocks[block], tokens.slots, vectors))
            return towers.encode_text(tokens.ids, tokens.mask)

    def class_features(self, raw: bool = False) -> Tensor:
        """Features of the classes by the templates, (classes, width).

        They are kept as long as nothing trains in the text tower and neither its weights nor the names change.

        Args:
            raw: the mean of features that are not normalised; else as `config.normalize_before_mean` says.
        """
        modules = self.towers.text_modules
        key = f"templates {raw}"
        if torch.is_grad_enabled() and trains(modules):
            return self._ensemble(self.encode_tokens(self._tokens), raw)
        with evaluating(modules):
            return self._keep(key, modules, lambda: self._ensemble(self.encode_tokens(self._tokens), raw))

    def class_features_by(self, weights: Mapping[str, Tensor], drawn: bool = False) -> Tensor:
        """Features of the classes by the templates, computed with other weights, (classes, width).

        Args:
            weights: in the place of those of the dual encoder, by name.
            drawn: by one template for each class, drawn at random, instead of all.
        """
        count, classes = len(self.config.templates), len(self.class_names)
        if drawn and count > 1:
            texts = self._tokens.rows(torch.randint(count, (classes,)) * classes + torch.arange(classes))
            return self.encode_tokens(texts, weights=weights)
        return self._ensemble(self.encode_tokens(self._tokens, weights=weights), raw=False)

    def kept(self, equation: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """Features of the classes that depend on an equation's weights; kept in evaluation until these change.

        Args:
            equation: on whose weights they depend.
            compute: makes them.
        """
        if torch.is_grad_enabled() or self.training:
            return compute()
        return self._keep(f"equation {id(equation)}", [*self.towers.text_modules, equation], compute)

    def _keep(self, key: str, modules: Sequence[nn.Module], compute: Callable[[], Tensor]) -> Tensor:
        """Features that were computed before, if their modules are as they were then."""
        state = state_of(modules)
        if key not in self._features or self._features[key][0] != state:
            # a tensor of inference mode could not be used in training
            with torch.inference_mode(False), torch.no_grad():
                self._features[key] = state, compute()
        return self._features[key][1]

    @property
    def width(self) -> int:
        """Channels of the features that are compared."""
        with torch.no_grad():
            return self._encode_part(self._tokens.part(0, 1, self.towers.embedding.weight.device), None).shape[-1]

    def features_of(self, names: Sequence[str], raw: bool = False) -> Tensor:
        """Features of any classes by the templates, for weights to start from.

        Args:
            names: of the classes.
            raw: as of `class_features`; else they are normalised.
        """
        with torch.no_grad(), evaluating(self.towers.text_modules):
            features = self._ensemble(self.encode_tokens(self._tokens_of(names, self.config.templates)), raw)
        return features.float() if raw else normalised(features)

    def _ensemble(self, features: Tensor, raw: bool) -> Tensor:
        several = features.unflatten(0, (len(self.config.templates), -1))
        if self.config.normalize_before_mean and not raw:
            return normalised(normalised(several).mean(0))
        return several.mean(0)

    def train(self, mode: bool = True) -> ZeroShotClassifier:
        """As of every module. Kept features of the classes are computed again."""
        self._features.clear()
        return super().train(mode)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
        image_features: Tensor | None = None,
    ) -> ZeroShotOutput | tuple[Any, ...]:
        """Compare images with the classes.

        Args:
            pixel_values: the images.
            labels: indices of classes; (images, classes) of 0.0 and 1.0 for several labels an image.
            pixel_attention_mask: of SigLIP 2 for images of any shape.
            spatial_shapes: of SigLIP 2 for images of any shape.
            interpolate_pos_encoding: for images of another size, in models that take it.
            return_dict: False: a tuple.
            image_features: features of the images, not normalised, (images, width), instead of the images: what
                `towers.encode_image` gave for them.

        Raises:
            ValueError: there are neither images nor features, or both.
        """
        if (pixel_values is None) == (image_features is None):
            raise ValueError("Give pixel_values, or image_features in their place: one of them, not both.")
        images = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
            "interpolate_pos_encoding": interpolate_pos_encoding,
            FEATURES: image_features,
        }
        view = View(self, {name: value for name, value in images.items() if value is not None})
        outcome = self.adapters(view)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, outcome.logits, self.config)
            loss = self.adapters.objective(view, outcome, loss, labels)
        output = ZeroShotOutput(
            loss=loss,
            logits=outcome.logits,
            image_embeds=normalised(outcome.image),
            text_embeds=normalised(outcome.text),
        )
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor, **others: Any) -> Tensor:
        """Normalised features of images, for retrieval.

        Args:
            pixel_values: the images.
            others: further arguments of the image tower.
        """
        return normalised(self.towers.encode_image(pixel_values=pixel_values, **others))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Normalised features of any texts, for retrieval.

        Args:
            texts: as they are, without templates.

        Raises:
            ValueError: there is no text, or one is too long.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts is {texts!r}: must be a list of texts, at least one.")
        return normalised(self.encode_tokens(self.writer.plain(list(texts), list(texts))))


register_heads("ZeroShotClassifier", ())
AutoConfig.register(ZeroShotConfig.model_type, ZeroShotConfig)
AutoModelForImageClassification.register(ZeroShotConfig, ZeroShotClassifier)
