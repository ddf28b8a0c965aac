"""Coverage: every method on a tiny random model of every architecture, and on families of timm and transformers."""
