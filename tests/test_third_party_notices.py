import logging
import subprocess
import sys

import pytest

import hf_visual_peft  # noqa: F401  its import sets the filter


@pytest.mark.parametrize(
    ("logger", "message", "seen"),
    [
        ("torch.utils._pytree", "<enum 'X'>. Calling register_constant() on Enum subclasses is deprecated.", False),
        ("torch.utils._pytree", "<class 'X'> is already registered as a pytree node.", True),
        ("torchao", "Skipping import of cpp extensions due to incompatible torch version. Please upgrade.", False),
        ("torchao", "Quantization of this layer failed.", True),
    ],
)
def test_a_notice_that_concerns_no_user_of_ours_is_not_printed_and_others_are(caplog, logger, message, seen):
    named = logging.getLogger(logger)
    named.addHandler(caplog.handler)  # torch may have turned propagation to the root's off
    try:
        named.warning(message)
    finally:
        named.removeHandler(caplog.handler)

    assert (message in caplog.text) is seen


def test_models_that_get_an_adapter_tell_of_no_deprecation():
    code = (
        "import hf_visual_peft, peft, transformers\n"
        "config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32)\n"
        "peft.get_peft_model(transformers.ViTForImageClassification(config), hf_visual_peft.BitFitConfig())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "is deprecated" not in done.stderr
