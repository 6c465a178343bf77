"""minigpt trains a small GPT, samples from it, and shows what each generated token attended to."""
