"""From a prompt to text: sampling, cached decoding, and streams of tokens as text."""
