"""Notices of other packages that tell a user of this one nothing; imported before those packages are."""

import logging


def _concerns_users(record: logging.LogRecord) -> bool:
    # torchao registers two of its enums in a way that torch finds outdated, on every import of peft
    return "register_constant() on Enum subclasses is deprecated" not in record.getMessage()


logging.getLogger("torch.utils._pytree").addFilter(_concerns_users)
