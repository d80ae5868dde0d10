"""One file per scorer: images (or frames) and prompts in, one score per sample out."""
