"""Hides notices of other packages that do not concern users of this one; imported before those packages."""

import logging
import warnings


# on every import of peft, which imports torchao: two of its enums are registered in a way that torch has deprecated;
# kernels for a newer torch are left out, which no backbone here calls
_HIDDEN = {
    "torch.utils._pytree": "register_constant() on Enum subclasses is deprecated",
    "torchao": "Skipping import of cpp extensions due to incompatible torch version",
}


def _hide(name: str, text: str) -> None:
    logging.getLogger(name).addFilter(lambda record: text not in record.getMessage())


for _name, _text in _HIDDEN.items():
    _hide(_name, _text)

# peft asks every model for it, in get_peft_model and in from_pretrained
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
