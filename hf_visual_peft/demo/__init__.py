"""The demonstration `hf-visual-peft demo`: a real pretrained encoder, real digits, one command."""
