"""Text in, tokens out: tokenizers, prompts, positions and their answers."""
