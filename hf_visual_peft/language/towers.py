"""What a dual encoder's two towers need: how text enters, how long it may be, where features and the scale are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


_LAST_TOKEN = ("siglip", "siglip2")  # trained on texts of one length, without a mask, pooled at the last position
_UNMASKED = ("clip", "metaclip_2")  # causal and pooled at the end token: what comes after it has no effect
_STREAMS = ("clip", "metaclip_2", "siglip", "chinese_clip", "altclip")  # vision models that are plain transformers
_OF_LOGITS = ("logit_scale", "logit_bias", "temperature")  # parameters of the dual encoder that are in neither tower
_POSITIONS_AFTER_PADDING = ("xlm-roberta", "roberta", "camembert", "altclip_text_model")


class Towers:
    """A dual encoder of transformers.

    Args:
        model: with `get_image_features` and `get_text_features`.

    Raises:
        ValueError: it has no such functions, or no text model.
    """

    def __init__(self, model: Any) -> None:
        missing = [
            name for name in ("get_image_features", "get_text_features", "text_model") if not hasattr(model, name)
        ]
        if missing:
            raise ValueError(
                f"{type(model).__name__} is not a dual encoder of images and texts: no {', '.join(missing)}. "
                "Valid: CLIP, MetaCLIP 2, SigLIP, SigLIP 2, ChineseCLIP, AltCLIP, ALIGN, VisionTextDualEncoderModel."
            )
        self.model = model
        self._kind = model.config.model_type

    @property
    def fixed_length(self) -> bool:
        """Whether every text is padded to the maximum length, because padding changes its features."""
        return self._kind in _LAST_TOKEN

    @property
    def masked(self) -> bool:
        """Whether the text model gets an attention mask."""
        return self._kind not in (*_LAST_TOKEN, *_UNMASKED)

    @property
    def max_length(self) -> int:
        """The number of positions of the text model."""
        config = self.model.text_model.config
        positions = int(config.max_position_embeddings)
        if config.model_type in _POSITIONS_AFTER_PADDING:
            return positions - int(config.pad_token_id) - 1
        return positions

    @property
    def end_token(self) -> int | None:
        """The token that the text model looks for and pools at; None if it pools elsewhere.

        Checkpoints with the old value 2 take the largest id instead, which is that of the tokenizer's end token.
        """
        if self._kind not in _UNMASKED:
            return None
        end = int(self.model.text_model.config.eos_token_id)
        return None if end == 2 else end

    @property
    def embedding(self) -> Any:
        """The module that maps token ids to vectors."""
        return self.model.text_model.get_input_embeddings()

    @property
    def text_width(self) -> int:
        """Channels of a token's vector."""
        return int(self.embedding.weight.shape[1])

    @property
    def text_blocks(self) -> nn.ModuleList:
        """The blocks of the text model."""
        return next(module for module in self.model.text_model.modules() if isinstance(module, nn.ModuleList))

    @property
    def image_embedding(self) -> nn.Module:
        """The module that maps pixels to tokens or maps."""
        return self.model.vision_model.get_input_embeddings()

    @property
    def image_blocks(self) -> nn.ModuleList:
        """The blocks of the image tower.

        Raises:
            ValueError: it is not a plain transformer, or one for images of any shape, whose tokens have a mask.
        """
        vision = self.model.vision_model
        kind = vision.config.model_type.removesuffix("_vision_model")
        if kind not in (*_STREAMS, "vit", "deit", "dinov2"):
            raise ValueError(
                f"{type(vision).__name__} takes no learned tokens: it is not a plain transformer whose tokens all "
                f"images have. Image towers that do: those of {', '.join(_STREAMS)}, and ViT, DeiT and DINOv2."
            )
        return next(module for module in vision.modules() if isinstance(module, nn.ModuleList))

    @property
    def image_width(self) -> int:
        """Channels of the image tower's tokens."""
        return int(self.model.vision_model.config.hidden_size)

    def encode_image_with(self, tokens: Mapping[int, Tensor], **images: Any) -> Tensor:
        """Features of images whose sequence has learned tokens at its end.

        Args:
            tokens: by block: tokens before it, (tokens, width). Those of block 0 join the sequence, before a norm in
                front of the blocks; those of others replace them.
            images: arguments of the image tower.
        """
        return self._encode_image_in(lambda: _joined(self, tokens), images)

    def encode_image_by(self, weights: Mapping[str, Tensor], **images: Any) -> Tensor:
        """Features of images, computed with other weights.

        Args:
            weights: by name in the dual encoder.
            images: arguments of the image tower.
        """
        return self._encode_image_in(lambda: replaced_weights(self.model, weights), images)

    def _encode_image_in(self, changed: Callable[[], AbstractContextManager[None]], images: Any) -> Tensor:
        """Features of images inside a context, which the backward pass enters again where it computes again."""

        def run() -> Tensor:
            with without_checkpoints(self.model.vision_model), changed():
                return self.encode_image(**images)

        if checkpointed(self.model.vision_model) and torch.is_grad_enabled():
            features: Tensor = checkpoint(run, use_reentrant=False)
            return features
        return run()

    def require_patches(self) -> None:
        """Check that patches have features like those of images.

        Raises:
            ValueError: they have not.
        """
        vision = self.model.vision_model
        if not (hasattr(self.model, "visual_projection") and hasattr(vision, "post_layernorm")):
            raise ValueError(
                f"{type(self.model).__name__}: the features of its images are not one projected token, so that "
                "patches have no features to compare with texts. Take a CLIP, MetaCLIP 2, ChineseCLIP or AltCLIP, or "
                "another method, such as CoOpConfig."
            )

    def encode_patches(self, **images: Any) -> tuple[Tensor, Tensor]:
        """Features of images, (images, width), and of their patches, (images, patches, width), not normalised."""
        output = self.model.vision_model(**images)
        patches = self.model.vision_model.post_layernorm(output.last_hidden_state[:, 1:])
        projection = self.model.visual_projection
        return projection(output.pooler_output), projection(patches)

    @property
    def padding_token(self) -> int | None:
        """The id that the text model takes for padding by itself; None if the tokenizer decides."""
        return None

    @property
    def text_modules(self) -> list[nn.Module]:
        """The modules that text features depend on."""
        projection = getattr(self.model, "text_projection", None)
        return [self.model.text_model, *([projection] if projection is not None else [])]

    @property
    def image_weights(self) -> list[str]:
        """Names of the parameters of the image tower, with its projection."""
        texts = {id(parameter) for module in self.text_modules for parameter in module.parameters()}
        return [
            name
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in texts and name.rpartition(".")[2] not in _OF_LOGITS
        ]

    def encode_image(self, pixel_values: Tensor, **others: Any) -> Tensor:
        """Features of shape (images, width), not normalised."""
        return _pooled(self.model.get_image_features(pixel_values=pixel_values, **others))

    def encode_text(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Features of shape (texts, width), not normalised."""
        masks = {} if mask is None else {"attention_mask": mask}
        return _pooled(self.model.get_text_features(input_ids=ids, **masks))

    def scale(self) -> tuple[Tensor, Tensor | None]:
        """The factor of the cosine in the logits, and what is added to it."""
        if hasattr(self.model, "temperature"):  # ALIGN
            return 1.0 / self.model.temperature, None
        return self.model.logit_scale.exp(), getattr(self.model, "logit_bias", None)


class OpenClipTowers(Towers):
    """A dual encoder of OpenCLIP, as `OpenClipDualEncoder`."""

    @property
    def fixed_length(self) -> bool:
        """Always: OpenCLIP's causal mask has one size."""
        return True

    @property
    def masked(self) -> bool:
        """Never: OpenCLIP's text model makes its masks itself."""
        return False

    @property
    def max_length(self) -> int:
        """The number of positions of the text model."""
        return int(self.model.text_model.context_length)

    @property
    def end_token(self) -> int | None:
        """The token that the text model looks for; None if it pools elsewhere or at the largest id."""
        text = self.model.text_model
        return int(text.eos_id) if text.pool_type == "eos" else None

    @property
    def embedding(self) -> Any:
        """The module that maps token ids to vectors."""
        return self.model.text_model.token_embedding

    @property
    def image_embedding(self) -> nn.Module:
        """The module that maps pixels to tokens or maps: the first convolution."""
        return next(module for module in self.model.vision_model.modules() if isinstance(module, nn.Conv2d))

    @property
    def image_blocks(self) -> nn.ModuleList:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "OpenCLIP's image tower takes no learned tokens here. Take the checkpoint in the form of transformers, or "
            "a method for texts, such as CoOpConfig."
        )

    @property
    def padding_token(self) -> int | None:
        """The id that the text model masks, where it does."""
        text = self.model.text_model
        return int(text.pad_id) if text.use_pad_mask or text.cls_emb is not None else None


