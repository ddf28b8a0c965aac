import logging

import pytest

import hf_visual_peft  # noqa: F401  its import sets the filter


@pytest.mark.parametrize(
    ("message", "seen"),
    [
        ("<enum 'X'> is an Enum subclass. Calling register_constant() on Enum subclasses is deprecated.", False),
        ("<class 'X'> is already registered as a pytree node.", True),
    ],
)
def test_a_notice_that_concerns_no_user_of_ours_is_not_printed_and_others_are(caplog, message, seen):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("torch.utils._pytree").warning(message)

    assert (message in caplog.text) is seen
