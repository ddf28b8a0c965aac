"""The demonstration: a real pretrained encoder, real digits, one command."""
