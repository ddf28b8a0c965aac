"""The command `hf-visual-peft`: its sub-commands and the catalogue of methods that it prints."""
