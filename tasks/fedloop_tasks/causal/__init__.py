"""Text by a causal language model: the next token is learnt, with LoRA on the last layers of a LLaMA or a GPT-2."""
