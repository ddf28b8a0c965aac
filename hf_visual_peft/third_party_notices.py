"""Hides notices of other packages that do not concern users of this one; imported before those packages."""

import logging
import warnings


def _concerns_users(record: logging.LogRecord) -> bool:
    # torchao registers two of its enums in a way that torch has deprecated, on every import of peft
    return "register_constant() on Enum subclasses is deprecated" not in record.getMessage()


logging.getLogger("torch.utils._pytree").addFilter(_concerns_users)

# peft asks every model for it, in get_peft_model and in from_pretrained
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