def towers_of(model: Any) -> Towers:
    """The towers of a dual encoder.

    Raises:
        ValueError: it is none.
    """
    return (OpenClipTowers if getattr(model.config, "model_type", "") == "open_clip" else Towers)(model)


def _pooled(output: Any) -> Tensor:
    """Features as transformers 5 returns them, or as earlier versions do."""
    return output if isinstance(output, Tensor) else output.pooler_output


@contextmanager
def replaced_rows(embedding: nn.Module, slots: Tensor, rows: Tensor) -> Iterator[None]:
    """Put learned vectors in the place of some tokens' vectors, inside the context.

    Args:
        embedding: of the tokens.
        slots: positions to fill, (texts, slots).
        rows: the vectors, (texts or 1, slots, width).
    """

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        texts = len(output)
        index = torch.arange(texts, device=output.device)[:, None]
        return output.index_put((index, slots), rows.to(output).expand(texts, -1, -1))

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_slots(block: nn.Module, slots: Tensor, vectors: Tensor) -> Iterator[None]:
    """Put vectors in the place of some hidden states at the input of a block, inside the context.

    Args:
        block: of the text model.
        slots: positions to fill, (texts, slots).
        vectors: (texts or 1, slots, width).
    """

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        index = torch.arange(len(hidden), device=hidden.device)[:, None]
        hidden = hidden.index_put((index, slots), vectors.to(hidden).expand(len(hidden), -1, -1))
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = block.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _joined(towers: Towers, tokens: Mapping[int, Tensor]) -> Iterator[None]:
    """Let tokens take part in the image tower, inside the context; its outputs are those of its own tokens."""
    blocks = towers.image_blocks
    count = len(tokens[0])
    entry = getattr(towers.model.vision_model, "pre_layrnorm", blocks[0])

    def change(keep: int | None, new: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            rows = new.to(hidden).expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, :keep], rows], 1)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0][:, :-count], *output[1:]) if isinstance(output, tuple) else output[:, :-count]

    handles = [entry.register_forward_pre_hook(change(None, tokens[0]), with_kwargs=True)]
    handles += [
        blocks[index].register_forward_pre_hook(change(-count, new), with_kwargs=True)
        for index, new in tokens.items()
        if index
    ]
    handles.append(blocks[-1].register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute with other weights, inside the context: modules read them in the place of their own.

    Args:
        model: the dual encoder.
        weights: by name in it; cast to the type of those that they replace.

    Raises:
        ValueError: it has no weight of such a name.
    """
    own = dict(model.named_parameters())
    if missing := [name for name in weights if name not in own]:
        raise ValueError(
            f"{type(model).__name__} has no weight {missing[0]}: the adapter replaces it. Take other adapters out of "
            "the dual encoder, which give its modules other names."
        )
    new = {id(own[name]): value.to(own[name].dtype) for name, value in weights.items()}
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in new  # also where modules share it
    ]
    try:
        for held, name, parameter in places:
            held[name] = new[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for held, name, parameter in places:
            held[name] = parameter


def checkpointed(model: nn.Module) -> list[Any]:
    """The parts of a model that are run again in the backward pass."""
    return [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]


@contextmanager
def without_checkpoints(model: nn.Module) -> Iterator[None]:
    """Keep what blocks compute, inside the context: run again, they would be without hooks that are gone by then.

    Args:
        model: with or without checkpoints.
    """
    parts = checkpointed(model)
    try:
        for part in parts:
            part.gradient_checkpointing = False
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


@contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Switch dropout off in some modules, inside the context."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
